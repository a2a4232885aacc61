"""What an engine does when a peer speaks: gives words to endpoints, answers what is asked, reads what it is asked to pull."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from interlock.core.errors import ChannelClosed, InterlockError, RemoteProtocolError
from interlock.core.limits import QUESTIONS_UNDER_WAY_MAX
from interlock.transfer.gate import Gate
from interlock.transfer.notices import Notices
from interlock.transfer.peer import Peer, PeerStore
from interlock.transfer.pulling import Pulls, Writes
from interlock.transfer.segments import SegmentTable
from interlock.transfer.ticks import Ticks
from interlock.wire.channel import Channel, Received
from interlock.wire.identity import Identity
from interlock.wire.transfer_messages import (
    Answer,
    Ask,
    AskEcho,
    Echo,
    FindSegments,
    FoundSegments,
    Notified,
    Notify,
    Pull,
    Pulled,
    Said,
    from_wire,
)

ONCE_SECONDS = 0.25
"""A word that a peer repeats sooner, while nothing changed here, was waiting with the one that it repeats."""
_log = logging.getLogger(__name__)


class Hearing:
    """`spawn`: runs a task that ends with the engine."""

    def __init__(
        self,
        peers: PeerStore,
        segments: SegmentTable,
        notices: Notices,
        pulls: Pulls,
        writes: Writes,
        ticks: Ticks,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._peers, self._segments, self._notices = peers, segments, notices
        self._pulls, self._writes, self._ticks, self._spawn = pulls, writes, ticks, spawn
        self._gate = Gate()
        self.answer: Callable[[Identity, bytes], Awaitable[bytes]] | None = None
        """To the questions of peers: `answer(who asks, payload)`."""

    async def serve(self, channel: Channel, name: str) -> None:
        """Until the channel ends, its peer breaks the protocol, or is forgotten here."""
        peer = self._peers.look(name)
        if peer is None:
            return
        try:
            if not peer.driver.is_connected:
                await self._gate.enter(name)
            await self._hear_all(channel, name)
        except ChannelClosed:
            return
        except RemoteProtocolError as error:
            _log.warning("%s", error)
        finally:
            self._gate.leave(name)

    async def _hear_all(self, channel: Channel, name: str) -> None:
        loop = asyncio.get_running_loop()
        last: tuple[Any, Any, float] = (None, None, 0.0)
        async for received in channel.messages():
            peer = self._peers.look(name)
            if peer is None:
                return
            said, state, until_s = last
            if (
                isinstance(said, Said)
                and received.body == said
                and peer.driver.state is state
                and loop.time() < until_s
            ):
                continue  # it waited here with the word that it repeats, which was answered just now
            await self._hear(channel, received, peer)
            last = (received.body, peer.driver.state, loop.time() + ONCE_SECONDS)
            if peer.driver.is_connected or not isinstance(received.body, Said):
                self._gate.leave(name)  # its handshake is over, or it wants something else

    async def _hear(self, channel: Channel, received: Received, peer: Peer) -> None:
        match received.body:
            case Said() as said:
                peer.driver.tell(from_wire(peer.name, channel.peer.incarnation, said))
                self._ticks.sooner(peer)
            case Notify() as said:
                notified = self._notices.arrived(channel.peer, said)
                if notified is not None:
                    await channel.send(notified)
            case Notified(number):
                self._notices.acknowledged(peer.name, number)
            case FindSegments(label):
                found = self._segments.find(label)
                rows = [(s.number, s.size_bytes, s.label, s.takes_writes) for s in found]
                await channel.reply(received, FoundSegments(rows))
            case Pull() as said:
                self._pulls.asked(channel.peer, said, peer.link.post)
            case Pulled() as said:
                self._writes.answered(channel.peer, said)
            case Ask() if self.answer is None or peer.questions >= QUESTIONS_UNDER_WAY_MAX:
                why = "nobody answers questions here" if self.answer is None else "too many at a time"
                await channel.fault(received, "refused", why, retryable=self.answer is not None)
            case Ask():
                self._spawn(self._answer_one(channel, received, peer))
            case AskEcho():
                await channel.reply(received, Echo())

    async def _answer_one(self, channel: Channel, received: Received, peer: Peer) -> None:
        """In a task of its own: an answer may wait, and other words must not."""
        assert self.answer is not None
        peer.questions += 1
        try:
            payload = await self.answer(channel.peer, received.body.payload)
            await channel.reply(received, Answer(payload))
        except ChannelClosed:
            return
        except InterlockError as error:
            await self._fault(channel, received, "refused", str(error), error.retryable)
        except Exception:
            _log.exception("a question of %s could not be answered", channel.peer)
            await self._fault(channel, received, "failed", "the answer failed; see the log there", False)
        finally:
            peer.questions -= 1

    async def _fault(self, channel: Channel, received: Received, code: str, why: str, again: bool) -> None:
        with contextlib.suppress(ChannelClosed):
            await channel.fault(received, code, why, again)

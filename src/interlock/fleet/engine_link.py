"""The line from a front to one life of one engine: connected for as long as that life may live, and its exit watched.

A connection that ends proves nothing. So the link connects again to the same life and says which streams it still wants,
and from which token; the engine goes on. Only the exit of the process, seen by pidfd, ends the link by itself. The watch is
the link's own and outlives connections.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

import msgspec

from interlock.core.errors import InterlockError, StaleError
from interlock.core.identity import Epoch
from interlock.core.limits import (
    HELLO_SECONDS_MAX,
    RECONNECT_SECONDS_MAX,
    RECONNECT_SECONDS_MIN,
    REFUSED_SECONDS,
    SILENCE_SECONDS_MAX,
)
from interlock.fleet.ledger import Life
from interlock.host.base import Host, Watch
from interlock.wire.channel import Channel, connect_channel
from interlock.wire.engine_messages import (
    Cursor,
    FromEngine,
    Held,
    HeldAll,
    Recover,
    Refused,
    Resume,
    Tokens,
)
from interlock.wire.fleet_messages import EngineFacts
from interlock.wire.identity import Identity

LAST_WORDS_SECONDS = 0.25
"""After a seen exit: what the dead engine had written is read to its end, which a child holding the socket may hide."""


class LinkOwner(Protocol):
    """Who hears what comes over a link. None of these waits for a peer."""

    def wanted(self, life: Life) -> list[Cursor]: ...

    def recovers(self, life: Life) -> bool:
        """Whether that engine may hold requests of an earlier life of this front."""
        ...

    def on_held(self, life: Life, held: Held) -> None: ...

    def on_held_all(self, life: Life) -> None:
        """It has told all that it holds."""
        ...

    def on_up(self) -> None: ...

    def on_tokens(self, link: EngineLink, tokens: Tokens) -> None: ...

    def on_refused(self, link: EngineLink, refused: Refused) -> None: ...

    def on_unreachable(self, link: EngineLink) -> None:
        """No connection could be made: no proof, but a suspicion."""
        ...

    def on_gone(self, link: EngineLink, why: str) -> None:
        """This life is proven over."""
        ...

    def on_stale(self, error: Exception) -> None:
        """This process must stop: a newer life of it is known, or it has a defect."""
        ...


class EngineLink:
    """Made by the dispatcher for each life in the membership; `close` ends it."""

    def __init__(self, host: Host, me: Identity, life: Life, facts: EngineFacts, owner: LinkOwner) -> None:
        self.life, self.facts = life, facts
        self.blocked_until_s = 0.0
        self.floor = Epoch()
        """It refused what was older than this epoch."""
        self.last_error = "not connected yet"
        self._host, self._me, self._owner = host, me, owner
        self._channel: Channel | None = None
        self._watch: Watch | None = None
        self._exit_task: asyncio.Task[None] | None = None
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._resumed_s = 0.0
        self._resume_due = False
        self._closed = False
        self._closings: set[asyncio.Future[None]] = set()
        self._task = asyncio.create_task(self._run(), name=f"link to {life}")
        self._task.add_done_callback(self._on_end)

    @property
    def closed(self) -> bool:
        """No further connection will be made."""
        return self._closed

    @property
    def up(self) -> bool:
        """Whether work goes out over it now."""
        return self._channel is not None and self._channel.closed is None

    @property
    def silent(self) -> bool:
        """Connected, and nothing was heard for so long that the engine is suspected."""
        return self._channel is not None and self._channel.silent_for_s > SILENCE_SECONDS_MAX

    def usable(self, epoch: Epoch) -> bool:
        """Whether something dispatched at this epoch can be sent and has a chance to be taken."""
        channel = self._channel
        if channel is None or channel.closed is not None or epoch < self.floor:
            return False
        if channel.silent_for_s > SILENCE_SECONDS_MAX:
            return False
        return not self.blocked_until_s or self._host.clock.monotonic_s() >= self.blocked_until_s

    def block(self, seconds: float) -> None:
        """Nothing is dispatched there for so long."""
        self.blocked_until_s = self._host.clock.monotonic_s() + seconds

    def post(self, body: msgspec.Struct) -> None:
        """Queues it where there is a connection; where there is none, `Resume` will say the same by silence.

        Raises `LocalProtocolError` for what is longer than a frame.
        """
        if self._channel is not None:
            with contextlib.suppress(ConnectionError):
                self._channel.post(body)

    def resume(self) -> None:
        """Ask for all wanted streams again from where they stand: tokens were missing. Once in a while is enough."""
        self._resume_due = True
        self.resume_if_due()

    def resume_if_due(self) -> None:
        """To be called now and then: what was missing may have been the last that the engine had to say."""
        now = self._host.clock.monotonic_s()
        if self._resume_due and now - self._resumed_s >= REFUSED_SECONDS:
            self._resume_due, self._resumed_s = False, now
            self.post(Resume(self._owner.wanted(self.life)))

    async def close(self) -> None:
        self._closed = True
        tasks = [
            t for t in (self._task, self._exit_task) if t is not None and t is not asyncio.current_task()
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._closings, return_exceptions=True)
        if self._watch is not None:
            self._watch.close()

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._owner.on_stale(error)

    async def _run(self) -> None:
        pause_s = RECONNECT_SECONDS_MIN
        while True:
            try:
                channel = await connect_channel(
                    self._host,
                    self.facts.address,
                    me=self._me,
                    role="front",
                    accept=FromEngine,
                    deadline_s=HELLO_SECONDS_MAX,
                )
                try:
                    if self._belongs(channel):
                        pause_s = RECONNECT_SECONDS_MIN
                        await self._serve(channel)
                finally:
                    self._channel = None
                    self._quiet.set()
                    await self._close_channel(channel)
            except StaleError as error:
                self._owner.on_stale(error)
                return
            except (OSError, TimeoutError, ValueError, InterlockError) as error:
                self.last_error = str(error)  # ValueError: its address, which it told itself, is none
                self._owner.on_unreachable(self)
            if self.closed:
                return
            await self._host.clock.sleep_s(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_SECONDS_MAX)

    async def _close_channel(self, channel: Channel) -> None:
        """In a task of its own: our cancellation must not leave a channel half closed."""
        closing = asyncio.ensure_future(channel.close())
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)
        await asyncio.shield(closing)

    def _belongs(self, channel: Channel) -> bool:
        """Whether the peer is the life meant. A newer one at the same name proves that this one is over."""
        peer = channel.peer
        if (peer.name, peer.incarnation) == (self.life.name, self.life.incarnation):
            return True
        self.last_error = f"{peer} answers at {self.facts.address}"
        if peer.name == self.life.name and peer.incarnation > self.life.incarnation:
            self._closed = True
            self._owner.on_gone(self, f"its newer life {peer} answers at its address")
        return False

    async def _serve(self, channel: Channel) -> None:
        self._quiet.clear()
        self._watch_exit(channel)
        if self._owner.recovers(self.life):
            await channel.send(Recover())
        else:
            await self._begin(channel)
        async for received in channel.messages():
            match received.body:
                case Held() as held:
                    self._owner.on_held(self.life, held)
                case HeldAll(requests, True):
                    await channel.send(Recover(requests))
                case HeldAll():
                    self._owner.on_held_all(self.life)
                    await self._begin(channel)
                case Tokens() as tokens:
                    self._owner.on_tokens(self, tokens)
                case Refused() as refused:
                    self._owner.on_refused(self, refused)
        self.last_error = str(channel.closed)

    async def _begin(self, channel: Channel) -> None:
        """From here on work goes out over this connection."""
        self._channel = channel
        self._resume_due, self._resumed_s = False, self._host.clock.monotonic_s()
        await channel.send(Resume(self._owner.wanted(self.life)))
        self._owner.on_up()

    def _watch_exit(self, channel: Channel) -> None:
        if self._watch is not None or channel.peer_process is None:
            return
        try:
            watch = self._host.watch(channel.peer_process.pid)
        except ProcessLookupError:
            return  # gone between two lines; the next attempt to connect, or the coordinator, tells
        if channel.peer_process.exited:
            watch.close()  # the number may be somebody else's by now
            return
        self._watch = watch
        self._exit_task = asyncio.create_task(self._report_exit(watch), name=f"exit of {self.life}")
        self._exit_task.add_done_callback(self._on_end)

    async def _report_exit(self, watch: Watch) -> None:
        await watch.wait_exited()
        self._closed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                await self._quiet.wait()
        self._owner.on_gone(self, "its process has exited")

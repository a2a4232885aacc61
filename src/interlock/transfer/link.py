"""The way for messages to one peer: whichever control channel there is, dialled by either side, and one dial at a time.

Messages of endpoints are levels and carry their stamps, so any channel will do and none has to arrive: what cannot leave now is dropped but for
the last few, and said again at the next tick. Both sides may have dialled; then the one dialled by the larger name stays.
Dials that failed wait, twice as long each time, by a random part of it: after a restart a thousand peers do not come at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from interlock.core.errors import ChannelClosed, InterlockError, StaleError
from interlock.core.limits import (
    HELLO_SECONDS_MAX,
    RECONNECT_SECONDS_MAX,
    RECONNECT_SECONDS_MIN,
    SILENCE_SECONDS_MAX,
)
from interlock.host.base import Host
from interlock.membership.directory import Directory
from interlock.wire.channel import Channel, Secure, connect_channel
from interlock.wire.identity import Identity
from interlock.wire.transfer_messages import TransferWord

WAITING_MAX = 16
CHANNELS_PER_REQUEST_MAX = 3
CONTROL_DIAL_SECONDS_MAX = 8.0
"""More than the other side gives a newcomer for its Hello: who hangs up on a peer that is merely busy makes it do all of it again."""
_log = logging.getLogger(__name__)


class PeerLink:
    """`serve`: what is done with a channel until it ends; `superseded`: a newer life of ours is known."""

    def __init__(
        self,
        host: Host,
        me: Identity,
        peer: str,
        directory: Directory,
        token: bytes,
        serve: Callable[[Channel], Awaitable[None]],
        superseded: Callable[[StaleError], None],
        secure: Secure | None = None,
    ) -> None:
        self._host, self._me, self.peer = host, me, peer
        self._directory, self._token = directory, token
        self._serve, self._superseded, self._secure = serve, superseded, secure
        self._channels: list[tuple[Channel, bool]] = []
        self._waiting: deque[msgspec.Struct] = deque(maxlen=WAITING_MAX)
        self._dialling: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pause_s = RECONNECT_SECONDS_MIN
        self._not_before_s = 0.0
        self._address = ""
        self._arrived = asyncio.Event()
        self._closed = False
        self.trouble = ""
        """Why the last dial failed."""

    @property
    def is_up(self) -> bool:
        return self._best() is not None

    @property
    def address(self) -> str:
        """Dialled last; empty where only the peer dialled."""
        return self._address

    def _best(self) -> Channel | None:
        living = [(c.silent_for_s, c) for c, _ in self._channels if c.closed is None]
        return min(living, key=lambda each: each[0])[1] if living else None

    # --- sending ---------------------------------------------------------------------------------------------------

    def post(self, body: msgspec.Struct) -> None:
        """Soon, or never; nothing hangs on it."""
        self._waiting.append(body)
        channel = self._best()
        if channel is None or channel.silent_for_s > SILENCE_SECONDS_MAX:
            self.dial()
        for old, _ in self._channels:
            # A channel that the peer dialled has no lease of its own: after a cut it may be half-open for ever.
            if old.closed is None and old.silent_for_s > 2 * SILENCE_SECONDS_MAX:
                self._spawn(old.close())
        if channel is not None:
            self._flush(channel)

    async def request(self, body: msgspec.Struct, timeout_s: float) -> tuple[Any, int]:
        """The answer, and the life of who gave it. Raises `ChannelFault`, `TimeoutError`, `ChannelClosed` (also when there is no channel in time)."""
        deadline_s = self._host.clock.monotonic_s() + timeout_s
        for _ in range(CHANNELS_PER_REQUEST_MAX - 1):
            try:
                return await self._request(body, deadline_s)
            except ChannelClosed as closed:
                # Of two channels that were dialled at once one goes, perhaps with this question on its way; questions may be asked again.
                if not await self._is_back(deadline_s):
                    raise closed from None
        return await self._request(body, deadline_s)

    async def _is_back(self, deadline_s: float) -> bool:
        """Is there another channel, or is there soon?"""
        if self._best() is None:
            self.dial()
            self._arrived.clear()
            left_s = deadline_s - self._host.clock.monotonic_s()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(left_s, RECONNECT_SECONDS_MAX))):
                    await self._arrived.wait()
        return self._best() is not None

    async def _request(self, body: msgspec.Struct, deadline_s: float) -> tuple[Any, int]:
        while (channel := self._best()) is None:
            self.dial()
            left_s = deadline_s - self._host.clock.monotonic_s()
            self._arrived.clear()
            try:
                async with asyncio.timeout(max(0.0, min(left_s, RECONNECT_SECONDS_MAX))):
                    await self._arrived.wait()
            except TimeoutError:
                if left_s <= RECONNECT_SECONDS_MAX:
                    raise ChannelClosed(
                        f"{self.peer} cannot be reached: {self.trouble or 'no answer'}"
                    ) from None
        answer = await channel.request(body, max(0.0, deadline_s - self._host.clock.monotonic_s()))
        return answer, channel.peer.incarnation

    def _flush(self, channel: Channel) -> None:
        while self._waiting:
            body = self._waiting.popleft()
            try:
                channel.post(body)
            except InterlockError as error:
                _log.debug("a word to %s was lost: %s", channel.peer, error)

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- channels --------------------------------------------------------------------------------------------------

    def dial(self) -> None:
        """One dial at a time, and not before the last failure's pause is over."""
        if not self._closed and (self._dialling is None or self._dialling.done()):
            self._dialling = self._spawn(self._dial())

    async def _dial(self) -> None:
        wait_s = self._not_before_s - self._host.clock.monotonic_s()
        if wait_s > 0:
            await self._host.clock.sleep_s(wait_s)
        if any(
            c.closed is None and not dialled and c.silent_for_s < SILENCE_SECONDS_MAX
            for c, dialled in self._channels
        ):
            return  # the peer came meanwhile
        address = ""
        try:
            async with asyncio.timeout(HELLO_SECONDS_MAX):
                address = self._address = await self._directory.address_of(self.peer)
            channel = await connect_channel(
                self._host,
                address,
                me=self._me,
                role="transfer",
                accept=TransferWord,
                deadline_s=CONTROL_DIAL_SECONDS_MAX,
                token=self._token,
                secure=self._secure if address.startswith("tcp:") else None,
            )
        except StaleError as error:
            self._superseded(error)
            return
        except (OSError, TimeoutError, InterlockError) as error:
            self._failed(address, str(error) or "it took too long to find out where it is")
            return
        if channel.peer.name != self.peer:
            self._failed(address, f"{address} is {channel.peer.name}, not {self.peer}")
            await channel.close()
            return
        self.trouble, self._pause_s = "", RECONNECT_SECONDS_MIN
        self._adopt(channel, dialled=True)  # at once: whoever posts before the task runs would dial again
        self._spawn(self._follow(channel))

    async def _follow(self, channel: Channel) -> None:
        try:
            await self._attend(channel, dialled=True)
        finally:
            await channel.close()

    def _failed(self, address: str, why: str) -> None:
        self.trouble = why
        if address:
            self._directory.invalidate(self.peer, address)
        self._not_before_s = self._host.clock.monotonic_s() + self._pause_s * (0.5 + random.random())
        self._pause_s = min(2 * self._pause_s, RECONNECT_SECONDS_MAX)

    async def attend(self, channel: Channel, *, dialled: bool) -> None:
        """Serves it until it ends; the caller closes it."""
        self._adopt(channel, dialled=dialled)
        await self._attend(channel, dialled=dialled)

    def _adopt(self, channel: Channel, *, dialled: bool) -> None:
        self._channels.append((channel, dialled))
        if channel.peer_process is not None:
            channel.peer_process.close()  # we ask for no proof of exit, so its descriptor goes now
        self._prune()
        self._arrived.set()
        self._flush(channel)

    async def _attend(self, channel: Channel, *, dialled: bool) -> None:
        try:
            await self._serve(channel)
        finally:
            self._channels.remove((channel, dialled))

    def _prune(self) -> None:
        """Of channels dialled by both sides that of the larger name stays."""
        living = [(c, dialled) for c, dialled in self._channels if c.closed is None]
        ours = [c for c, dialled in living if dialled]
        theirs = [c for c, dialled in living if not dialled]
        spare = ours[:-1]  # one of ours is enough
        if ours and theirs and self._me.name < self.peer:
            spare = ours
        for channel in spare:
            self._spawn(channel.close())

    def moved(self) -> None:
        """The directory has another address of the peer: who was dialled at the old one is let go if it is silent."""
        for channel, dialled in self._channels:
            if dialled and channel.silent_for_s > SILENCE_SECONDS_MAX / 2:
                self._spawn(channel.close())
        self._not_before_s = 0.0

    async def close(self) -> None:
        self._closed = True  # whoever still holds it, a write that is asked for again, brings it not back
        for channel, _ in list(self._channels):
            await channel.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A dial may have succeeded meanwhile, and who would close its channel was cancelled before it began.
        for channel, _ in list(self._channels):
            await channel.close()

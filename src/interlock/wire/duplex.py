"""The channel itself, on the loop: requests with answers, messages, descriptors, heartbeats, all bounded.

Three tasks serve one channel: a reader, a writer and a heartbeat. Sending never waits for the peer: what does not leave
stays in the outbox, and a peer so slow that the outbox overflows loses the channel, for it must not slow the others. The
reader stops when nobody takes what it read; then the peer's outbox fills instead of our memory.

A closed channel proves nothing about its peer's life: `peer_process` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from interlock.core.errors import (
    ChannelClosed,
    ChannelFault,
    InterlockError,
    LocalProtocolError,
    RemoteProtocolError,
    StaleError,
)
from interlock.core.limits import (
    CLOSE_SECONDS_MAX,
    FDS_PER_MESSAGE_MAX,
    FDS_WAITING_MAX,
    FRAME_BYTES_MAX,
    HEARTBEAT_SECONDS,
    INBOX_MESSAGES_MAX,
    OUTBOX_BYTES_MAX,
    OUTBOX_MESSAGES_MAX,
    SILENCE_SECONDS_MAX,
)
from interlock.host.base import Host, Stream, Watch
from interlock.wire.conversation import Conversation, Invalid, OvertakenError
from interlock.wire.envelope import Fault, Ping, Pong, Rejected
from interlock.wire.framing import HEADER_BYTES, frame_length
from interlock.wire.identity import Identity

ENDED_REQUESTS_MAX = 16384
"""Requests that were answered or given up, whose further answers are dropped."""
BATCH_BYTES = 256 * 1024
BURST_MESSAGES = 64
"""With so many waiting, a sender lets the writer run first: a burst from one task is not yet a slow reader."""


class Received(msgspec.Struct, frozen=True, gc=False):
    """One message of the peer. `answers` is the number that `send` returned for what it answers, or 0.

    A `Fault` that answers a plain `send` arrives so too. `fds` belong to whoever takes the message.
    """

    number: int
    answers: int
    body: Any
    fds: tuple[int, ...] = ()


class _Outgoing(msgspec.Struct):
    frame: bytes
    fds: Sequence[int]
    sent: asyncio.Future[None] | None


class Channel:
    """Made by `connect_channel` and `serve_channels` (wire/channel.py), with both sides greeted."""

    def __init__(
        self, host: Host, stream: Stream, talk: Conversation, peer_role: str, *, leased: bool = False
    ) -> None:
        self._leased = leased
        self._clock, self._stream, self._talk = host.clock, stream, talk
        self._peer_role = peer_role
        self._peer_process = stream.watch_peer()
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()
        self._inbox: deque[Received] = deque()
        self._inbox_filled, self._inbox_taken = asyncio.Event(), asyncio.Event()
        self._outbox: deque[_Outgoing] = deque()
        self._in_flight: list[_Outgoing] = []
        self._outbox_bytes = 0
        self._outbox_filled, self._outbox_empty = asyncio.Event(), asyncio.Event()
        self._outbox_empty.set()
        self._arrived_fds: deque[int] = deque()
        self._answer_fds: list[int] = []
        self._heard_s = self._sent_s = self._clock.monotonic_s()
        self._ping_waits = False
        self._closed: InterlockError | None = None
        self._tasks = [
            asyncio.create_task(self._read(), name=f"read {talk.peer}"),
            asyncio.create_task(self._write(), name=f"write {talk.peer}"),
            asyncio.create_task(self._beat(), name=f"beat {talk.peer}"),
        ]

    # --- what a user sees ---------------------------------------------------------------------------------------

    @property
    def peer(self) -> Identity:
        """Who is at the other end, in which life."""
        return self._talk.peer

    @property
    def peer_role(self) -> str:
        """The role in the peer's Hello; empty on the side that connected."""
        return self._peer_role

    @property
    def peer_process(self) -> Watch | None:
        """Proof of the peer's exit; None where it has no process on this machine. It outlives the channel: whoever still
        holds it can wait for the exit after the connection broke, which proves nothing."""
        return self._peer_process

    @property
    def silent_for_s(self) -> float:
        """Since anything was heard. A living peer with a loop is heard every heartbeat; a blocking one when it likes."""
        return self._clock.monotonic_s() - self._heard_s

    @property
    def closed(self) -> InterlockError | None:
        """Why the channel is closed, or None."""
        return self._closed

    async def send(self, body: msgspec.Struct, answers: int = 0, fds: Sequence[int] = ()) -> int:
        """Queues a message and returns its number; waits only while descriptors go along (they stay the caller's).

        Raises `ChannelClosed`, also when this message finds the outbox full; `LocalProtocolError` when it is too long.
        """
        number, item = self._enqueue(body, answers, fds)
        if item.sent is not None:
            try:
                await item.sent
            except asyncio.CancelledError:
                # The caller may now close what the writer would still send: another file by that number.
                self._shut(ChannelClosed(f"sending descriptors to {self.peer} was cancelled"))
                raise
        elif len(self._outbox) > BURST_MESSAGES:
            await self._clock.sleep_s(0)
        return number

    def post(self, body: msgspec.Struct) -> int:
        """As `send` without descriptors, for who cannot await. Raises `ChannelClosed`, `LocalProtocolError`."""
        return self._enqueue(body, 0, ())[0]

    async def request(self, body: msgspec.Struct, timeout_s: float) -> Any:
        """The answer's body. Raises `ChannelFault` when the peer refused, `TimeoutError`, `ChannelClosed`.

        Descriptors that came with the answer wait in `take_fds`.
        """
        number, _ = self._enqueue(body, 0, ())
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise TimeoutError(
                f"{self.peer} did not answer {type(body).__name__} within {timeout_s} s"
            ) from None
        finally:
            del self._pending[number]
            self._ended[number] = None
            if len(self._ended) > ENDED_REQUESTS_MAX:
                self._ended.popitem(last=False)

    async def messages(self) -> AsyncIterator[Received]:
        """What the peer says, but answers to requests, until the channel is closed by either side or breaks.

        Raises `RemoteProtocolError` when the peer broke the rules, `StaleError` when it knows a newer life of ours. `closed`
        says why it ended.
        """
        while True:
            while self._inbox:
                received = self._inbox.popleft()
                self._inbox_taken.set()
                yield received
            if self._closed is not None:
                if not isinstance(self._closed, ChannelClosed):
                    raise self._closed
                return
            self._inbox_filled.clear()
            await self._inbox_filled.wait()

    def check_integrity(self) -> None:
        """Raises AssertionError where messages wait and nobody is told: a wake-up was lost. Holds between any two steps."""
        assert not self._inbox or self._inbox_filled.is_set(), (
            f"messages of {self.peer} wait and no reader is told"
        )
        assert not self._outbox or self._outbox_filled.is_set(), (
            f"messages to {self.peer} wait and are not sent"
        )

    async def reply(self, received: Received, body: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """Answers a request. Raises as `send` does; nobody waits for whether it was read."""
        await self.send(body, received.number, fds)

    async def fault(self, received: Received, code: str, message: str, retryable: bool = False) -> None:
        """Answers a request by a refusal: the asker's `request` raises `ChannelFault` with these words."""
        await self.send(Fault(code, message, retryable), received.number)

    def take_fds(self) -> list[int]:
        """Descriptors that came with answers to requests, owned by the caller from now on."""
        taken, self._answer_fds = self._answer_fds, []
        return taken

    async def close(self) -> None:
        """Lets the last words leave (for a bounded time), then closes. Idempotent."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS_MAX):
                    await self._outbox_empty.wait()
        finally:  # also where whoever closes is cancelled: nobody would close it again
            self._shut(ChannelClosed(f"this side closed the channel to {self.peer}"))
        me = asyncio.current_task()
        await asyncio.gather(*(task for task in self._tasks if task is not me), return_exceptions=True)

    # --- sending ------------------------------------------------------------------------------------------------

    def _enqueue(self, body: msgspec.Struct, answers: int, fds: Sequence[int]) -> tuple[int, _Outgoing]:
        if self._closed is not None:
            raise ChannelClosed(str(self._closed)) from self._closed
        if len(fds) > FDS_PER_MESSAGE_MAX:
            raise LocalProtocolError(
                f"{len(fds)} descriptors do not fit into one message, {FDS_PER_MESSAGE_MAX} do"
            )
        number, frame = self._talk.say(body, answers, len(fds))
        if len(self._outbox) >= OUTBOX_MESSAGES_MAX or self._outbox_bytes + len(frame) > OUTBOX_BYTES_MAX:
            self._shut(
                ChannelClosed(
                    f"{self.peer} reads too slowly: {len(self._outbox)} messages, {self._outbox_bytes} bytes wait for it",
                    hint="the channel was closed so that nobody else waits for it",
                )
            )
            assert self._closed is not None
            raise self._closed
        sent = asyncio.get_running_loop().create_future() if fds else None
        item = _Outgoing(frame, fds, sent)
        self._outbox.append(item)
        self._outbox_bytes += len(frame)
        self._outbox_empty.clear()
        self._outbox_filled.set()
        return number, item

    async def _write(self) -> None:
        try:
            while True:
                await self._outbox_filled.wait()
                while self._outbox:
                    await self._write_batch()
                self._outbox_filled.clear()
                self._outbox_empty.set()
        except (ConnectionError, ValueError) as error:
            self._shut(ChannelClosed(f"the connection to {self.peer} broke: {error}"))

    async def _write_batch(self) -> None:
        item = self._outbox.popleft()
        self._in_flight = [item]
        frames, size = [item.frame], len(item.frame)
        while not item.fds and self._outbox and not self._outbox[0].fds and size < BATCH_BYTES:
            frames.append(self._outbox[0].frame)
            size += len(self._outbox.popleft().frame)
        await self._stream.send(frames[0] if len(frames) == 1 else b"".join(frames), item.fds)
        self._outbox_bytes -= size
        self._sent_s = self._clock.monotonic_s()
        if item.sent is not None and not item.sent.done():
            item.sent.set_result(None)
        self._in_flight = []

    async def _beat(self) -> None:
        """One Ping waits for its answer at most: a blocking peer reads seldom, and must not find a thousand of them.

        A leased channel ends when the peer, which has a loop, answers none for SILENCE_SECONDS_MAX: it may be half-open, and
        nobody would ever tell us. Beats are counted, not seconds: while we were frozen ourselves, nothing was unanswered.
        """
        unanswered = 0
        while True:
            await self._clock.sleep_s(HEARTBEAT_SECONDS)
            ours = len(self._inbox) >= INBOX_MESSAGES_MAX  # then it is we who do not read
            unanswered = unanswered + 1 if self._ping_waits and not ours else 0
            if self._leased and unanswered * HEARTBEAT_SECONDS >= SILENCE_SECONDS_MAX:
                self._shut(ChannelClosed(f"{self.peer} was not heard for {SILENCE_SECONDS_MAX} s"))
                return
            now = self._clock.monotonic_s()
            unheard = self._leased and now - self._heard_s >= HEARTBEAT_SECONDS
            if (unheard or now - self._sent_s >= HEARTBEAT_SECONDS / 2) and not self._ping_waits:
                self._ping_waits = True
                self._post(Ping())

    def _post(self, body: msgspec.Struct, answers: int = 0) -> None:
        """For the channel's own words: a closed channel hears no more of them."""
        with contextlib.suppress(ChannelClosed):
            self._enqueue(body, answers, ())

    # --- receiving ----------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            while True:
                header = await self._stream.receive_exactly(HEADER_BYTES)
                frame = await self._stream.receive_exactly(frame_length(header, FRAME_BYTES_MAX))
                self._heard_s, self._ping_waits = self._clock.monotonic_s(), False
                await self._handle(frame)
        except EOFError:
            self._shut(ChannelClosed(f"{self.peer} closed the channel"))
        except ConnectionError as error:
            self._shut(ChannelClosed(f"the connection to {self.peer} broke: {error}"))
        except OvertakenError as error:
            self._post(Rejected(str(error), error.highest))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS_MAX):
                    await self._outbox_empty.wait()
            self._shut(ChannelClosed(str(error)))
        except (RemoteProtocolError, StaleError) as error:
            self._shut(error)

    async def _handle(self, frame: bytes) -> None:
        envelope, body = self._talk.hear(frame)
        fds = self._fds_of(envelope.fds)
        if envelope.answers in self._pending:
            self._answer(self._pending[envelope.answers], body, fds)
        elif isinstance(body, Ping):
            self._post(Pong(), envelope.number)
        elif isinstance(body, Pong) or envelope.answers in self._ended:
            _close_all(fds)  # a late answer is ordinary, and nobody waits for it
        elif isinstance(body, Invalid):
            _close_all(fds)
            if envelope.answers == 0:
                self._post(
                    Fault("invalid", f"this message is none that is understood here: {body.reason}"),
                    envelope.number,
                )
        else:
            try:
                while len(self._inbox) >= INBOX_MESSAGES_MAX:
                    self._inbox_taken.clear()
                    await self._inbox_taken.wait()
            except asyncio.CancelledError:
                _close_all(fds)
                raise
            self._inbox.append(Received(envelope.number, envelope.answers, body, tuple(fds)))
            self._inbox_filled.set()

    def _answer(self, waiter: asyncio.Future[Any], body: Any, fds: list[int]) -> None:
        if len(self._answer_fds) + len(fds) > FDS_WAITING_MAX:
            _close_all(fds)
            raise RemoteProtocolError(f"{self.peer} sent more descriptors with its answers than anybody took")
        self._answer_fds += fds
        if waiter.done():  # given up in this very turn of the loop
            return
        if isinstance(body, Fault):
            waiter.set_exception(ChannelFault(body.code, body.message, body.retryable))
        elif isinstance(body, Invalid):
            waiter.set_exception(
                RemoteProtocolError(
                    f"the answer of {self.peer} is none that is understood here: {body.reason}"
                )
            )
        else:
            waiter.set_result(body)

    def _fds_of(self, count: int) -> list[int]:
        """The kernel hands descriptors over no later than the first byte they came with, perhaps earlier."""
        if not count:
            return []
        self._arrived_fds += self._stream.take_fds()
        if len(self._arrived_fds) < count:
            raise RemoteProtocolError(
                f"{self.peer} announced {count} descriptors and sent {len(self._arrived_fds)}"
            )
        return [self._arrived_fds.popleft() for _ in range(count)]

    # --- ending -------------------------------------------------------------------------------------------------

    def _shut(self, why: InterlockError) -> None:
        if self._closed is not None:
            return
        self._closed = why
        self._stream.close()
        for waiter in self._pending.values():
            if not waiter.done():
                waiter.set_exception(_closed_by(why))
        for item in (*self._in_flight, *self._outbox):
            if item.sent is not None and not item.sent.done():
                item.sent.set_exception(_closed_by(why))
        self._outbox.clear()
        self._outbox_empty.set()
        self._inbox_filled.set()
        me = asyncio.current_task()
        for task in self._tasks:
            if task is not me:
                task.cancel()
        _close_all([*self._arrived_fds, *self.take_fds()])


def _closed_by(why: InterlockError) -> ChannelClosed:
    closed = ChannelClosed(str(why))
    closed.__cause__ = why
    return closed


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)

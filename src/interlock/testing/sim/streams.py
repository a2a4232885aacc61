"""Both ends of a simulated connection, and the two pipes between them.

A pipe keeps its bytes in order and takes as long as it likes; a cut holds bytes back, a reset loses what was under way. Which of it
happens, and when, is the network's (`network.py`).
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from interlock.host.base import Peer, Watch

if TYPE_CHECKING:
    from interlock.testing.sim.kernel import SimProcess
    from interlock.testing.sim.network import Network

WINDOW_BYTES = 64 * 1024
"""What a pipe takes before its writer waits: a kernel's socket buffer, made small so that it matters."""


class _Piece(msgspec.Struct):
    at_s: float
    data: bytes | None
    """None: the writer closed."""
    things: list[Any]


class Pipe:
    """One direction of one connection."""

    def __init__(self, network: Network, source: SimStream, target: SimStream) -> None:
        self._network, self._source, self._target = network, source, target
        self._pieces: deque[_Piece] = deque()
        self._bytes = 0
        self._last_s = 0.0
        self._pump_at: float | None = None
        self.void = False
        """Nothing that enters comes out: the other side of a half-open connection."""
        self.factor = network.kernel.rng.choice((0.3, 1.0, 1.0, 3.0))

    @property
    def ends(self) -> tuple[str, str]:
        return self._source.process.name, self._target.process.name

    @property
    def room(self) -> int:
        window = max(WINDOW_BYTES, self._target.wanted)
        return window - self._bytes - len(self._target.buffer)

    def put(self, data: bytes | None, things: list[Any]) -> None:
        delay = self._network.delay_s(self.ends) * self.factor
        self._last_s = max(self._last_s, self._network.now_s + delay)
        self._pieces.append(_Piece(self._last_s, data, things))
        self._bytes += len(data or b"")
        self.pump()

    def drop(self) -> None:
        self._pieces.clear()
        self._bytes = 0

    def pump(self) -> None:
        """Delivers what is due; arms a timer for the rest, unless the way is cut."""
        while self._pieces and not self._network.is_cut(self.ends):
            piece = self._pieces[0]
            if piece.at_s > self._network.now_s:
                if self._pump_at != piece.at_s:
                    self._pump_at = piece.at_s
                    self._network.kernel.loop.later(piece.at_s - self._network.now_s, self.pump)
                return
            self._pieces.popleft()
            self._bytes -= len(piece.data or b"")
            if self.void:
                continue
            if self._target.gone:
                self._source.break_off("the peer has closed")
                return
            self._target.arrive(piece.data, piece.things)


class SimStream:
    """`Stream` of the host seam, over two pipes."""

    def __init__(self, network: Network, process: SimProcess, address: str) -> None:
        self._network, self.process, self._address = network, process, address
        self.buffer = bytearray()
        self.wanted = 0
        """More bytes at once than the window holds: their reader takes them out of it as they come."""
        self.gone = False
        self.out: Pipe
        self.other: SimStream
        self._fds: list[int] = []
        self._eof = False
        self._error: ConnectionError | None = None
        self._sending = asyncio.Lock()
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._key = network.next_key()
        process.streams[self._key] = self

    @property
    def peer(self) -> Peer:
        pid = self.other.process.pid if self._near else None
        return Peer(self._address, pid, os.getuid())

    @property
    def _near(self) -> bool:
        return self.other.process.machine is self.process.machine

    async def send(self, data: bytes | bytearray | memoryview, fds: Sequence[int] = ()) -> None:
        async with self._sending:
            rest = memoryview(bytes(data))
            things = [self.process.fds[fd] for fd in fds]
            while rest:
                self._check()
                room = self.out.room
                if room <= 0:
                    self._writable = self._network.kernel.loop.create_future()
                    await self._writable
                    continue
                self.out.put(bytes(rest[:room]), things)
                rest, things = rest[room:], []

    async def receive_exactly(self, count: int) -> bytes:
        while len(self.buffer) < count:
            self.check_readable()
            self.want(count)
            try:
                await self.when_readable()
            finally:
                self._readable = None
        return self.take(count)

    # --- for a thread, which waits by itself (`threads.py`) ---------------------------------------------------------

    def put_some(self, data: memoryview, fds: Sequence[int]) -> int:
        """How many bytes left; 0 when there is no room."""
        self._check()
        room = self.out.room
        if room <= 0:
            return 0
        self.out.put(bytes(data[:room]), [self.process.fds[fd] for fd in fds])
        return min(room, len(data))

    def check_readable(self) -> None:
        """Raises what a read beyond the buffer would."""
        if self.gone:
            raise ConnectionAbortedError("this side closed the stream")
        if self._error is not None:
            raise self._error
        if self._eof:
            raise EOFError(f"{self._address}: the peer closed the connection")

    def want(self, count: int) -> None:
        """Somebody waits for so many bytes."""
        if count > self.wanted:
            self.wanted = count
            self.other.wake_writer()

    def when_readable(self) -> asyncio.Future[None]:
        assert self._readable is None, "one reads a stream at a time"
        self._readable = self._network.kernel.loop.create_future()
        return self._readable

    def when_writable(self) -> asyncio.Future[None]:
        self._writable = self._network.kernel.loop.create_future()
        return self._writable

    def no_longer(self, waiter: asyncio.Future[None]) -> None:
        if self._readable is waiter:
            self._readable = None

    def take(self, count: int) -> bytes:
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        self.wanted = 0
        self.other.wake_writer()
        return taken

    # --- both ------------------------------------------------------------------------------------------------------

    def take_fds(self) -> list[int]:
        taken, self._fds = self._fds, []
        return taken

    def watch_peer(self) -> Watch | None:
        from interlock.testing.sim.host import SimWatch

        self._check()
        return SimWatch(self.other.process, self.process) if self._near else None

    def close(self) -> None:
        if self.gone:
            return
        self._leave()
        error = ConnectionAbortedError("this side closed the stream")
        for waiter in (self._readable, self._writable):
            if waiter is not None and not waiter.done():
                waiter.set_exception(error)
        for fd in self.take_fds():
            self.process.close_fd(fd)

    # --- the kernel's side -----------------------------------------------------------------------------------------

    def arrive(self, data: bytes | None, things: list[Any]) -> None:
        if data is None:
            self._eof = True
        else:
            self.buffer += data
            self._fds += [self.process.install_fd(thing) for thing in things]
        self._wake(self._readable)

    def wake_writer(self) -> None:
        self._wake(self._writable)

    def break_off(self, why: str) -> None:
        """A reset arrives here: what was not read is lost."""
        if self.gone or self._error is not None:
            return
        self._error = ConnectionResetError(why)
        self.out.drop()
        self._wake(self._readable)
        self._wake(self._writable)

    def vanish(self) -> None:
        """Its process is dead: the kernel closes it."""
        if not self.gone:
            self._leave()

    def _leave(self) -> None:
        self.gone = True
        self.process.streams.pop(self._key, None)
        if (
            self.buffer and not self.other.gone
        ):  # unread bytes: the peer gets a reset, and perhaps not our last words
            self.out.drop()
            self._network.kernel.loop.later(
                self._network.delay_s(self.out.ends), self.other.break_off, "the connection was reset"
            )
        else:
            self.out.put(None, [])
        self.other.wake_writer()

    def _check(self) -> None:
        if self.gone:
            raise ConnectionAbortedError("this side closed the stream")
        if self._error is not None:
            raise self._error

    def _wake(self, waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

"""Simulated connections: late, slow, cut in one direction or both, reset, half-open, and overtaken by their successors.

Each connection is two pipes, one a direction. A pipe keeps its bytes in order and takes as long as it likes; two connections
between the same processes share nothing, so a new one may be served while the old one's bytes are still under way. A cut holds
bytes back (they arrive when it heals, as TCP would send them again); a reset loses what was under way; half-open means that one
side was told of the end and the other never will be.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from interlock.core.limits import CONNECTIONS_MAX
from interlock.host.base import Peer, Stream, Watch
from interlock.testing.sim.loop import PROCESS

if TYPE_CHECKING:
    from interlock.testing.sim.kernel import Kernel, Machine, SimProcess

WINDOW_BYTES = 64 * 1024
"""What a pipe takes before its writer waits: a kernel's socket buffer, made small so that it matters."""
_log = logging.getLogger(__name__)


class _Piece(msgspec.Struct):
    at_s: float
    data: bytes | None
    """None: the writer closed."""
    things: list[Any]


class _Pipe:
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
        return WINDOW_BYTES - self._bytes - len(self._target.buffer)

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
        self.gone = False
        self.out: _Pipe
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


class SimListener:
    """`Listener` of the host seam."""

    def __init__(
        self, network: Network, process: SimProcess, address: str, serve: Callable[[Stream], Awaitable[None]]
    ) -> None:
        self._network, self.process, self._address, self._serve = network, process, address, serve
        self._tasks: set[asyncio.Task[None]] = set()
        process.listeners[address] = self

    @property
    def address(self) -> str:
        return self._address

    def accept(self, stream: SimStream) -> None:
        if len(self._tasks) >= CONNECTIONS_MAX:
            stream.vanish()
            return
        task = self.process.run(lambda: self._run(stream), f"serve {self._address}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard, context=self.process.context.copy())

    async def _run(self, stream: SimStream) -> None:
        try:
            await self._serve(stream)
        except Exception:
            _log.exception("%s: the handler of a connection failed", self._address)
        finally:
            stream.close()

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.vanish()

    def vanish(self) -> None:
        self.process.listeners.pop(self._address, None)
        self._network.forget(self)


class Network:
    """All connections. Addresses of `unix:` are found on every machine: a stand-in for TCP until fleets speak it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.delay_max_s = 0.004
        self.slow: dict[tuple[str, str], float] = {}
        """(from, to) → factor of the delay."""
        self._cuts: dict[tuple[str, str], int] = {}
        self._listeners: dict[str, SimListener] = {}
        self._pipes: list[_Pipe] = []
        self._healed: list[asyncio.Future[None]] = []
        self._keys = 0

    @property
    def now_s(self) -> float:
        return self.kernel.loop.time()

    def next_key(self) -> int:
        self._keys += 1
        return self._keys

    def delay_s(self, ends: tuple[str, str]) -> float:
        rng = self.kernel.rng
        usual = rng.random() * self.delay_max_s
        if rng.random() < 0.02:
            usual *= 25.0
        return usual * self.slow.get(ends, 1.0)

    def is_cut(self, ends: tuple[str, str]) -> bool:
        return ends in self._cuts

    # --- what hosts ask --------------------------------------------------------------------------------------------

    async def listen(
        self, process: SimProcess, address: str, serve: Callable[[Stream], Awaitable[None]]
    ) -> SimListener:
        if address in self._listeners:
            raise FileExistsError(
                f"{address}: another process listens there; stop it or use another directory"
            )
        listener = self._listeners[address] = SimListener(self, process, address, serve)
        return listener

    async def connect(self, process: SimProcess, address: str) -> SimStream:
        await asyncio.sleep(self.delay_s((process.name, address)))
        listener = self._listeners.get(address)
        if listener is None:
            raise ConnectionRefusedError(f"{address}: nobody listens there")
        there = listener.process
        while self.is_cut((process.name, there.name)) or self.is_cut((there.name, process.name)):
            healed = self.kernel.loop.create_future()
            self._healed.append(healed)
            await healed
        if there.dead or self._listeners.get(address) is not listener:
            raise ConnectionRefusedError(f"{address}: nobody listens there any more")
        here, far = SimStream(self, process, address), SimStream(self, there, address)
        here.other, far.other = far, here
        here.out, far.out = _Pipe(self, here, far), _Pipe(self, far, here)
        self._pipes += [here.out, far.out]
        if len(self._pipes) > 512:
            self._pipes = [pipe for pipe in self._pipes if not (pipe._source.gone and pipe._target.gone)]
        delay = self.delay_s((process.name, there.name))
        self.kernel.loop.later(delay, self._accept, listener, far)
        return here

    def _accept(self, listener: SimListener, stream: SimStream) -> None:
        if not listener.process.dead and not stream.gone:
            listener.accept(stream)

    def forget(self, listener: SimListener) -> None:
        if self._listeners.get(listener.address) is listener:
            del self._listeners[listener.address]

    # --- faults ----------------------------------------------------------------------------------------------------

    def cut(self, source: str, target: str) -> None:
        """Nothing gets from `source` to `target` until `heal`."""
        self._cuts[source, target] = self._cuts.get((source, target), 0) + 1

    def heal(self, source: str, target: str) -> None:
        left = self._cuts.get((source, target), 0) - 1
        if left > 0:
            self._cuts[source, target] = left
            return
        self._cuts.pop((source, target), None)
        for pipe in self._pipes:
            if pipe.ends == (source, target):
                pipe.pump()
        waiting, self._healed = self._healed, []
        for healed in waiting:
            if not healed.done():
                healed.set_result(None)

    def break_connections(self, one: str, other: str, *, told: str) -> int:
        """Resets every connection between the two. `told`: "both", or "one": the other never hears of it."""
        count = 0
        for process in (self.kernel.processes.get(one),):
            for stream in list(process.streams.values()) if process is not None else ():
                if stream.other.process.name != other:
                    continue
                count += 1
                stream.break_off("the connection was reset")
                if told == "both":
                    delay = self.kernel.rng.random() * 0.2
                    self.kernel.loop.later(delay, stream.other.break_off, "the connection was reset")
                else:
                    stream.other.out.void = True
                stream.out.void = True
        return count


def current_machine() -> Machine | None:
    process = PROCESS.get()
    return process.machine if process is not None else None

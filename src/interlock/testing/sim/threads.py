"""Blocking code on the simulated machine: a real thread for each simulated one, of which exactly one runs at a time.

A thread runs until it would block; then it hands over to the loop and is resumed, as a task of its process, when what it
waits for has come or its deadline has passed. So it is shuffled, frozen and killed like any task, and the same seed runs the
same steps. Before it takes a lock it may step aside, which is where a real thread could be interrupted and it would matter.

`blocking_seam` stands in for what `store/client`, `store/keeper`, `wire/blocking` and `store/mapping` take of `host/threads`,
`host/blocking` and `host/memory`, for code that runs in a simulated process.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from interlock.host import blocking, memory
from interlock.host import threads as real
from interlock.host.base import Peer, Watch
from interlock.testing.sim.kernel import ProcessEnded
from interlock.testing.sim.loop import PROCESS, Wedged

if TYPE_CHECKING:
    from interlock.testing.sim.host import MemoryHandle
    from interlock.testing.sim.kernel import SimProcess
    from interlock.testing.sim.streams import SimStream

STEP_SECONDS_MAX = 60.0
"""Of real time: a step that takes longer waits for something that is not simulated."""
STEPS_ASIDE = 0.3
_THREAD: contextvars.ContextVar[SimThread | None] = contextvars.ContextVar("simulated thread", default=None)


class SimThread:
    """One thread of a simulated process. `await run()` is its life; it may be awaited once."""

    def __init__(self, process: SimProcess, name: str, function: Callable[[], Any]) -> None:
        self.process, self.name, self._function = process, name, function
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._waits: tuple[asyncio.Future[Any] | None, float | None] | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._killed = self.ended = False
        self._joiners: list[asyncio.Future[None]] = []
        context = process.context.copy()
        context.run(_THREAD.set, self)
        self._thread = threading.Thread(target=context.run, args=(self._body,), name=name, daemon=True)
        process.kernel.threads.append(self)

    async def run(self) -> Any:
        """Raises what the function raises."""
        self._thread.start()
        while True:
            self._switch()
            if self.ended:
                break
            assert self._waits is not None
            await _until(*self._waits)
        for joiner in self._joiners:
            if not joiner.done():
                joiner.set_result(None)
        if self._error is not None:
            raise self._error
        return self._result

    def kill(self) -> None:
        """After a run: unwinds the thread, whatever it waits for. Nobody hears what it does meanwhile."""
        if self._thread.ident is None or self.ended:
            return
        self._killed = True
        self._switch()
        self._thread.join(STEP_SECONDS_MAX)

    def join(self, timeout: float | None = None) -> None:
        """As `threading.Thread.join`, called by another simulated thread."""
        if not self.ended:
            done: asyncio.Future[None] = self.process.kernel.loop.create_future()
            self._joiners.append(done)
            current_thread().park(done, timeout)

    def is_alive(self) -> bool:
        return not self.ended

    # --- in the thread ---------------------------------------------------------------------------------------------

    def park(self, future: asyncio.Future[Any] | None, timeout_s: float | None) -> bool:
        """Waits for `future` (None: for time alone); False when the time was over first."""
        if not self._killed:
            loop = self.process.kernel.loop
            self._waits = future, None if timeout_s is None else loop.time() + max(0.0, timeout_s)
            self._back.release()
            self._go.acquire()
        if self._killed:
            raise ProcessEnded
        return future is not None and future.done()

    def _body(self) -> None:
        self._go.acquire()
        try:
            if not self._killed:
                self._result = self._function()
        except ProcessEnded:
            pass
        except BaseException as error:  # it is the loop's side that raises it
            self._error = error
        self.ended = True
        self._back.release()

    def _switch(self) -> None:
        self._go.release()
        if not self._back.acquire(timeout=STEP_SECONDS_MAX):
            raise Wedged(
                f"the thread {self.name} of {self.process} waits for something that is not simulated"
            )


async def _until(future: asyncio.Future[Any] | None, at_s: float | None) -> None:
    loop = asyncio.get_running_loop()
    gate: asyncio.Future[None] = loop.create_future()

    def open_gate(_: object = None) -> None:
        if not gate.done():
            gate.set_result(None)

    timer = None if at_s is None else loop.call_at(at_s, open_gate)
    if future is not None:
        future.add_done_callback(open_gate)
    await gate
    if future is not None:
        future.remove_done_callback(open_gate)
        if future.done() and not future.cancelled():
            future.exception()  # looked at by whoever waits for it
    if timer is not None:
        timer.cancel()


def current_thread() -> SimThread:
    """The simulated thread whose code runs now."""
    thread = _THREAD.get()
    assert thread is not None, "only a simulated thread may block"
    return thread


# --- host/threads ----------------------------------------------------------------------------------------------------------


class SimLock:
    """`threading.Lock`; first come, first served."""

    def __init__(self) -> None:
        self._held = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        thread = _THREAD.get()
        if thread is None:  # a task of the process, or the simulator, between two steps of threads
            assert not self._held, "a task would block its loop here"
            self._held = True
            return True
        if blocking and thread.process.kernel.rng.random() < STEPS_ASIDE:
            thread.park(None, 0.0)
        if not self._held:
            self._held = True
            return True
        if not blocking:
            return False
        turn: asyncio.Future[None] = thread.process.kernel.loop.create_future()
        self._waiting.append(turn)
        try:
            if thread.park(turn, None if timeout < 0 else timeout):
                return True  # the lock was handed over
        except ProcessEnded:
            self._held = True  # it is released while everything unwinds
            raise
        self._waiting.remove(turn)
        return False

    def release(self) -> None:
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self._held = False

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class SimCondition(SimLock):
    """`threading.Condition` with its own lock."""

    def __init__(self) -> None:
        super().__init__()
        self._sleepers: list[asyncio.Future[None]] = []

    def wait(self, timeout: float | None = None) -> bool:
        thread = current_thread()
        told: asyncio.Future[None] = thread.process.kernel.loop.create_future()
        self._sleepers.append(told)
        self.release()
        heard = thread.park(told, timeout)
        if not heard:
            self._sleepers.remove(told)
        self.acquire()
        return heard

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        until_s = None if timeout is None else monotonic_s() + timeout
        while not (found := predicate()):
            left_s = None if until_s is None else until_s - monotonic_s()
            if left_s is not None and left_s <= 0:
                break
            self.wait(left_s)
        return found

    def notify(self, n: int = 1) -> None:
        for told in self._sleepers[:n]:
            told.set_result(None)
        del self._sleepers[:n]

    def notify_all(self) -> None:
        self.notify(len(self._sleepers))


def monotonic_s() -> float:
    process = PROCESS.get()
    return real.monotonic_s() if process is None else float(process.host.clock.monotonic_s())


def sleep_s(seconds: float) -> None:
    current_thread().park(None, seconds)


def start_thread(name: str, function: Callable[[], None]) -> Any:
    process = PROCESS.get()
    if process is None:
        return real.start_thread(name, function)
    thread = SimThread(process, name, function)
    process.run(thread.run, name)
    return thread


# --- host/blocking, host/memory ----------------------------------------------------------------------------------------------


class SimBlockingStream:
    """`BlockingStream` over a simulated one. Deadlines are on the process's monotonic clock."""

    def __init__(self, stream: SimStream) -> None:
        self._stream = stream

    @property
    def peer(self) -> Peer:
        return self._stream.peer

    @property
    def buffered_bytes(self) -> int:
        return len(self._stream.buffer)

    def send(self, data: bytes | bytearray | memoryview, deadline_s: float, fds: Sequence[int] = ()) -> None:
        rest = memoryview(bytes(data))
        while rest:
            taken = self._stream.put_some(rest, fds)
            rest, fds = rest[taken:], fds if not taken else ()
            if not taken:
                self._wait(self._stream.when_writable(), deadline_s, "to be written to")

    def receive_exactly(self, count: int, deadline_s: float) -> bytes:
        self._fill(count, deadline_s)
        return self._stream.take(count)

    def receive_available(self) -> None:
        self._stream.check_readable()

    def peek(self, count: int, deadline_s: float) -> bytes:
        self._fill(count, deadline_s)
        return bytes(self._stream.buffer[:count])

    def take_fds(self) -> list[int]:
        return self._stream.take_fds()

    def watch_peer(self) -> Watch | None:
        return self._stream.watch_peer()

    def close(self) -> None:
        self._stream.close()

    def _fill(self, count: int, deadline_s: float) -> None:
        while len(self._stream.buffer) < count:
            self._stream.check_readable()
            self._stream.want(count)
            self._wait(self._stream.when_readable(), deadline_s, "for an answer")

    def _wait(self, future: asyncio.Future[None], deadline_s: float, purpose: str) -> None:
        try:
            came = current_thread().park(future, deadline_s - monotonic_s())
        finally:
            self._stream.no_longer(future)
        if not came:
            raise TimeoutError(f"{self.peer.address}: waited {purpose} until the deadline")


def connect_blocking(address: str, deadline_s: float) -> Any:
    process = PROCESS.get()
    if process is None:
        return blocking.connect_blocking(address, deadline_s)
    dialling = process.run(lambda: process.kernel.network.connect(process, address), f"dial {address}")
    if not current_thread().park(dialling, deadline_s - monotonic_s()):
        dialling.cancel()
        raise TimeoutError(f"{address}: no connection until the deadline")
    return SimBlockingStream(dialling.result())


class SimMapped:
    """`MappedMemory`, of a descriptor that came with a message."""

    def __init__(self, handle: MemoryHandle) -> None:
        self.view = memoryview(handle.pages.data)
        if not handle.writable:
            self.view = self.view.toreadonly()

    def close(self) -> None:
        """The pages stay as long as anybody looks at them."""


def map_memory(fd: int, size_bytes: int, *, writable: bool) -> Any:
    process = PROCESS.get()
    if process is None:
        return memory.map_memory(fd, size_bytes, writable=writable)
    handle: MemoryHandle = process.host.map_memory(fd)
    if len(handle.pages.data) < size_bytes:
        raise ValueError(f"the shared memory received holds {len(handle.pages.data)} bytes, not {size_bytes}")
    return SimMapped(handle)


def _lock() -> Any:
    return real.Lock() if PROCESS.get() is None else SimLock()


def _condition() -> Any:
    return real.Condition() if PROCESS.get() is None else SimCondition()


SEAM = {
    "interlock.store.client": ("Lock", "monotonic_s"),
    "interlock.store.keeper": ("Condition", "monotonic_s", "start_thread"),
    "interlock.store.mapping": ("map_memory",),
    "interlock.wire.blocking": ("Lock", "connect_blocking", "monotonic_s"),
}
"""Which names of which modules stand for the machine."""
STAND_INS: dict[str, Callable[..., Any]] = {
    "Lock": _lock,
    "Condition": _condition,
    "monotonic_s": monotonic_s,
    "start_thread": start_thread,
    "connect_blocking": connect_blocking,
    "map_memory": map_memory,
}


@contextlib.contextmanager
def blocking_seam() -> Iterator[None]:
    """Outside of simulated processes everything stays as it is."""
    with contextlib.ExitStack() as stack:
        for module_name, names in SEAM.items():
            module = importlib.import_module(module_name)
            for name in names:
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, STAND_INS[name])
        yield

"""`SimHost`: the seam of `host/base.py`, answered by the simulated kernel, one for each simulated process.

Beside the seam, drivers call four things of the standard library directly: `os.close` (descriptors that came with
messages), `os.getpid`, `os.urandom` and `random`. `simulated_os` answers those, too, for as long as a simulation runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from interlock.host.base import Child, Files, Listener, Stream
from interlock.testing.sim.directories import SimDirectory
from interlock.testing.sim.disk import SystemCalls, files_on
from interlock.testing.sim.kernel import FD_FIRST, KILLED, Kernel, ProcessEnded, SimProcess, running_pid
from interlock.testing.sim.loop import PROCESS
from interlock.testing.sim.streams import SimStream

T = TypeVar("T")
THREAD_SECONDS_MAX = 0.003


class SimClock:
    """Virtual time, counted from this machine's boot; its wall clock may step back."""

    def __init__(self, process: SimProcess) -> None:
        self._process = process

    def monotonic_s(self) -> float:
        return self._process.kernel.loop.time() + self._process.machine.boot_s

    def wall_ns(self) -> int:
        return self._process.machine.wall_ns + int(self._process.kernel.loop.time() * 1e9)

    async def sleep_s(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class SimWatch:
    """Proof of exit: the kernel's own knowledge of one process."""

    def __init__(self, watched: SimProcess, watcher: SimProcess) -> None:
        self._watched, self._watcher = watched, watcher
        self._closed = False

    @property
    def pid(self) -> int:
        return self._watched.pid

    @property
    def exited(self) -> bool:
        return self._watched.dead

    async def wait_exited(self) -> None:
        if self._closed:
            raise ConnectionAbortedError("this watch was closed")
        if not self._watched.dead:
            exit_seen: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._watched.watchers.append(exit_seen)
            await exit_seen

    def kill(self) -> None:
        self._watched.end(KILLED)
        if self._watched is self._watcher:
            raise ProcessEnded

    def close(self) -> None:
        self._closed = True


class Pages:
    """The bytes of one memfd: they live as long as anybody holds them."""

    def __init__(self, size_bytes: int) -> None:
        self.data = bytearray(size_bytes)


class MemoryHandle:
    """What a descriptor of shared memory refers to."""

    def __init__(self, pages: Pages, *, writable: bool) -> None:
        self.pages, self.writable = pages, writable


class SimMemory:
    """`SharedMemory` of the seam."""

    def __init__(self, process: SimProcess, pages: Pages) -> None:
        self._process, self._pages = process, pages
        self._fd: int | None = process.install_fd(MemoryHandle(pages, writable=True))

    @property
    def size_bytes(self) -> int:
        return len(self._pages.data)

    @property
    def view(self) -> memoryview:
        return memoryview(self._pages.data)

    @property
    def fd(self) -> int:
        if self._fd is None:
            raise ValueError("this shared memory is closed")
        return self._fd

    def read_into(self, offset: int, into: memoryview) -> None:
        into[:] = self._pages.data[offset : offset + len(into)]

    def write_at(self, offset: int, data: memoryview) -> None:
        self._pages.data[offset : offset + len(data)] = data

    def open_read_only(self) -> int:
        return self._process.install_fd(MemoryHandle(self._pages, writable=False))

    def close(self) -> None:
        if self._fd is not None:
            self._process.close_fd(self._fd)
            self._fd = None


class SimHost:
    """One simulated process's view of its machine."""

    def __init__(self, process: SimProcess) -> None:
        self.process = process
        self._clock = SimClock(process)
        self._calls = SystemCalls(process.machine.disk, process, entropy_of(process.kernel))
        self._files = files_on(self._calls)

    @property
    def clock(self) -> SimClock:
        return self._clock

    @property
    def files(self) -> Files:
        return self._files

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        rng = self.process.kernel.rng
        await asyncio.sleep(rng.random() * THREAD_SECONDS_MAX)
        self.process.thread_owes_s = 0.0
        try:
            result = function(*args)
        finally:
            late_s, self.process.thread_owes_s = self.process.thread_owes_s, None
        await asyncio.sleep(late_s + rng.random() * THREAD_SECONDS_MAX)
        return result

    async def listen(self, address: str, serve: Callable[[Stream], Awaitable[None]]) -> Listener:
        return await self.process.kernel.network.listen(self.process, address, serve)

    async def connect(self, address: str) -> SimStream:
        return await self.process.kernel.network.connect(self.process, address)

    def open_directory(self, path: Path, owner: str) -> SimDirectory:
        return SimDirectory(self.process, path, owner)

    def create_memory(self, name: str, size_bytes: int) -> SimMemory:
        if size_bytes <= 0:
            raise ValueError(f"shared memory {name!r} of {size_bytes} bytes: the size must be positive")
        return SimMemory(self.process, Pages(size_bytes))

    def map_memory(self, fd: int) -> MemoryHandle:
        """What the descriptor refers to; the descriptor is closed, the memory stays mapped."""
        handle: MemoryHandle = self.process.fds[fd]
        self.process.close_fd(fd)
        return handle

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str], log: Path | None, pass_fds: Sequence[int] = ()
    ) -> Child:
        raise NotImplementedError("simulated processes are started by their world, not by each other")

    def watch(self, pid: int) -> SimWatch:
        found = self.process.kernel.find(self.process.machine, pid)
        if found is None:
            raise ProcessLookupError(f"no process {pid} on {self.process.machine.name}")
        return SimWatch(found, self.process)


def entropy_of(kernel: Kernel) -> Callable[[int], bytes]:
    def entropy(count: int) -> bytes:
        return bytes(kernel.rng.getrandbits(8) for _ in range(count))

    return entropy


@contextlib.contextmanager
def simulated_os(kernel: Kernel) -> Iterator[None]:
    """While it lasts, `os.close`, `os.getpid`, `os.urandom`, `secrets` and `random` answer from the simulation."""
    before = os.close, os.getpid, os.urandom, secrets.token_hex, random.getstate()
    entropy = entropy_of(kernel)

    def close(fd: int) -> None:
        process = PROCESS.get()
        if fd >= FD_FIRST and process is not None:
            process.close_fd(fd)
        else:
            before[0](fd)

    os.close, os.getpid, os.urandom = close, running_pid, entropy
    secrets.token_hex = lambda nbytes=None: entropy(nbytes or 16).hex()
    random.seed(kernel.rng.getrandbits(32))
    try:
        yield
    finally:
        os.close, os.getpid, os.urandom, secrets.token_hex = before[:4]
        random.setstate(before[4])

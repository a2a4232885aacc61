"""`RealHost`: what drivers ask of the machine, answered by Linux. Sockets, processes, memory, files have a module each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from interlock.core.limits import HOST_THREADS_MAX
from interlock.host.base import Listener, Stream
from interlock.host.disk import RealDirectory
from interlock.host.files import RealFiles
from interlock.host.memory import MappedMemory, create_memory
from interlock.host.processes import RealChild, spawn_child
from interlock.host.streams import SocketStream, connect_stream, listen
from interlock.host.watch import ProcessWatch

T = TypeVar("T")


class RealClock:
    """`Clock` on Linux."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_ns(self) -> int:
        return time.time_ns()

    async def sleep_s(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class RealHost:
    """One a process. Its threads start when they are first needed."""

    def __init__(self) -> None:
        self._clock = RealClock()
        self._files = RealFiles()
        self._threads = ThreadPoolExecutor(HOST_THREADS_MAX, thread_name_prefix="host")

    @property
    def clock(self) -> RealClock:
        return self._clock

    @property
    def files(self) -> RealFiles:
        return self._files

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def listen(self, address: str, serve: Callable[[Stream], Awaitable[None]]) -> Listener:
        return await listen(address, serve)

    async def connect(self, address: str) -> SocketStream:
        return await connect_stream(address)

    def open_directory(self, path: Path, owner: str) -> RealDirectory:
        return RealDirectory(path, owner)

    def create_memory(self, name: str, size_bytes: int) -> MappedMemory:
        return create_memory(name, size_bytes)

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path | None,
        pass_fds: Sequence[int] = (),
    ) -> RealChild:
        # Not in a thread: a caller that is cancelled meanwhile would leave a child that nobody knows.
        return spawn_child(argv, env=env, log=log, pass_fds=pass_fds)

    def watch(self, pid: int) -> ProcessWatch:
        return ProcessWatch.of(pid)

    def close(self) -> None:
        """Lets go of the threads; calls still waiting for one are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

"""Simulated machines and processes: who runs, who is frozen, who is proven gone, and what each of them holds.

Death is the kernel's word alone: `SimProcess.end` closes what the process held, frees its addresses, and tells those who
watch it. None of its code runs any more. A pid may be given again, as pids are.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import logging
import os
import random
import warnings
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from interlock.testing.sim.disk import SimDisk
from interlock.testing.sim.loop import PROCESS, SimLoop

if TYPE_CHECKING:
    from interlock.testing.sim.host import SimHost
    from interlock.testing.sim.network import Network, SimListener
    from interlock.testing.sim.streams import SimStream
    from interlock.testing.sim.threads import SimThread

FD_FIRST = 1_000_000
EXIT_SEEN_SECONDS_MAX = 0.05
"""How long after an exit a loop hears of it from its pidfd."""
KILLED = -9
CLOSES_MAX = 32


class ProcessEnded(BaseException):
    """The running process has just died inside a system call: unwind its step."""


class Status(StrEnum):
    RUNNING = "running"
    FROZEN = "frozen"
    DEAD = "dead"


class Machine:
    """One computer: a disk, a wall clock that may step, and a boot time of its own."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel, self.name = kernel, name
        self.disk = SimDisk(random.Random(kernel.rng.random()))
        self.boot_s = kernel.rng.uniform(10.0, 1e6)
        self.wall_ns = 1_790_000_000_000_000_000 + kernel.rng.randrange(10**9)
        self.processes: dict[int, SimProcess] = {}


class SimProcess:
    """One process. `main` gets its host; what it returns is the exit status."""

    def __init__(self, machine: Machine, name: str, pid: int) -> None:
        self.machine, self.name, self.pid = machine, name, pid
        self.kernel = machine.kernel
        self.status = Status.RUNNING
        self.exit_status: int | None = None
        self.failure: Exception | None = None
        """What `main` raised."""
        self.held: list[asyncio.Handle] = []
        self.fds: dict[int, Any] = {}
        self.streams: dict[int, SimStream] = {}
        self.listeners: dict[str, SimListener] = {}
        self.watchers: list[asyncio.Future[None]] = []
        self.on_exit: Callable[[SimProcess], None] = lambda _: None
        self.host: SimHost
        self.die_at_disk: str | None = None
        """The next system call of that name is the last thing this process does."""
        self.thread_owes_s: float | None = None
        """How long the disk has kept the function that runs `in_thread` now; None: none does."""
        self._stalls = 0
        self.context = contextvars.Context()
        self.context.run(PROCESS.set, self)
        self._tasks: list[asyncio.Task[Any]] = []
        self._purge_at = 256

    def __repr__(self) -> str:
        return f"{self.name}[{self.pid}]"

    @property
    def dead(self) -> bool:
        return self.status is Status.DEAD

    @property
    def frozen(self) -> bool:
        return self.status is Status.FROZEN or self._stalls > 0

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        return self._tasks

    def adopt(self, task: asyncio.Task[Any]) -> None:
        self._tasks.append(task)
        if len(self._tasks) > self._purge_at and not self.dead:
            self._tasks = [task for task in self._tasks if not task.done()]
            self._purge_at = 2 * len(self._tasks) + 256

    def run(self, work: Callable[[], Awaitable[Any]], name: str) -> asyncio.Task[Any]:
        """A task of this process, begun from outside."""

        async def body() -> Any:
            return await work()

        return self.kernel.loop.create_task(body(), name=name, context=self.context.copy())

    def freeze(self) -> None:
        """SIGSTOP."""
        if self.status is Status.RUNNING:
            self.status = Status.FROZEN
            self.kernel.note(f"{self} is frozen")

    def thaw(self) -> None:
        """SIGCONT."""
        if self.status is Status.FROZEN:
            self.status = Status.RUNNING
            self.kernel.note(f"{self} goes on")
            self.kernel.loop.release(self)

    def stall(self, seconds: float) -> None:
        """Its loop is inside a system call for so long."""
        self._stalls += 1
        self.kernel.loop.later(seconds, self._returns)

    def _returns(self) -> None:
        self._stalls -= 1
        self.kernel.loop.release(self)

    def end(self, status: int) -> None:
        """It is gone, from this moment on."""
        if self.dead:
            return
        self.status, self.exit_status = Status.DEAD, status
        self.held.clear()
        self.kernel.note(f"{self} has ended with {status}")
        self.machine.processes.pop(self.pid, None)
        for listener in list(self.listeners.values()):
            listener.vanish()
        for stream in list(self.streams.values()):
            stream.vanish()
        self.fds.clear()
        for watcher in self.watchers:
            delay = self.kernel.rng.uniform(0.0, EXIT_SEEN_SECONDS_MAX)
            self.kernel.loop.later(delay, _tell, watcher)
        self.watchers.clear()
        self.on_exit(self)

    def at_disk(self, call: str) -> None:
        if self.dead:
            raise ProcessEnded
        if self.die_at_disk == call:
            self.kernel.note(f"{self} dies in {call}()")
            self.end(KILLED)
            raise ProcessEnded
        if self.machine.disk.slow_s:
            seconds = self.kernel.rng.expovariate(1.0 / self.machine.disk.slow_s)
            if self.thread_owes_s is None:
                self.stall(seconds)
            else:
                self.thread_owes_s += seconds

    # --- descriptors -----------------------------------------------------------------------------------------------

    def install_fd(self, thing: Any) -> int:
        fd = self.kernel.next_fd()
        self.fds[fd] = thing
        return fd

    def close_fd(self, fd: int) -> None:
        """Raises OSError EBADF for a descriptor closed twice, or somebody else's."""
        if not self.dead and self.fds.pop(fd, None) is None:
            raise OSError(errno.EBADF, f"{self} closed descriptor {fd}, which it does not have")


def _tell(watcher: asyncio.Future[None]) -> None:
    if not watcher.done():
        watcher.set_result(None)


class Kernel:
    """Everything below the drivers: machines, processes, network, and the log of what happened."""

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        from interlock.testing.sim.network import Network

        self.loop, self.rng = loop, rng
        self.network: Network = Network(self)
        self.machines: dict[str, Machine] = {}
        self.lines: list[str] = []
        self.buried = False
        self.ended: list[SimProcess] = []
        self.threads: list[SimThread] = []
        self.processes: dict[str, SimProcess] = {}
        """The newest process of each name."""
        self._pid, self._fd = 100, FD_FIRST
        self._free_pids: list[tuple[str, int]] = []

    def note(self, line: str) -> None:
        if not self.buried:
            self.lines.append(f"{self.loop.time():10.4f}  {line}")

    def machine(self, name: str) -> Machine:
        if name not in self.machines:
            self.machines[name] = Machine(self, name)
        return self.machines[name]

    def next_fd(self) -> int:
        self._fd += 1
        return self._fd

    def start(
        self,
        machine: str,
        name: str,
        main: Callable[[SimHost], Awaitable[int]],
        on_exit: Callable[[SimProcess], None],
    ) -> SimProcess:
        """A process whose code is `main`."""
        from interlock.testing.sim.host import SimHost

        process = SimProcess(self.machine(machine), name, self._take_pid(machine))
        process.machine.processes[process.pid] = process
        process.host = SimHost(process)
        process.on_exit = lambda ended: self._on_exit(ended, on_exit)
        self.processes[name] = process
        self.note(f"{process} starts on {machine}")
        process.run(lambda: self._live(process, main), f"main of {name}")
        return process

    def find(self, machine: Machine, pid: int) -> SimProcess | None:
        return machine.processes.get(pid)

    async def _live(self, process: SimProcess, main: Callable[[SimHost], Awaitable[int]]) -> None:
        try:
            status = await main(process.host)
        except Exception as error:
            self.note(f"{process} failed: {type(error).__name__}: {error}")
            status, process.failure = 1, error
        process.end(status)

    def _on_exit(self, process: SimProcess, then: Callable[[SimProcess], None]) -> None:
        self.ended.append(process)
        self._free_pids.append((process.machine.name, process.pid))
        then(process)

    def _take_pid(self, machine: str) -> int:
        """Now and then a pid that a dead process of this machine had."""
        free = [item for item in self._free_pids if item[0] == machine]
        if free and self.rng.random() < 0.3:
            item = free[int(self.rng.random() * len(free))]
            self._free_pids.remove(item)
            return item[1]
        self._pid += 1
        return self._pid

    def bury(self) -> None:
        """After a run: closes what is left of all coroutines, whose `finally` blocks reach nobody any more."""
        self.buried = True
        self.loop.set_exception_handler(lambda *_: None)
        for process in [*self.ended, *self.processes.values()]:
            process.status = Status.DEAD
        for thread in self.threads:
            thread.kill()
        # A `finally` that makes a task makes it here, and in its process: without a loop that runs asyncio would set up a real one
        # for it, which outlives the run, and the run with it.
        asyncio._set_running_loop(self.loop)
        silenced = logging.root.manager.disable
        logging.disable()  # what they say about it is nobody's business
        try:
            for process in [*self.ended, *self.processes.values()]:
                process.context.copy().run(_close_all, process.tasks)
        finally:
            logging.disable(silenced)
            asyncio._set_running_loop(None)


def _close_all(tasks: list[asyncio.Task[Any]]) -> None:
    """The list grows meanwhile, by what they make."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what a dead coroutine would have awaited
        for task in tasks:
            _close(task)


def _close(task: asyncio.Task[Any]) -> None:
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine: Any = task.get_coro()
    for _ in range(CLOSES_MAX):  # one close for each `finally` that wants to wait for something
        try:
            coroutine.close()
        except BaseException:  # noqa: S112 - a dead process's last words
            continue
        return


def running_pid() -> int:
    """`os.getpid` while a simulation runs."""
    process = PROCESS.get()
    return process.pid if process is not None else os.getppid()

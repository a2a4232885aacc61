"""pytest plug-in: `pytest_plugins = ["interlock.testing.plugin"]` gives a simulated kernel, and proxies for real sockets."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from interlock.testing.proxy import FaultProxy
from interlock.testing.sim.host import simulated_os
from interlock.testing.sim.kernel import Kernel
from interlock.testing.sim.loop import SimLoop
from interlock.testing.sim.threads import blocking_seam

LINES_MAX = 100


class Simulation:
    """A kernel and its loop for one test: `kernel.start(machine, name, main, on_exit)`, then `run(story)`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.loop = SimLoop(random.Random(f"schedule {seed}"))
        self.kernel = Kernel(self.loop, random.Random(f"kernel {seed}"))
        self.loop.set_exception_handler(self._on_unhandled)
        self._unhandled: list[BaseException] = []

    def run(self, story: Callable[[], Awaitable[None]]) -> None:
        """Until `story` ends; raises what it raises, and `Wedged` when nothing can happen any more.

        Else raises what a process's `main` or one of its tasks raised and nobody has looked at: a process that fails so has ended with
        status 1 and `failure`; set that to None where it was meant to. Whatever is raised, the timeline is printed first.
        """

        async def told() -> None:
            await story()

        with simulated_os(self.kernel), blocking_seam():
            try:
                self.loop.run_until_complete(told())
                self._raise_failures()
            except BaseException:
                print(
                    f"seed {self.seed}, the last lines of its timeline:",
                    *self.kernel.lines[-LINES_MAX:],
                    sep="\n",
                )
                raise
            finally:
                self.kernel.bury()

    def _on_unhandled(self, _: object, context: dict[str, Any]) -> None:
        if isinstance(error := context.get("exception"), BaseException):
            self._unhandled.append(error)

    def _raise_failures(self) -> None:
        everybody = {*self.kernel.ended, *self.kernel.processes.values()}
        for process in sorted(everybody, key=str):
            if process.failure is not None:
                raise process.failure
        for process in self.kernel.processes.values():
            for task in () if process.dead else process.tasks:
                if task.done() and task._log_traceback and (error := task.exception()) is not None:
                    raise error
        if self._unhandled:
            raise self._unhandled[0]

    def close(self) -> None:
        self.loop.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            gc.collect()  # what its coroutines do at their end must not fall into somebody else's test, or into a compiler


@pytest.fixture
def simulation(request: pytest.FixtureRequest) -> Iterator[Simulation]:
    """Seed 0, or that of `@pytest.mark.parametrize("simulation", [seeds], indirect=True)`."""
    made = Simulation(getattr(request, "param", 0))
    yield made
    made.close()


@pytest_asyncio.fixture
async def fault_proxy() -> AsyncIterator[Callable[[str, str], Awaitable[FaultProxy]]]:
    """`await fault_proxy(front, back)`: a started `FaultProxy`, closed after the test."""
    made: list[FaultProxy] = []

    async def start(front: str, back: str) -> FaultProxy:
        proxy = FaultProxy(front, back)
        await proxy.start()
        made.append(proxy)
        return proxy

    yield start
    for proxy in made:
        await proxy.close()

"""pytest plug-in: `pytest_plugins = ["interlock.testing.plugin"]` gives a simulated kernel, and proxies for real sockets."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import pytest_asyncio

from interlock.testing.proxy import FaultProxy
from interlock.testing.sim.host import simulated_os
from interlock.testing.sim.kernel import Kernel
from interlock.testing.sim.loop import SimLoop


class Simulation:
    """A kernel and its loop for one test: `kernel.start(machine, name, main, on_exit)`, then `run(story)`."""

    def __init__(self, seed: int) -> None:
        self.loop = SimLoop(random.Random(f"schedule {seed}"))
        self.kernel = Kernel(self.loop, random.Random(f"kernel {seed}"))

    def run(self, story: Callable[[], Awaitable[None]]) -> None:
        """Until `story` ends; raises what it raises, and `Wedged` when nothing can happen any more."""

        async def told() -> None:
            await story()

        with simulated_os(self.kernel):
            try:
                self.loop.run_until_complete(told())
            finally:
                self.kernel.bury()

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

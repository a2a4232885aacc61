"""Users of the simulated store, each a tree of processes: a scheduler and its ranks, which live and die together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from interlock.testing.sim import kv, kv_client
from interlock.testing.sim.host import SimHost
from interlock.testing.sim.kernel import KILLED, SimProcess

if TYPE_CHECKING:
    from interlock.testing.sim.worlds import World


class KvTrees:
    """Starts them again when they have ended."""

    def __init__(self, world: World, restart_s: tuple[float, float]) -> None:
        self._world, self._restart_s = world, restart_s
        self._lives: dict[str, int] = {}

    def start(self, name: str) -> None:
        """A tree of processes, in one life: its ranks first, so that the scheduler can speak to them."""
        world, kernel = self._world, self._world.kernel
        engine = "-".join(name.split("-")[:2])
        if any(not p.dead for n, p in kernel.processes.items() if n == engine or n.startswith(engine + "-")):
            return
        life = self._lives[engine] = self._lives.get(engine, 0) + 1
        kind: Any = kv_client if world.shape.clients else kv
        ranks: list[kv.Rank | kv_client.Rank] = []
        complete = asyncio.Event()

        def rank_main(number: int) -> Callable[[SimHost], Awaitable[int]]:
            async def main(host: SimHost) -> int:
                rank = kind.Rank(world, host, engine, life, number, world.shape.ranks)
                ranks.append(rank)
                if len(ranks) == world.shape.ranks:
                    complete.set()
                return int(await rank.run())

            return main

        async def main(host: SimHost) -> int:
            await complete.wait()
            return int(await kind.Scheduler(world, host, engine, life, ranks).run())

        for number in range(world.shape.ranks):
            kernel.start("host-a", f"{engine}-r{number}", rank_main(number), self._ended)
        kernel.start("host-a", engine, main, self._ended)

    def _ended(self, process: SimProcess) -> None:
        """One of the tree is gone: the others linger for a while, and write on, before they are ended."""
        world, kernel = self._world, self._world.kernel
        world.forget(process)
        if world.over:
            return
        engine = "-".join(process.name.split("-")[:2])
        for name, other in kernel.processes.items():
            if not other.dead and (name == engine or name.startswith(engine + "-")):
                kernel.loop.later(kernel.rng.uniform(0.0, 3.0), other.end, KILLED)
        kernel.loop.later(kernel.rng.uniform(*self._restart_s), self._world.start, engine)

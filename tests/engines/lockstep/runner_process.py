"""A runner that starts a lockstep group, gives both ranks something long to do, and says who they are in the file `ranks`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from interlock.core.sampling import Sampling
from interlock.engines.base import Work
from interlock.engines.lockstep.engine import LockstepEngine
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.real import RealHost


async def main(model: str, home: Path) -> None:
    config = TransformersConfig(
        model=model,
        model_id="mixtral",
        name="group",
        state_dir=str(home / "state"),
        scratch_dir=str(home / "scratch"),
        log=str(home / "log"),
        data_parallel=2,
    )
    engine = LockstepEngine(RealHost(), config)
    await engine.start()

    async def read(key: str) -> None:
        work = Work.of(key, [5, 6, 7], Sampling(max_tokens=500, ignore_eos=True), "")
        async for _ in engine.generate(work):
            begun.set()

    begun = asyncio.Event()
    reading = [asyncio.create_task(read(str(n))) for n in range(2)]
    await begun.wait()
    pids = " ".join(str(child.pid) for child in engine.group.processes.children.values())
    (home / "ranks.new").write_text(pids)
    (home / "ranks.new").rename(home / "ranks")
    await asyncio.gather(*reading)
    await asyncio.Event().wait()


asyncio.run(main(sys.argv[1], Path(sys.argv[2])))

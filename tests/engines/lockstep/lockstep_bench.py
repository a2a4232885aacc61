"""Engines for the tests of lockstep groups, and what is asked of them again and again."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_models import Heard, Library, work

from interlock.engines.lockstep.engine import LockstepEngine
from interlock.engines.lockstep.group import PROGRAM
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.real import RealHost

GATED = (sys.executable, str(Path(__file__).parent / "gated_rank.py"))


def make_engine(
    library: Library, home: Path, *, program: Sequence[str] | None = None, **options: Any
) -> LockstepEngine:
    """Not started: two ranks of a Mixtral of four experts."""
    library.model("mixtral")
    (home / "scratch").mkdir(exist_ok=True)
    chosen: dict[str, Any] = {
        "model": str(library.path("mixtral")),
        "step_tokens": 32,
        "block_tokens": 16,
        "data_parallel": 2,
        **options,
    }
    config = TransformersConfig(
        model_id="mixtral",
        name="group",
        state_dir=str(home / "state"),
        scratch_dir=str(home / "scratch"),
        log=str(home / "log"),
        **chosen,
    )
    return LockstepEngine(RealHost(), config, program=program or PROGRAM)


def pids(engine: LockstepEngine) -> list[int]:
    """Of the ranks, by rank."""
    children = engine.group.processes.children
    return [children[rank].pid for rank in sorted(children)]


def living(processes: Sequence[int]) -> list[int]:
    return [pid for pid in processes if Path(f"/proc/{pid}").exists()]


def empty_steps(engine: LockstepEngine) -> list[int]:
    """Steps that each rank took with nothing of its own, as far as it has told."""
    return [link.counts.get("empty_steps", 0) for link in engine.group.links]


class Reading:
    """A request read in the background."""

    def __init__(self, engine: LockstepEngine, key: str, prompt: list[int], tokens: int, **more: Any) -> None:
        self.key, self.heard = key, Heard()
        stream = engine.generate(work(key, prompt, max_tokens=tokens, **more))
        self.task = asyncio.create_task(self.heard.listen(stream), name=key)

    @property
    def tokens(self) -> list[int]:
        return self.heard.tokens

    async def until(self, count: int) -> None:
        """Until it has so many tokens."""
        async with asyncio.timeout(60):
            while len(self.tokens) < count:
                assert not self.task.done(), self.task.exception() or "it has ended"
                await asyncio.sleep(0.002)


async def only_on_rank_1(engine: LockstepEngine, prompt: list[int], tokens: int) -> Reading:
    """A request that runs on rank 1, and none on rank 0."""
    first = Reading(engine, "first", prompt, 400)
    await first.until(1)
    second = Reading(engine, "second", prompt, tokens)
    await second.until(1)
    await engine.abort("first")
    await first.task
    assert engine._streams["second"].rank == 1
    return second

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
    (home / "scratch").mkdir(parents=True, exist_ok=True)
    chosen: dict[str, Any] = {
        "model": str(library.path("mixtral")),
        "step_tokens": 32,
        "block_tokens": 16,
        "model_id": "mixtral",
        "data_parallel": 2,
        **options,
    }
    config = TransformersConfig(
        name="group",
        state_dir=str(home / "state"),
        scratch_dir=str(home / "scratch"),
        log=str(home / "log"),
        **chosen,
    )
    return LockstepEngine(RealHost(), config, program=program or PROGRAM)


class Groups:
    """Started groups. A start costs seconds, so a group that a test left running and idle, on its first weights, is the next
    test's."""

    def __init__(self, library: Library, home: Path) -> None:
        self._library, self._home = library, home
        self._number = 0
        self._taken: list[tuple[bool, LockstepEngine]] = []
        self._kept: dict[bool, LockstepEngine] = {}

    async def take(self, *, gated: bool = False) -> LockstepEngine:
        """`gated`: its ranks' steps pass the gate."""
        engine = self._kept.pop(gated, None)
        if engine is None:
            self._number += 1
            home = self._home / str(self._number)
            home.mkdir()
            (home / "weights").symlink_to(self._library.path("mixtral"))
            model = str(home / "weights")
            engine = make_engine(self._library, home, program=GATED if gated else None, model=model)
            self._taken.append((gated, engine))
            self.capabilities = await engine.start()
        else:
            self._taken.append((gated, engine))
        return engine

    def weights(self, engine: LockstepEngine) -> Path:
        """A link to what it was started with."""
        return Path(engine._config.model)

    async def take_back(self) -> None:
        """What was taken: kept if it is as it was at its start, else stopped."""
        while self._taken:
            gated, engine = self._taken.pop()
            if self._as_new(engine) and gated not in self._kept:
                self._kept[gated] = engine
            else:
                await self._stop(engine)

    def _as_new(self, engine: LockstepEngine) -> bool:
        runs = engine._group is not None and not engine._group.why and not engine._stopping
        own = engine._updated is None or engine._updated[0] == str(self.weights(engine))
        return runs and own and engine._whole_weights and engine._held is None and not engine._streams._all

    async def close(self) -> None:
        for engine in self._kept.values():
            await self._stop(engine)

    @staticmethod
    async def _stop(engine: LockstepEngine) -> None:
        async with asyncio.timeout(30):
            await engine.stop()


def log_of(engine: LockstepEngine) -> str:
    assert engine._config.log is not None
    return Path(engine._config.log).read_text()


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

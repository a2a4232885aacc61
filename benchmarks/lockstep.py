"""Lockstep groups: what agreeing on each step costs, by grants and by a reduction, and how long a busy group takes to stand.

Two ranks of a tiny Mixtral with expert parallelism over gloo, one request on each. Sides take turns: `grants` (this project's), `reduction`
(an all-reduce before each step, as Megatron and vLLM agree), `none` (no agreement: what the step itself costs). The figure is
microseconds a step, tokens on their way to the runner included, which is the same for all. In a `null step` nothing is computed
and no expert is asked: the cost of agreement alone. `messages` is counted: a leader's words
and a rank's reports for each step and rank; a reduction is one collective each step, of at least two messages a rank.

    python benchmarks/lockstep.py [--quick] [--rounds N]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import harness
import lockstep_rank

from interlock.core.sampling import Sampling
from interlock.core.targets import Mode
from interlock.engines.base import Work
from interlock.engines.lockstep.engine import LockstepEngine
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.real import RealHost

T = TypeVar("T")
RANKS = 2
SIDES = ("none", "reduction", "grants")
PAUSE_STEP_MS = 10.0
NULL_STEP = -1.0
"""In place of milliseconds that a step takes longer: it computes nothing."""


def write_model(folder: Path) -> Path:
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, num_local_experts=4, num_experts_per_tok=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class Group:
    """A group whose ranks agree in one way, and its loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, model: Path, home: Path, side: str, step_ms: float
    ) -> None:
        self.loop, self.name = loop, side
        home.mkdir(mode=0o700)
        (home / "scratch").mkdir(mode=0o700)
        config = TransformersConfig(
            model=str(model),
            model_id="bench",
            name=side,
            state_dir=str(home / "state"),
            scratch_dir=str(home / "scratch"),
            log=str(home / "log"),
            data_parallel=RANKS,
        )
        program = (sys.executable, str(Path(__file__).parent / "lockstep_rank.py"))
        self.engine = LockstepEngine(RealHost(), config, program=program)
        self._environment = {lockstep_rank.SIDE: side, lockstep_rank.STEP_MS: str(step_ms)}
        self._works = 0
        self.messages_a_step = 0.0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def start(self) -> None:
        os.environ.update(self._environment)
        self.run(self.engine.start())

    async def _read(self, tokens: int, stamps: list[float]) -> None:
        self._works += 1
        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        work = Work.of(str(self._works), [7] * 16, sampling, "")
        async for progress in self.engine.generate(work):
            stamps.extend([time.perf_counter()] * len(progress.tokens))

    async def _both(self, tokens: int) -> float:
        stamps: list[list[float]] = [[] for _ in range(RANKS)]
        links, leader = self.engine.group.links, self.engine.group.leader
        said, words, step = sum(link.reports for link in links), leader.words, leader.step
        await asyncio.gather(*(self._read(tokens, each) for each in stamps))
        steps = leader.step - step
        if steps:
            heard = sum(link.reports for link in links) - said
            self.messages_a_step = (leader.words - words + heard) / steps / RANKS
        return max((each[-1] - each[0]) / (tokens - 1) for each in stamps) * 1e6

    def step_us(self, tokens: int) -> float:
        return self.run(self._both(tokens))

    @contextlib.asynccontextmanager
    async def _busy(self) -> AsyncIterator[None]:
        stamps: list[list[float]] = [[] for _ in range(RANKS)]
        reading = [asyncio.create_task(self._read(4000, each)) for each in stamps]
        while not all(stamps):  # noqa: ASYNC110 - the tokens tell nobody
            await asyncio.sleep(0.001)
        try:
            yield
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    async def _pauses(self, count: int) -> list[float]:
        taken = []
        async with self._busy():
            for number in range(count):
                await asyncio.sleep(0.02 + 0.0017 * (number % 7))  # somewhere in a step
                began = time.perf_counter()
                await self.engine.pause(Mode.KEEP)
                taken.append((time.perf_counter() - began) * 1e3)
                await self.engine.unpause()
        return taken

    def pauses_ms(self, count: int) -> list[float]:
        return self.run(self._pauses(count))

    def stop(self) -> None:
        self.run(self.engine.stop())


def steps(given: harness.Options, loop: asyncio.AbstractEventLoop, model: Path, home: Path) -> None:
    tokens = 100 if given.quick else 400
    for step_ms in (NULL_STEP, 0.0, 5.0):
        point = f"step of +{step_ms:g} ms" if step_ms >= 0 else "null step"
        if given.only and given.only not in point:
            continue
        groups = [Group(loop, model, home / f"{side}-{step_ms:g}", side, step_ms) for side in SIDES]
        try:
            for group in groups:
                group.start()
            sides = [
                harness.Side(group.name, lambda group=group: group.step_us(tokens))  # type: ignore[misc]
                for group in groups
            ]
            found = harness.compare(point, "us a step", sides, given.rounds, base="none", tokens=tokens)
            if {"grants", "reduction"} <= found.keys():
                harness.report(found["grants"], found["reduction"], messages=groups[-1].messages_a_step)
        finally:
            for group in groups:
                group.stop()


def pauses(given: harness.Options, loop: asyncio.AbstractEventLoop, model: Path, home: Path) -> None:
    if given.only and given.only not in "pause":
        return
    group = Group(loop, model, home / "pauses", "grants", PAUSE_STEP_MS)
    try:
        group.start()
        step_ms = group.step_us(50) / 1e3
        taken = group.pauses_ms(20 if given.quick else 200)
        group.run(asyncio.sleep(0.5))
        idle = group.run(_idle_pauses(group, 20 if given.quick else 100))
    finally:
        group.stop()
    for name, values in (("pause, busy", taken), ("pause, idle", idle)):
        harness.line(
            {
                "point": name,
                "unit": "ms",
                "step_ms": round(step_ms, 2),
                "p50": round(harness.percentile(values, 0.5), 2),
                "p99": round(harness.percentile(values, 0.99), 2),
                "p50_steps": round(harness.percentile(values, 0.5) / step_ms, 2),
                "p99_steps": round(harness.percentile(values, 0.99) / step_ms, 2),
                "pauses": len(values),
            }
        )


async def _idle_pauses(group: Group, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        await group.engine.pause(Mode.KEEP)
        taken.append((time.perf_counter() - began) * 1e3)
        await group.engine.unpause()
    return taken


def main() -> None:
    given = harness.options(__doc__, rounds=15, quick_rounds=3)
    harness.begin(given, "lockstep")
    home = Path(tempfile.mkdtemp(prefix="il-"))
    loop = asyncio.new_event_loop()
    try:
        model = write_model(home / "model")
        steps(given, loop, model, home)
        pauses(given, loop, model, home)
    finally:
        loop.close()
        shutil.rmtree(home)


if __name__ == "__main__":
    main()

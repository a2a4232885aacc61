"""Weights of a group are one fact: whole on every rank, or there are none (hazards W4)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from gatekeeper import Gatekeeper
from lockstep_bench import Groups, Reading
from tiny_models import Library, prompts

from interlock.core.targets import Mode
from interlock.engines.base import NotStanding, UpdateFailed
from interlock.engines.lockstep.engine import rank_states

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="session")]


async def test_an_update_that_fails_on_one_rank_leaves_the_group_without_weights_until_one_succeeds_on_all(
    groups: Groups, gate: Gatekeeper, library: Library, tmp_path: Path
) -> None:
    engine, prompt = await groups.take(gated=True), prompts((40,))[0]
    library.model("mixtral", seed=1)
    bad = tmp_path / "fails-on-rank-1"
    bad.symlink_to(library.path("mixtral", 1))
    with pytest.raises(NotStanding):
        await engine.update_weights(bad, "v1")
    kept = [Reading(engine, str(n), prompt, 60) for n in range(2)]
    for reading in kept:
        await reading.until(5)
    await engine.pause(Mode.KEEP)
    with pytest.raises(
        UpdateFailed, match=r"no weights that all its ranks share: rank 1: .*its disk is gone"
    ):
        await engine.update_weights(bad, "v1")
    with pytest.raises(UpdateFailed):
        await engine.unpause()
    step, made = engine.group.leader.step, [list(reading.tokens) for reading in kept]
    await asyncio.sleep(0.3)
    assert rank_states(engine) == [(step, step)] * 2
    assert [reading.tokens for reading in kept] == made, (
        "rank 0, which has the new weights, computes nothing by them"
    )

    # An operator who unpauses while the trainer's update is under way is refused: nobody decodes on half of them.
    updating = asyncio.create_task(engine.update_weights(library.path("mixtral", 1), "v2"))
    await asyncio.sleep(0)
    with pytest.raises(UpdateFailed):
        await engine.unpause()
    await updating
    await engine.unpause()
    for reading, before in zip(kept, made, strict=True):
        await reading.task
        assert reading.tokens[: len(before)] == before
    fresh = Reading(engine, "fresh", prompt, 20)
    await fresh.task
    assert fresh.tokens == library.greedy("mixtral", prompt, seed=1)
    await engine.pause(Mode.KEEP)
    await engine.update_weights(groups.weights(engine), "v0")
    await engine.unpause()

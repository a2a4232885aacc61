"""A rank is killed or frozen while another waits for it in a collective, forced by a gate: the group is ended whole.

Hazards F6 (grants, fencing, a dead or frozen peer inside the collective) and W5 (what goes on is the same request).
Tests that leave their group alive come first: a start costs seconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import pytest
from gatekeeper import Gatekeeper
from lockstep_bench import Groups, Reading, living, make_engine, pids
from tiny_models import Library, prompts

from interlock.core.lockstep import Fence, Grant
from interlock.core.targets import Mode
from interlock.engines.base import EngineGone
from interlock.engines.lockstep import group as group_module
from interlock.engines.lockstep.engine import LockstepEngine
from interlock.engines.lockstep.leader import Leader
from interlock.engines.lockstep.words import FenceWord, GrantWord
from interlock.host.real import RealHost

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="session")]
STEP_SECONDS = 1.5
"""What a step has in the tests of frozen ranks: the five seconds of the default only make them longer."""


async def ended_by(engine: LockstepEngine, victim: int, number: int, gate: Gatekeeper) -> tuple[str, float]:
    """Sends the signal, opens the gates, and waits for the engine's death: its words, and the seconds that it took."""
    ranks = pids(engine)
    death = asyncio.create_task(engine.died())
    began = time.monotonic()
    os.kill(ranks[victim], number)
    for rank in range(2):
        gate.release(rank)
    async with asyncio.timeout(60):
        words = await death
    assert living(ranks) == [], "it is told when no process of the group is left"
    return words, time.monotonic() - began


async def continued_elsewhere(
    groups: Groups, library: Library, prompt: list[int], delivered: list[int], count: int
) -> None:
    """A new life of the group goes on from prompt and tokens, token for token. It is the next test's."""
    engine = await groups.take(gated=True)
    rest = Reading(engine, "rest", [*prompt, *delivered], count - len(delivered))
    await rest.task
    assert delivered + rest.tokens == library.greedy("mixtral", prompt, count)


async def test_a_new_leader_fences_the_old_one_and_finishes_the_step_that_reached_one_rank_only(
    groups: Groups, gate: Gatekeeper, library: Library
) -> None:
    """The old leader's grant reached rank 1 alone, which waits for rank 0 inside a real collective (hazards F6, model lk)."""
    engine = await groups.take(gated=True)
    await engine.pause(Mode.KEEP)
    group = engine.group
    group.leader.close()
    reached, newest = group.leader.step, group.leader.state.leader_epoch + 10
    new = group.leader = Leader(RealHost().clock, newest, 2, say=group._say, on_end=group.end_whole)
    old = [FenceWord(Fence(newest - 1)), GrantWord(Grant(newest - 1, reached + 1, 1))]
    for link in group.links:
        link.post(old[0])
    group.links[1].post(old[1])
    async with asyncio.timeout(20):
        while gate.inside.get(1) != reached + 1:
            await asyncio.sleep(0.01)
    assert group.links[0].said.report.reached == reached

    new.begin()
    async with asyncio.timeout(20):
        await new.until(lambda: new.paused)
    assert new.step == reached + 1, "the maximum was granted to all"
    assert [link.said.report.reached for link in group.links] == [reached + 1] * 2

    # What the old leader still says changes nothing, and is answered with the new epoch.
    said = [link.said for link in group.links]
    for link in group.links:
        link.post(GrantWord(Grant(newest - 1, reached + 2, 1)))
    async with asyncio.timeout(20):
        while any(link.said is before for link, before in zip(group.links, said, strict=True)):
            await asyncio.sleep(0.01)
    for link in group.links:
        report = link.said.report
        assert (report.leader_epoch, report.granted, report.reached) == (newest, reached + 1, reached + 1)
    assert not group.why

    # The group is the new leader's, and computes on.
    await engine.unpause()
    prompt = prompts((40,))[0]
    after = Reading(engine, "after", prompt, 20)
    await after.task
    assert after.tokens == library.greedy("mixtral", prompt)


@pytest.mark.parametrize("victim", [0, 1], ids=["inside the collective", "on its way there"])
async def test_a_killed_rank_ends_the_whole_group_and_its_requests_go_on_in_the_next(
    groups: Groups, gate: Gatekeeper, library: Library, victim: int
) -> None:
    engine, prompt = await groups.take(gated=True), prompts((40,))[0]
    readings = [Reading(engine, str(n), prompt, 100) for n in range(2)]
    for reading in readings:
        await reading.until(10)
    gate.hold(1)
    await gate.one_waits_inside_for(held=1, waiter=0)
    pausing = asyncio.create_task(engine.pause(Mode.KEEP))
    await asyncio.sleep(0)
    words, seconds = await ended_by(engine, victim, signal.SIGKILL, gate)
    assert words == f"rank {victim} has exited with status -9", (
        "the one that was killed is named, not its victim"
    )
    assert seconds < 5.0, f"an exit is seen at once, this took {seconds:.1f} s"
    for task in (*(reading.task for reading in readings), pausing):
        with pytest.raises(EngineGone):
            await task
    await engine.stop()
    for reading in readings:
        assert reading.tokens == library.greedy("mixtral", prompt, 100)[: len(reading.tokens)]
    await continued_elsewhere(groups, library, prompt, readings[0].tokens, 100)


@pytest.mark.parametrize("victim", [0, 1], ids=["inside the collective", "on its way there"])
async def test_a_frozen_rank_is_waited_for_until_the_steps_deadline_and_no_longer(
    groups: Groups, gate: Gatekeeper, library: Library, victim: int
) -> None:
    engine, prompt = await groups.take(gated=True), prompts((40,))[0]
    leader = engine.group.leader
    leader.state = msgspec.structs.replace(leader.state, step_seconds=STEP_SECONDS)
    reading = Reading(engine, "kept", prompt, 100)
    await reading.until(10)
    gate.hold(1)
    await gate.one_waits_inside_for(held=1, waiter=0)
    granted = leader.step
    words, seconds = await ended_by(engine, victim, signal.SIGSTOP, gate)
    assert words.startswith(f"step {granted} missed its deadline")
    assert f"rank {victim} has said nothing for" in words, words
    # Two granted steps, at least one of them not reached, then a beat or two; a stopped group's end is quick.
    assert seconds < 2 * (STEP_SECONDS + 1.0) + 4.0
    with pytest.raises(EngineGone, match="missed its deadline"):
        await reading.task
    await engine.stop()
    await continued_elsewhere(groups, library, prompt, reading.tokens, 100)


async def test_a_rank_that_froze_while_the_group_stood_is_found_by_the_next_pause(
    groups: Groups, gate: Gatekeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_module, "LOCKSTEP_SILENCE_SECONDS_MAX", 1.5)
    engine = await groups.take(gated=True)  # the one that those above went on in; its gate is open
    ranks = pids(engine)
    os.kill(ranks[1], signal.SIGSTOP)
    with pytest.raises(EngineGone, match="rank 1 has said nothing"):
        async with asyncio.timeout(30):
            await engine.pause(Mode.KEEP)
    assert living(ranks) == []


async def test_ranks_leave_with_their_runner(library: Library, home: Path) -> None:
    """SIGKILL to the runner's process: its ranks see the end of their pipe, also while they compute."""
    home /= "orphaned"
    make_engine(library, home)  # writes the checkpoint
    argv = [
        sys.executable,
        str(Path(__file__).parent / "runner_process.py"),
        str(library.path("mixtral")),
        str(home),
    ]
    runner = await RealHost().spawn(argv, env={**os.environ}, log=home / "runner.log")
    try:
        async with asyncio.timeout(120):
            while not (home / "ranks").exists():
                assert runner.returncode is None, (home / "runner.log").read_text()
                await asyncio.sleep(0.05)
        ranks = [int(word) for word in (home / "ranks").read_text().split()]
        assert len(living(ranks)) == 2
        os.kill(runner.pid, signal.SIGKILL)
        async with asyncio.timeout(15):
            while living(ranks):
                await asyncio.sleep(0.05)
    finally:
        await runner.end_tree(10.0)

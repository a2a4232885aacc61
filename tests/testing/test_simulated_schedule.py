"""A schedule is a list of choices: the same one plays the same run, and a failing one is cut down to what it takes."""

from __future__ import annotations

import asyncio
import random

import pytest

from interlock.testing.sim import runs
from interlock.testing.sim.faults import faults_of, shape_of
from interlock.testing.sim.loop import SimLoop
from interlock.testing.sim.schedule import shrink_schedule
from interlock.testing.sim.worlds import run_world


def always() -> bool:
    return True


def test_a_failing_schedule_shrinks_to_the_choices_it_takes() -> None:
    tries = 0

    def fails(schedule: dict[int, int]) -> bool:
        nonlocal tries
        tries += 1
        return schedule.get(17) == 2 and 400 in schedule

    taken = {number: 1 + number % 3 for number in range(1000)}
    taken[17] = 2
    assert shrink_schedule(taken, fails, always) == {17: 2, 400: 2}
    assert tries < 400


def test_what_fails_in_any_order_needs_no_schedule_and_no_time_means_no_try() -> None:
    assert shrink_schedule({1: 1, 5: 2}, lambda _: True, always) == {}
    assert shrink_schedule({1: 1}, lambda _: pytest.fail("tried"), lambda: False) == {1: 1}


def order_of(loop: SimLoop) -> list[str]:
    seen: list[str] = []

    async def walk(name: str) -> None:
        for step in range(3):
            seen.append(f"{name}{step}")
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(walk(name) for name in "abc"))

    loop.run_until_complete(main())
    loop.close()
    return seen


def test_a_recorded_schedule_plays_the_same_order_and_the_empty_one_a_plain_loop_s() -> None:
    for seed in range(20):
        drawn = SimLoop(random.Random(seed))
        order = order_of(drawn)
        assert order_of(SimLoop(random.Random(99), fixed=drawn.schedule.taken)) == order
    plain = ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]
    assert order_of(SimLoop(random.Random(0), fixed={})) == plain


@pytest.mark.simulator
def test_a_whole_run_replays_from_its_text_byte_for_byte() -> None:
    shape = shape_of(12)
    faults = faults_of(12, shape, runs.KINDS)
    once = run_world(12, shape, faults, {3: 1, 40: 2, 900: 1}, luck=5)
    once.schedule = {3: 1, 40: 2, 900: 1}
    again = runs.run_replay(runs.replay_text(once, fixed=True))
    assert again.lines == once.lines
    assert run_world(12, shape, faults).lines != once.lines


@pytest.mark.parametrize("text", ["", "junk", "AAAA", "eJwDAAAAAAE="])
def test_a_text_that_nobody_printed_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="no run that"):
        runs.run_replay(text)

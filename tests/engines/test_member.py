"""A member's steps that failed and changed nothing: when they are taken again, and what becomes of the wait for that.

The member and its engine are real objects, the disk and the clock are the test's: nothing waits for real.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hand_engine import HandEngine

from interlock.core.identity import Epoch
from interlock.core.limits import STEP_RETRY_SECONDS_MAX, STEP_RETRY_SECONDS_MIN
from interlock.core.targets import Mode, State
from interlock.engines.base import EngineStartError
from interlock.engines.keeping import KeepFailed
from interlock.engines.member import Member
from interlock.host.real import RealClock, RealHost
from interlock.wire import fleet_messages as wire
from interlock.wire.identity import Identity

FACTS = wire.EngineFacts(address="unix:/nowhere", model="m", max_model_tokens=64, engine="hand")


class StepClock(RealClock):
    """The sleeps of a member's steps end when the test says so; everybody else's are real."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeps: list[tuple[float, asyncio.Future[None]]] = []

    async def sleep_s(self, seconds: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        if not task.get_name().startswith("step "):
            await super().sleep_s(seconds)
            return
        self.sleeps.append((seconds, asyncio.get_running_loop().create_future()))
        await self.sleeps[-1][1]

    def pass_by(self) -> None:
        """The last sleep begun is over."""
        self.sleeps[-1][1].set_result(None)

    @property
    def slept_s(self) -> list[float]:
        return [seconds for seconds, _ in self.sleeps]


class Disk:
    """A keeper whose disk is full, or not."""

    def __init__(self) -> None:
        self.full = False
        self.tries = 0

    async def keep(self) -> None: ...

    async def go_on(self) -> None:
        self.tries += 1
        if self.full:
            raise KeepFailed("the disk is full")

    def abort(self) -> None: ...

    async def end(self) -> None: ...


class Sleeper(HandEngine):
    """It can be suspended; `cannot_start`: and cannot be resumed."""

    def __init__(self) -> None:
        super().__init__()
        self.cannot_start = False

    async def suspend(self) -> None: ...

    async def resume(self) -> None:
        if self.cannot_start:
            raise EngineStartError("no memory")


class Bench:
    def __init__(self, directory: Path) -> None:
        self.host = RealHost()
        self.clock = StepClock()
        self.host._clock = self.clock
        self.engine, self.disk = Sleeper(), Disk()
        self.left: list[tuple[str, bool]] = []
        self.member = Member(
            self.host,
            Identity("engine", 1),
            self.engine,
            coordinator=f"unix:{directory}/nobody.sock",
            facts=FACTS,
            leave=lambda why, well: self.left.append((why, well)),
        )
        self.member.keeper = self.disk

    def tell(self, number: int, state: State, mode: Mode = Mode.KEEP) -> None:
        self.member._hear(wire.Target(Epoch(1, number), state.value, mode.value, "0"))

    async def until(self, condition: Callable[[], object]) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0)
        pytest.fail(f"it stays {self.member.state}")

    async def stands(self, state: State) -> None:
        await self.until(
            lambda: self.member.state.state is state and self.member.state.standing == self.member.state.epoch
        )

    async def waits(self, times: int) -> None:
        """For the so manieth time."""
        await self.until(lambda: len(self.clock.sleeps) == times and self.member.state.waits)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    bench.member.begin("0")
    bench.tell(1, State.PAUSED)
    await bench.stands(State.PAUSED)
    yield bench
    await bench.member.close()
    bench.host.close()


async def test_an_unpause_that_the_disk_refuses_is_tried_again_after_longer_and_longer_waits(
    bench: Bench,
) -> None:
    bench.disk.full = True
    bench.tell(2, State.RUNNING)
    expected = STEP_RETRY_SECONDS_MIN
    for times in range(1, 9):
        await bench.waits(times)
        assert bench.member.report().failed == "the disk is full"
        assert bench.member.state.state is State.PAUSED
        assert bench.engine.paused is not None
        assert bench.clock.slept_s[-1] == expected
        expected = min(2 * expected, STEP_RETRY_SECONDS_MAX)
        bench.clock.pass_by()
    await bench.waits(9)
    bench.disk.full = False
    bench.clock.pass_by()
    await bench.stands(State.RUNNING)
    assert bench.member.report().failed is None
    assert bench.engine.paused is None
    assert bench.disk.tries == 10

    bench.tell(3, State.PAUSED)
    await bench.stands(State.PAUSED)
    bench.disk.full = True
    bench.tell(4, State.RUNNING)
    await bench.waits(10)
    assert bench.clock.slept_s[-1] == STEP_RETRY_SECONDS_MIN, (
        "a step that succeeded makes the next wait short"
    )


async def test_an_engine_that_could_not_be_started_at_its_resume_is_started_later(bench: Bench) -> None:
    bench.tell(2, State.SUSPENDED)
    await bench.stands(State.SUSPENDED)
    bench.engine.cannot_start = True
    bench.tell(3, State.PAUSED)
    await bench.waits(1)
    assert bench.member.state.state is State.SUSPENDED
    bench.engine.cannot_start = False
    bench.clock.pass_by()
    await bench.stands(State.PAUSED)
    assert bench.left == []


@pytest.mark.parametrize("state", [State.SUSPENDED, State.STOPPED, State.RUNNING])
async def test_a_newer_target_is_walked_to_at_once_and_the_wait_is_over(bench: Bench, state: State) -> None:
    bench.disk.full = True
    bench.tell(2, State.RUNNING)
    await bench.waits(1)
    bench.disk.full = False
    bench.tell(3, state)
    await bench.until(lambda: bench.member.state.state is state)
    await bench.until(lambda: bench.clock.sleeps[0][1].cancelled())
    assert bench.member.state.failed is None
    assert bench.left == ([("stopped", True)] if state is State.STOPPED else [])


async def test_a_wait_that_nothing_is_left_to_wait_for_ends_without_a_step(bench: Bench) -> None:
    bench.disk.full = True
    bench.tell(2, State.RUNNING)
    await bench.waits(1)
    bench.tell(3, State.PAUSED)
    await bench.stands(State.PAUSED)
    before = bench.member.state
    bench.clock.pass_by()
    await bench.until(lambda: bench.member._step is not None and bench.member._step.done())
    assert (bench.member.state, bench.disk.tries) == (before, 1)


async def test_whoever_closes_during_the_wait_leaves_no_task_and_says_nothing(bench: Bench) -> None:
    bench.disk.full = True
    bench.tell(2, State.RUNNING)
    await bench.waits(1)
    await bench.member.close()
    mine = {asyncio.current_task()}
    assert not [task.get_name() for task in asyncio.all_tasks() - mine if "step" in task.get_name()]
    assert bench.left == []


async def test_what_the_engine_does_not_offer_is_not_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cannot(*_: Any) -> None:
        raise NotImplementedError("this engine cannot be suspended")

    monkeypatch.setattr(bench.engine, "suspend", cannot)
    bench.tell(2, State.SUSPENDED)
    await bench.until(lambda: bench.member.state.failed)
    await bench.until(lambda: bench.member._step is not None and bench.member._step.done())
    assert not bench.member.state.waits
    assert bench.clock.sleeps == []

"""A rank's loader: the engine hears of each load once, and only when nothing can touch its blocks any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from interlock.connectors.vllm.loader import Loader
from interlock.connectors.vllm.metadata import LoadTask
from interlock.core.limits import LOAD_SECONDS_MAX
from interlock.store.client import MatchResult
from interlock.store.rank_slots import GOOD, LATE, MISMATCH
from interlock.wire.locations import Location


def task(attempt: int, blocks: int = 2) -> LoadTask:
    locations = [Location(n, bytes(8)) for n in range(blocks)]
    return LoadTask(
        f"r{attempt}", attempt, [bytes(32)] * blocks, MatchResult(7, locations), [10, 11][:blocks]
    )


class HeldMover:
    """Copies when it is let, as long as there is time."""

    def __init__(self) -> None:
        self.let, self.entered = threading.Event(), threading.Event()
        self.then: Callable[[], list[str]] = lambda: [GOOD, GOOD]

    def load(
        self, slab: object, keys: object, locations: object, blocks: object, in_time: Callable[[], bool]
    ) -> list[str]:
        self.entered.set()
        assert self.let.wait(10)
        return self.then() if in_time() else [LATE, LATE]

    def save(self, *arguments: Any) -> list[list[int]]:
        raise AssertionError(arguments)


@pytest.fixture
def mover() -> HeldMover:
    return HeldMover()


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def loader(mover: HeldMover, clock: list[float]) -> Iterator[Loader]:
    running = Loader(mover, lambda slab: object() if slab == 7 else None, clock=lambda: clock[0])  # type: ignore[arg-type, return-value]
    yield running
    mover.let.set()
    assert running.close(10)


def test_a_load_past_its_deadline_is_told_only_when_its_copy_let_go(
    loader: Loader, mover: HeldMover, clock: list[float]
) -> None:
    loader.submit(task(1))
    assert mover.entered.wait(10)
    clock[0] = LOAD_SECONDS_MAX + 1
    assert loader.take() == []
    assert loader.outstanding == 1
    mover.let.set()
    (loaded,) = loader.take(wait_s=10)
    assert loaded.outcomes == [LATE, LATE]
    assert loaded.failed_blocks == {10, 11}
    assert loaded.mismatched == set(), "a late block may be good: it is not withdrawn"


def test_each_load_is_told_exactly_once_even_when_it_was_submitted_twice(
    loader: Loader, mover: HeldMover
) -> None:
    mover.let.set()
    loader.submit(task(1))
    loader.submit(task(1))
    assert [loaded.task.attempt for loaded in loader.take(wait_s=10)] == [1]
    assert loader.take() == []
    assert (loader.outstanding, loader.repeated) == (0, 1)


def test_a_mover_that_raises_fails_every_block_and_the_next_load_goes_on(
    loader: Loader, mover: HeldMover
) -> None:
    answers = iter([lambda: 1 / 0, lambda: [GOOD, MISMATCH]])
    mover.then = lambda: next(answers)()  # type: ignore[assignment, return-value]
    mover.let.set()
    loader.submit(task(1))
    loader.submit(task(2))
    told = []
    while len(told) < 2:
        told += loader.take(wait_s=10)
    assert [loaded.outcomes for loaded in told] == [[LATE, LATE], [GOOD, MISMATCH]]
    assert told[0].why == "load_error"
    assert told[1].mismatched == {(2, 1)}


def test_a_load_from_another_slab_than_ours_touches_nothing(loader: Loader) -> None:
    elsewhere = LoadTask("r", 1, [bytes(32)], MatchResult(8, [Location(0, bytes(8))]), [10])
    loader.submit(elsewhere)
    (loaded,) = loader.take(wait_s=10)
    assert (loaded.outcomes, loaded.why) == ([LATE], "load_slab_gone")


def test_a_full_queue_is_a_miss_at_once(
    mover: HeldMover, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.connectors.vllm.loader.LOADS_QUEUED_MAX", 1)
    loader = Loader(mover, lambda slab: object(), clock=lambda: clock[0])  # type: ignore[arg-type, return-value]
    loader.submit(task(1))
    assert mover.entered.wait(10)
    loader.submit(task(2))
    loader.submit(task(3))
    (refused,) = loader.take()
    assert (refused.task.attempt, refused.why) == (3, "load_queue_full")
    mover.let.set()
    assert loader.close(10)

"""The saver: KV tensors are read in the hook alone, slots are filled by another thread, and the report comes after both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event, get_ident
from types import SimpleNamespace
from typing import Any

import pytest

from interlock.connectors.vllm.saver import Saver

PATIENCE_S = 10.0
SLAB: Any = SimpleNamespace()


class WatchedMover:
    """Two blocks a batch; `put` waits at a gate unless the hook's own thread makes it, and everybody's thread is noted."""

    def __init__(self) -> None:
        self.gate, self.at_gate, self.hook = Event(), Event(), get_ident()
        self.gathered: list[tuple[list[int], int]] = []
        self.put_by: list[int] = []
        self.broken: set[int] = set()
        self.stagings = 0

    def batches(self, count: int) -> list[range]:
        return [range(at, min(at + 2, count)) for at in range(0, count, 2)]

    def staging(self) -> Any:
        self.stagings += 1
        return []

    def gather(self, blocks: Sequence[int], staging: list[int]) -> None:
        if self.broken & set(blocks):
            raise MemoryError("gather")
        staging[:] = blocks
        self.gathered.append((list(blocks), get_ident()))

    def put(
        self, slab: object, keys: Sequence[bytes], slots: Sequence[int], staging: list[int]
    ) -> list[list[int]]:
        if get_ident() != self.hook:
            self.at_gate.set()
            assert self.gate.wait(PATIENCE_S)
        self.put_by.append(get_ident())
        if self.broken & set(slots):
            raise OSError("put")
        return [[block * 10] for block in staging]


@pytest.fixture
def mover() -> WatchedMover:
    return WatchedMover()


@pytest.fixture
def savers() -> Iterator[list[Saver]]:
    made: list[Saver] = []
    yield made
    for saver in made:
        saver.close(PATIENCE_S)


class Told:
    def __init__(self) -> None:
        self.event = Event()
        self.said: list[tuple[list[bool], list[list[int]]]] = []

    def __call__(self, good: list[bool], sums: list[list[int]]) -> None:
        self.said.append((good, sums))
        self.event.set()

    def wait(self) -> tuple[list[bool], list[list[int]]]:
        assert self.event.wait(PATIENCE_S)
        (only,) = self.said
        return only


def save(saver: Saver, blocks: list[int]) -> Told:
    told = Told()
    saver.save(SLAB, [bytes(32)] * len(blocks), list(blocks), blocks, told)
    return told


def test_the_hook_returns_when_the_blocks_are_read_and_before_a_slot_is_touched(
    mover: WatchedMover, savers: list[Saver]
) -> None:
    savers.append(saver := Saver(mover))
    told = save(saver, [1, 2, 3])
    assert [blocks for blocks, _ in mover.gathered] == [[1, 2], [3]]
    assert {thread for _, thread in mover.gathered} == {get_ident()}, "KV tensors are read in the hook"
    assert mover.put_by == []
    assert not told.event.is_set(), "nothing is promised yet"
    mover.gate.set()
    assert told.wait() == ([True] * 3, [[10], [20], [30]])
    assert get_ident() not in mover.put_by


def test_the_other_thread_is_given_its_batches_when_all_are_copied_and_not_beside_a_copy(
    mover: WatchedMover, savers: list[Saver], monkeypatch: pytest.MonkeyPatch
) -> None:
    savers.append(saver := Saver(mover))
    mover.gate.set()
    submit, copied = saver._worker.submit, list[int]()

    def watched(*job: Any) -> Any:
        copied.append(len(mover.gathered))
        return submit(*job)

    monkeypatch.setattr(saver._worker, "submit", watched)
    told = save(saver, [1, 2, 3, 4, 5])
    assert told.wait() == ([True] * 5, [[10], [20], [30], [40], [50]])
    assert copied == [3, 3, 3]


def test_without_a_free_staging_the_hook_does_the_work_and_waits_for_nobody(
    mover: WatchedMover, savers: list[Saver]
) -> None:
    savers.append(saver := Saver(mover, buffers_max=1))
    first = save(saver, [1, 2])
    assert mover.at_gate.wait(PATIENCE_S), "the only staging is with the other thread, which stands still"
    second = save(saver, [3])
    assert second.said == [([True], [[30]])], "the hook had the work done while the other thread stood"
    mover.gate.set()
    assert first.wait() == ([True] * 2, [[10], [20]])
    assert mover.stagings == 2


def test_no_thread_of_its_own_is_needed_for_a_right_report(mover: WatchedMover, savers: list[Saver]) -> None:
    savers.append(saver := Saver(mover, buffers_max=0))
    mover.gate.set()
    told = save(saver, [1, 2, 3, 4, 5])
    assert told.said == [([True] * 5, [[10], [20], [30], [40], [50]])], "said before the hook returned"
    assert set(mover.put_by) == {get_ident()}
    assert saver.inline_batches == 3


@pytest.mark.parametrize("buffers", [0, 4])
@pytest.mark.parametrize("where", [{3}, {4}])
def test_a_batch_that_fails_is_reported_bad_and_the_others_are_not(
    mover: WatchedMover, savers: list[Saver], buffers: int, where: set[int]
) -> None:
    savers.append(saver := Saver(mover, buffers_max=buffers))
    mover.broken = where
    mover.gate.set()
    good, sums = save(saver, [1, 2, 3, 4, 5]).wait()
    assert good == [True, True, False, False, True]
    assert sums == [[10], [20], [], [], [50]]
    assert save(saver, [1]).wait() == ([True], [[10]]), "a staging that failed is used again"


def test_a_saver_that_closes_finishes_what_was_read(mover: WatchedMover) -> None:
    saver = Saver(mover)
    told = save(saver, [1, 2, 3])
    mover.gate.set()
    assert saver.close(PATIENCE_S)
    assert told.said == [([True] * 3, [[10], [20], [30]])]
    after = save(saver, [4])
    assert after.said == [([True], [[40]])], "a closed saver still keeps its word, in the caller's thread"


def test_a_saver_that_cannot_finish_promises_nothing(mover: WatchedMover) -> None:
    saver = Saver(mover)
    told = save(saver, [1, 2])
    assert mover.at_gate.wait(PATIENCE_S)
    assert not saver.close(0.01)
    assert told.said == [], "the process's exit is the promise then"
    mover.gate.set()
    assert told.event.wait(PATIENCE_S)

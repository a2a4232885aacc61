"""Copies between arrays and slots: every block lands where it belongs, by one thread or two, and both have ended at the end."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from interlock.core.layouts import KVLayout
from interlock.core.limits import SLOT_GRAIN_BYTES
from interlock.host.memory import create_memory
from interlock.store import copying
from interlock.store.copying import SlotCopier, by_two, copy_and_check
from interlock.store.mapping import MappedSlab

PAGES = 64


@pytest.fixture(params=[SLOT_GRAIN_BYTES, SLOT_GRAIN_BYTES - 16])
def slab(request: Any) -> MappedSlab:
    import os

    memory = create_memory("copying", PAGES * SLOT_GRAIN_BYTES)
    fd = os.dup(memory.fd)
    memory.close()
    layout = KVLayout(layers=1, heads=1, block_tokens=1, content=request.param, dtype="uint8")
    return MappedSlab(
        fd, slab=1, node_incarnation=1, size_bytes=PAGES * SLOT_GRAIN_BYTES, layout=layout, writable=True
    )


@pytest.mark.parametrize(
    "slots",
    [
        [3],
        [0, 1, 2, 3],
        [0, 2, 4, 6],
        [9, 8, 7],
        [5, 6, 30, 31, 33, 12],
        list(range(40, 64)) + list(range(8)),
    ],
)
@pytest.mark.parametrize("one_array", [True, False])
@pytest.mark.parametrize("backwards", [True, False])
def test_every_block_lands_in_its_slot_and_comes_back(
    slab: MappedSlab, slots: list[int], one_array: bool, backwards: bool
) -> None:
    size, count = slab.layout.block_bytes, len(slots)
    source: Any = np.random.default_rng(7).integers(0, 256, (count, size), dtype=np.uint8)
    indexes = list(range(count))[:: -1 if backwards else 1]
    parts = source if one_array else [row.copy() for row in source]
    copier = SlotCopier(slab)
    copier.put(slots, parts, indexes)
    for slot, index in zip(slots, indexes, strict=True):
        assert bytes(slab.block(slot)) == source[index].tobytes()
    untouched = set(range(PAGES)) - set(slots)
    assert not any(any(slab.view[p * SLOT_GRAIN_BYTES : (p + 1) * SLOT_GRAIN_BYTES]) for p in untouched)
    into: Any = np.zeros_like(source) if one_array else [np.zeros(size, dtype=np.uint8) for _ in slots]
    copier.get(slots, into, indexes)
    assert all(np.array_equal(a, b) for a, b in zip(into, source, strict=True))


def test_a_slot_outside_the_slab_is_refused_before_anything_beyond_it_is_touched(slab: MappedSlab) -> None:
    source = np.zeros((2, slab.layout.block_bytes), dtype=np.uint8)
    for slots in ([PAGES - 1, PAGES], [-1, 0]):
        with pytest.raises(IndexError):
            SlotCopier(slab).put(slots, source, [0, 1])


@pytest.fixture(params=[1, 2])
def cores(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(copying, "usable_cores", lambda: request.param)
    before = threading.active_count()
    yield request.param
    assert threading.active_count() == before, "a thread that copies outlived its call"


EACH = copying.BYTES_FOR_TWO // 4


def test_two_do_each_range_once_and_it_is_done_when_they_return(cores: int) -> None:
    done: list[tuple[int, str]] = []
    by_two(9, EACH, lambda some: done.extend((n, threading.current_thread().name) for n in some))
    assert sorted(n for n, _ in done) == list(range(9))
    assert len({name for _, name in done}) == cores


def test_small_calls_start_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "start_thread", lambda *_: pytest.fail("a thread was started"))
    by_two(9, 1000, lambda some: None)
    copy_and_check(9, 1000, lambda some: None, lambda some: None, copied_first=True)


def test_a_block_is_checked_once_and_not_before_it_was_copied(cores: int) -> None:
    copied, checked = set[int](), list[int]()

    def check(some: range) -> None:
        assert set(some) <= copied
        checked.extend(some)

    copy_and_check(9, EACH, copied.update, check, copied_first=True)
    assert checked == list(range(9))


@pytest.mark.parametrize("failing", ["copy", "check"])
@pytest.mark.parametrize("copied_first", [True, False])
def test_what_either_raises_is_raised_when_both_have_ended(
    cores: int, failing: str, copied_first: bool
) -> None:
    def fails(some: range) -> None:
        if 5 in some:
            raise IndexError("the fifth")

    def works(some: range) -> None:
        pass

    both: dict[str, Callable[[range], None]] = {"copy": works, "check": works, failing: fails}
    with pytest.raises(IndexError, match="the fifth"):
        copy_and_check(9, EACH, both["copy"], both["check"], copied_first=copied_first)


@pytest.mark.parametrize("where", [1, 7])
def test_what_one_of_two_raises_is_raised(cores: int, where: int) -> None:
    def work(some: range) -> None:
        if where in some:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        by_two(9, EACH, work)

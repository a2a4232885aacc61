"""Slots of several layouts side by side: every page is accounted for, and no slot is in two hands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.errors import LocalProtocolError
from interlock.store.slots import FREE, MOVES, PUBLISHED, QUARANTINED, WRITING, SlotState, SlotTable

PAGE = 4096


def test_every_move_that_is_not_in_the_table_is_refused_and_changes_nothing() -> None:
    path = {FREE: [FREE], WRITING: [], PUBLISHED: [PUBLISHED], QUARANTINED: [QUARANTINED]}
    for now in SlotState:
        for to in SlotState:
            table = SlotTable(16 * PAGE)
            slot = table.take(table.add_layout(PAGE))
            assert slot is not None
            for state in path[now]:
                table.move(slot, state)
            assert table.state(slot) is now
            if (now, to) in MOVES:
                table.move(slot, to)
                assert table.state(slot) is to
            else:
                before = dict(table.count)
                with pytest.raises(LocalProtocolError):
                    table.move(slot, to)
                assert table.state(slot) is now
                assert table.count == before
            table.check_integrity()


def test_blocks_of_one_layout_fill_the_slab_without_overlap() -> None:
    table = SlotTable(64 * PAGE)
    layout = table.add_layout(PAGE + 1)
    slots = [table.take(layout) for _ in range(table.capacity(layout))]
    assert table.take(layout) is None
    pages = [page for slot in slots for page in (slot, slot + 1)]  # type: ignore[operator]
    assert len(set(pages)) == len(pages) == 64
    assert max(pages) < 64


def test_what_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="at least"):
        SlotTable(15 * PAGE)
    with pytest.raises(ValueError, match="more memory"):
        SlotTable(64 * PAGE).add_layout(5 * PAGE)


def test_an_extent_goes_to_another_layout_only_when_all_its_slots_are_free() -> None:
    table = SlotTable(32 * PAGE)
    small, large = table.add_layout(PAGE), table.add_layout(2 * PAGE)
    slots = [table.take(small) for _ in range(32)]
    assert table.take(large) is None
    extent = table.richest(but=large)[0]
    assert not table.give_back(extent)
    for slot in table.slots_of_extent(extent):
        table.move(slot, FREE)
    assert table.give_back(extent)
    taken = table.take(large)
    assert taken is not None
    assert taken // table.extent_pages == extent
    assert table.extents_of(small) == 15
    assert len(slots) == 32
    table.check_integrity()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 200)), max_size=150))
def test_the_books_balance_whatever_is_asked(steps: list[tuple[int, int, int]]) -> None:
    table = SlotTable(50 * PAGE)
    layouts = [table.add_layout(size * PAGE) for size in (1, 2, 3)]
    taken: set[int] = set()
    for verb, which, pick in steps:
        if verb <= 1 and (slot := table.take(layouts[which])) is not None:
            assert slot not in taken
            taken.add(slot)
        elif verb == 2 and taken:
            slot = sorted(taken)[pick % len(taken)]
            to = [PUBLISHED, QUARANTINED, FREE][which]
            if (table.state(slot), to) in MOVES:
                table.move(slot, to)
                if to is FREE:
                    taken.discard(slot)
        elif verb == 3:
            table.give_back(pick % 16)
        table.check_integrity()
        assert len(taken) == sum(count for state, count in table.count.items() if state is not FREE)

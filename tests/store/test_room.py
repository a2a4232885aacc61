"""Quotas, pins and memory shared between layouts: who has to make room for whom."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core.layouts import KVLayout
from interlock.core.prefixes import Block
from interlock.store.orders import Orders
from interlock.store.refusal import Refusal
from interlock.store.shelf import Shelf

PAGE = 4096
LAYOUT = KVLayout(layers=2, heads=4, block_tokens=4, content=32, dtype="float32")


class Books:
    """A shelf that is filled without sessions: a slot is taken and published at once."""

    def __init__(self, pages: int = 16, **quotas: int) -> None:
        self.counters: Counter[str] = Counter()
        self.shelf = Shelf(pages * PAGE, self.counters, quotas={k: v * PAGE for k, v in quotas.items()})
        self.layout = self.shelf.layout(LAYOUT)

    def save(self, letter: str, count: int, tenant: str = "", layout: int | None = None) -> int:
        """A chain of that many blocks; how many had room."""
        number = self.layout if layout is None else layout
        keys = self.keys(letter, count)
        parents = [b"", *keys[:-1]]
        slots = self.shelf.take_slots(number, parents, tenant)
        for key, parent, slot in zip(keys, parents, slots, strict=False):
            self.shelf.publish([Block(key, parent, number, slot, b"", tenant)])
        self.shelf.check_integrity()
        return len(slots)

    @staticmethod
    def keys(letter: str, count: int) -> list[bytes]:
        return [letter.encode() * 28 + number.to_bytes(4, "big") for number in range(count)]

    def here(self, letter: str, count: int = 16) -> int:
        return len(self.shelf.match(self.keys(letter, count)))


def test_a_tenant_at_its_quota_evicts_its_own_and_nobody_elses() -> None:
    books = Books(16, small=4)
    books.save("a", 10)
    assert books.save("b", 4, "small") == 4
    for letter in "cdefg":
        assert books.save(letter, 2, "small") == 2
        assert books.shelf.orders.used_bytes("small") == 4 * PAGE
    assert books.here("a") == 10
    assert books.counters["evictions_over_quota"] == 10


def test_a_tenant_is_granted_as_far_as_its_quota_goes() -> None:
    books = Books(16, small=4, none=0)
    assert books.save("a", 9, "small") == 4
    assert books.save("b", 9, "none") == 0
    assert books.save("c", 12) == 12


def test_a_named_tenant_without_a_quota_of_its_own_has_that_of_all_others() -> None:
    books = Books(16, **{"*": 3})
    assert books.save("a", 9, "x") == 3
    assert books.save("b", 9, "y") == 3
    assert books.save("c", 9) == 9
    assert books.shelf.orders.tenants() == ["x", "y"]


def test_the_orders_of_a_tenant_that_left_are_forgotten() -> None:
    books = Books(16, **{"*": 8})
    for number in range(50):
        books.save("abcdefghij"[number % 10], 3, f"tenant-{number}")
    for block in list(books.shelf):
        books.shelf.withdraw(block.key, block.slot)
    books.shelf.check_integrity()
    assert books.shelf.orders.tenants() == []
    assert len(list(books.shelf.orders)) <= 1


def test_impossible_quotas_are_refused() -> None:
    with pytest.raises(ValueError, match="0 bytes or more"):
        Orders({"x": -1})
    with pytest.raises(ValueError, match="at most 256"):
        Orders({str(number): 1 for number in range(257)})


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(1, 6), st.sampled_from(["", "x", "y", "z"])),
        max_size=40,
    )
)
@settings(max_examples=100, deadline=None)
def test_no_quota_is_ever_passed_and_the_books_always_balance(saves: list[tuple[str, int, str]]) -> None:
    books = Books(16, x=3, y=6)
    for letter, count, tenant in saves:
        if not books.shelf.match(books.keys(letter, 1)):
            books.save(letter, count, tenant)
        assert books.shelf.orders.used_bytes("x") <= 3 * PAGE
        assert books.shelf.orders.used_bytes("y") <= 6 * PAGE


# --- pins --------------------------------------------------------------------------------------------------------


def pin(books: Books, owner: str, letter: str, seconds: float = 10.0, now_s: float = 0.0) -> None:
    found = books.shelf.match(books.keys(letter, 16))
    books.shelf.pins.add(owner, letter, found, now_s, seconds)
    books.shelf.check_integrity()


def test_what_is_pinned_outlives_ten_times_the_slab() -> None:
    books = Books(16)
    books.save("p", 6)
    pin(books, "me", "p")
    for turn in range(40):
        books.save(chr(65 + turn), 4)
    assert books.here("p") == 6
    assert books.shelf.pins.bytes == 6 * PAGE


@pytest.mark.parametrize("end", ["taken back", "deadline", "owner gone"])
def test_a_pin_ends_with_its_owner_its_deadline_or_its_wish(end: str) -> None:
    books = Books(16)
    books.save("p", 6)
    pin(books, "me", "p", seconds=10.0, now_s=5.0)
    books.shelf.pins.tick(14.9)
    books.shelf.pins.owner_gone("another")
    assert len(books.shelf.pins) == 1
    if end == "taken back":
        assert books.shelf.pins.remove("me", "p") == 6
    elif end == "deadline":
        books.shelf.pins.tick(15.0)
    else:
        books.shelf.pins.owner_gone("me")
    assert len(books.shelf.pins) == books.shelf.pins.bytes == 0
    for turn in range(40):
        books.save(chr(65 + turn), 4)
        books.here(chr(65 + turn), 4)
    assert books.here("p") < 6


def test_two_pins_of_one_block_count_its_bytes_once_and_hold_until_both_are_gone() -> None:
    books = Books(16)
    books.save("p", 4)
    pin(books, "one", "p")
    pin(books, "two", "p")
    assert books.shelf.pins.bytes == 4 * PAGE
    books.shelf.pins.owner_gone("one")
    assert books.keys("p", 1)[0] in books.shelf.pins
    books.shelf.pins.owner_gone("two")
    assert books.keys("p", 1)[0] not in books.shelf.pins


def test_more_than_half_of_the_slab_cannot_be_pinned_and_a_refused_pin_changes_nothing() -> None:
    books = Books(16)
    books.save("p", 6)
    books.save("q", 6)
    pin(books, "me", "p")
    with pytest.raises(Refusal, match="50% of the slab"):
        pin(books, "me", "q")
    assert books.shelf.pins.bytes == 6 * PAGE
    with pytest.raises(Refusal, match="seconds"):
        pin(books, "me", "p", seconds=0.0)
    with pytest.raises(Refusal, match="256 pins"):
        for number in range(300):
            books.shelf.pins.add("me", str(number), books.shelf.match(books.keys("p", 1)), 0.0, 1.0)
    books.shelf.check_integrity()


def test_a_pinned_block_that_failed_its_check_leaves_all_the_same() -> None:
    books = Books(16)
    books.save("p", 4)
    pin(books, "me", "p")
    block = books.shelf.match(books.keys("p", 4))[3]
    assert books.shelf.withdraw(block.key, block.slot)
    assert books.here("p") == 3
    books.shelf.pins.owner_gone("me")
    books.shelf.check_integrity()


# --- several layouts ---------------------------------------------------------------------------------------------


def test_memory_follows_use_from_a_layout_that_nobody_asks_for_any_more() -> None:
    books = Books(256)
    other = books.shelf.layout(msgspec.structs.replace(LAYOUT, block_tokens=8))
    books.save("a", 256)
    for turn in range(400):
        books.save(chr(200 + turn % 50), 8, layout=other)
        for block in books.shelf.match(books.keys(chr(200 + turn % 50), 8)):
            assert block.layout == other
    assert books.shelf.slots.extents_of(other) > 8
    assert books.here("a", 256) < 128


def test_an_extent_with_a_pinned_block_is_not_taken() -> None:
    books = Books(16)
    other = books.shelf.layout(msgspec.structs.replace(LAYOUT, heads=2))
    for letter in "abcdefghijklmnop":
        books.save(letter, 1)
    for letter in "abcdefgh":
        pin(books, letter, letter)
    for turn in range(200):
        books.save(chr(300 + turn), 1, layout=other)
    assert all(books.here(letter) == 1 for letter in "abcdefgh")


# --- listings ----------------------------------------------------------------------------------------------------


def test_pages_show_every_block_that_stays_exactly_once_whatever_comes_and_goes_between() -> None:
    books = Books(64)
    books.save("a", 40)
    stay = set(books.keys("a", 40)[:20])
    seen: list[bytes] = []
    cursor: int | None = 0
    turn = 0
    while cursor is not None:
        page, cursor = books.shelf.page(cursor, 5)
        seen += [block.key for block in page]
        leaf = books.shelf.get(books.keys("a", 40)[39 - turn]) if turn < 20 else None
        if leaf is not None:
            books.shelf.withdraw(leaf.key, leaf.slot)
        books.save(chr(400 + turn), 1)
        turn += 1
    assert all(seen.count(key) == 1 for key in stay)


def test_each_change_is_numbered_and_a_forgotten_one_is_a_gap() -> None:
    from interlock.store.changes import Change, ChangeKind, ChangeLog

    log = ChangeLog(kept_max=4)
    rung: list[int] = []
    log.listeners.append(lambda: rung.append(log.last))
    made = [Change(ChangeKind.STORED, bytes([n]) * 32, b"", 16) for n in range(6)]
    assert log.since(0, 10) == []
    for change in made:
        log.append(change)
    assert rung == [1, 2, 3, 4, 5, 6]
    assert log.since(2, 10) == made[2:]
    assert log.since(3, 2) == made[3:5]
    assert log.since(6, 10) == []
    assert log.since(1, 10) is None
    assert log.since(7, 10) is None

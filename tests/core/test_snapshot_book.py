"""The scopes of a store: room is exact whatever happens, names are used once, erase_all lists no children, a start trusts nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core.errors import LocalProtocolError
from interlock.core.snapshot_book import Amount, SnapshotBook
from interlock.core.snapshot_events import (
    Accepted,
    CallDone,
    CallFailed,
    Close,
    CloseDirectory,
    Effects,
    Erase,
    Erased,
    LoadAsked,
    LoadRead,
    MakeDirectory,
    Missed,
    MoveToStore,
    MoveToTrash,
    NotPromoted,
    Promote,
    ReadFile,
    ReadStaged,
    Reaped,
    Refused,
    RootMoved,
    Tick,
    WriteEnded,
)
from interlock.core.snapshot_state import Directory, Item, Phase

BUDGET = Amount(items=3, memory_bytes=20, disk_bytes=25)


def book(**changes: object) -> SnapshotBook:
    return SnapshotBook(5, root=1, budget=BUDGET, **changes)  # type: ignore[arg-type]


def save(store: SnapshotBook, name: str, position: int = 0, size: int = 10) -> Effects:
    effects = store.save(name, position=position, bytes=size, deadline_s=1.0)
    if any(isinstance(effect, MakeDirectory) for effect in effects):
        effects += store.handle(name, CallDone())
    store.check_integrity()
    return effects


def test_room_is_charged_before_the_directory_is_made_so_two_at_once_cannot_take_the_same() -> None:
    store = book()
    for name in "ab":
        assert isinstance(store.save(name, position=0, bytes=10, deadline_s=1.0)[-1], MakeDirectory)
        store.check_integrity()
    assert isinstance(save(store, "c")[0], Refused)
    store.handle("a", CallFailed("EIO"))
    assert store.used == Amount(1, 10, 10)
    assert isinstance(save(store, "c")[-1], Accepted)


@pytest.mark.parametrize("size", [10, 11])
def test_what_fits_exactly_is_accepted_and_one_byte_more_is_refused(size: int) -> None:
    store = book()
    save(store, "a")
    assert isinstance(save(store, "a", 1, size)[-1], Accepted if size == 10 else Refused)


@pytest.mark.parametrize("size", [5, 6])
def test_disk_is_filled_to_its_last_byte_and_no_further(size: int) -> None:
    store = book()
    for position in range(2):
        save(store, "a", position)
        store.handle("a", WriteEnded(position, True))
    assert store.used == Amount(2, 0, 20)
    assert isinstance(save(store, "a", 2, size)[-1], Accepted if size == 5 else Refused)


def test_a_file_that_is_being_moved_into_the_store_is_charged_once() -> None:
    store = book()
    save(store, "a")
    store.handle("a", WriteEnded(0, True))
    assert isinstance(store.handle("a", Promote(0))[-1], MoveToStore)
    store.check_integrity()
    assert store.used == Amount(1, 0, 10)


def test_erased_state_counts_on_disk_until_the_trash_is_empty() -> None:
    store = book()
    save(store, "a")
    store.handle("a", Erase())
    store.handle("a", CallDone())
    store.handle("a", WriteEnded(0, True))
    assert store.used == Amount(1, 0, 10)
    store.handle("a", Reaped(Directory("a", 5, 0)))
    assert store.used == Amount()
    assert len(store) == 0


def test_an_epoch_outlives_its_scope_so_no_directory_has_a_name_twice() -> None:
    store = book()
    made = set()
    for _ in range(3):
        for name in "ab":
            effects = save(store, name, size=1)
            directory = next(e.directory for e in effects if isinstance(e, MakeDirectory))
            assert directory not in made
            made.add(directory)
            store.handle(name, WriteEnded(0, False, "EIO"))
            store.handle(name, Erase())
            store.handle(name, CallDone())
            store.handle(name, Reaped(directory))
            assert store.get(name) is None


def test_of_a_scope_that_is_not_here_nothing_can_be_had_and_erasing_it_is_done() -> None:
    store = book()
    assert store.handle("a", Erase()) == (Erased(),)
    assert store.handle("a", LoadAsked(3, 0)) == (Missed(3, "no state of this request is kept"),)
    assert store.handle("a", Promote(0)) == (NotPromoted(0, "no state of this request is kept"),)
    with pytest.raises(LocalProtocolError, match="there is no scope a, and Close is not possible"):
        store.handle("a", Close())


def test_scopes_are_bounded() -> None:
    store = book(scopes_max=1)
    save(store, "a", size=1)
    assert save(store, "b", size=1) == (Refused(0, "1 requests keep snapshots already"),)
    assert isinstance(save(store, "a", 1, 1)[-1], Accepted)


def test_erase_all_reaches_what_was_there_and_spares_what_comes_meanwhile() -> None:
    store = book()
    save(store, "a", size=1)
    root = store.switch_root()
    made = save(store, "b", size=1)[1]
    assert isinstance(made, MakeDirectory)
    assert made.root == root == 2
    assert store.below(root) == ["a"]
    store.handle("a", RootMoved(root))
    assert store.below(root) == []
    assert [scope.name for scope in store if scope.phase is Phase.LIVE] == ["b"]


def test_a_start_adopts_what_its_owner_names_and_continues_behind_it() -> None:
    store = book()
    old = Directory("a", 4, 9)
    items = [Item(0, 8, 3, old, 1.0), Item(2, 8, 3, old, 1.0), Item(1, 4, 3, old, 1.0)]
    scope = store.adopt(old, items)
    assert [item.number for item in scope.durable] == [1, 2]  # Of two at a position the later.
    assert store.used == Amount(3, 0, 9)
    store.check_integrity()
    assert isinstance(store.handle("a", LoadAsked(1, 8))[0], ReadFile)
    store.handle("a", LoadRead(1, True))
    assert store.handle("a", Erase())[0] == MoveToTrash(old, 1)
    assert CloseDirectory(old) in store.handle("a", CallDone())
    store.handle("a", Reaped(old))
    made = store.save("a", position=0, bytes=1, deadline_s=1.0)[1]
    assert isinstance(made, MakeDirectory)
    assert made.directory == Directory("a", 5, 11)


def test_an_empty_directory_may_be_adopted() -> None:
    store = book()
    assert store.adopt(Directory("a", 4, 0), []).durable == ()
    assert isinstance(save(store, "a", size=1)[-1], Accepted)


def test_a_directory_of_this_life_or_of_a_scope_that_is_here_is_not_adopted() -> None:
    store = book()
    with pytest.raises(LocalProtocolError, match="not of an earlier life than 5"):
        store.adopt(Directory("a", 5, 0), [])
    save(store, "a", size=1)
    with pytest.raises(LocalProtocolError, match="its scope is here already"):
        store.adopt(Directory("a", 4, 0), [])


def test_trash_found_at_start_takes_room_until_it_is_emptied() -> None:
    store = book()
    store.trash_found(2, 20)
    assert isinstance(save(store, "a")[0], Refused)
    store.trash_found(-2, -20)
    assert isinstance(save(store, "a")[-1], Accepted)


def test_what_a_close_has_to_report_is_what_is_accepted_and_neither_written_failed_nor_erased() -> None:
    store = book()
    save(store, "a", 0, 1)
    save(store, "a", 1, 1)
    save(store, "b", 0, 1)
    store.handle("a", WriteEnded(0, True))
    store.handle("b", Erase())
    store.handle("b", CallDone())
    assert [(item.directory.scope, item.position) for item in store.unwritten()] == [("a", 1)]
    store.handle("a", Tick(2.0))
    assert store.unwritten() == []


def test_a_book_whose_room_is_wrong_says_so() -> None:
    store = book()
    save(store, "a")
    store.used = Amount(1, 10, 11)
    with pytest.raises(AssertionError, match="accounted for"):
        store.check_integrity()


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.sampled_from("ab"), st.integers(0, 2), st.booleans()), max_size=60
    )
)
def test_room_is_exact_and_within_the_budget_after_any_events(
    steps: list[tuple[int, str, int, bool]],
) -> None:
    """A driver that does what the effects say, in some order, with calls that fail at random."""
    store, trash, loads = book(), [], 0
    for kind, name, number, flag in steps:
        scope = store.get(name)
        effects: list[object] = []
        if kind == 0:
            effects += store.save(name, position=number, bytes=1 + number, deadline_s=1.0)
        elif kind == 1 and scope is not None:
            effects += store.handle(name, Erase())
        elif kind == 2 and scope is not None and scope.writing:
            item = scope.writing[number % len(scope.writing)]
            effects += store.handle(name, WriteEnded(item.number, flag, "EIO", left_behind=number == 2))
        elif kind == 3:
            loads += 1
            effects += store.handle(name, LoadAsked(loads, number))
        elif kind == 4 and trash:
            directory = trash.pop()
            effects += store.handle(directory.scope, Reaped(directory))
        elif kind == 5 and scope is not None:
            effects += store.handle(name, Promote(number))
        elif kind == 6 and scope is not None and scope.loads:
            effects += store.handle(name, LoadRead(scope.loads[0].number, flag))
        while effects:
            effect = effects.pop(0)
            if isinstance(effect, MakeDirectory | MoveToTrash | MoveToStore):
                is_done = flag or number == 1
                if isinstance(effect, MoveToTrash) and is_done:
                    trash.append(effect.directory)
                effects += store.handle(name, CallDone() if is_done else CallFailed("EIO"))
            assert not isinstance(effect, ReadStaged) or effect.load.item.bytes
        store.check_integrity()
        assert store.used.fits(BUDGET)
        assert min(store.used.items, store.used.memory_bytes, store.used.disk_bytes) >= 0

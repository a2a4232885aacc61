"""The write sessions of a node: a key is written once at a time, a slot is held once at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.errors import LocalProtocolError, ProtocolError
from interlock.core.joins import JoinName
from interlock.core.session_book import SessionBook
from interlock.core.sessions import (
    Abort,
    FreeSlot,
    JoinCompleted,
    Phase,
    ProcessReported,
    Publish,
    ReleaseKey,
    Session,
    SlabName,
    WriterGone,
    start,
)

SLAB = SlabName(1, 0)


def key(number: int) -> bytes:
    return bytes([number]) * 32


def session(
    number: int, *, keys: tuple[int, ...] = (1,), slots: tuple[int, ...] = (1,), given: str = "p"
) -> Session:
    return start(
        JoinName("s", number),
        slab=SLAB,
        keys=tuple(map(key, keys)),
        slots=slots,
        given=tuple(given),
        deadline_s=10.0,
    )


def nothing_present(_: bytes) -> bool:
    return False


def test_keys_under_way_or_present_are_left_alone_and_each_key_is_wanted_once() -> None:
    book = SessionBook()
    book.add(session(1, keys=(1,)))
    asked = [key(number) for number in (1, 2, 3, 2)]
    assert book.missing(asked, lambda each: each == key(3)) == [1]
    assert book.is_under_way(key(1))
    assert not book.is_under_way(key(2))


def test_the_exit_of_its_writer_lets_others_write_the_key_to_another_slot_while_the_first_stays_held() -> (
    None
):
    book = SessionBook()
    book.add(session(1, keys=(1,), slots=(7,)))
    assert book.handle(JoinName("s", 1), WriterGone()) == (ReleaseKey(key(1)),)
    assert book.missing([key(1)], nothing_present) == [0]
    with pytest.raises(LocalProtocolError, match="a slot of it is held"):
        book.add(session(2, keys=(1,), slots=(7,)))
    book.add(session(2, keys=(1,), slots=(8,), given="q"))
    assert book.quarantined_slots() == 1
    book.add(session(3, keys=(2, 3), slots=(1, 2), given="q"))
    assert book.quarantined_slots() == 1
    assert book.quarantine_holders() == {"p": 1}
    assert book.held_slots == {1, 2, 7, 8}
    assert book.process_gone("p") == (FreeSlot(7),)
    assert book.held_slots == {1, 2, 8}
    book.check_integrity()


def test_a_repeated_start_finds_its_session_until_it_is_forgotten() -> None:
    book = SessionBook(tombstones_max=1)
    for number in (1, 2):
        book.add(session(number))
        book.handle(JoinName("s", number), ProcessReported("p", SLAB))
        effects = book.handle(JoinName("s", number), JoinCompleted((True,)))
        assert effects == (Publish(key(1), 1), ReleaseKey(key(1)))
    assert book.get(JoinName("s", 1)) is None
    ended = book.get(JoinName("s", 2))
    assert ended is not None
    assert ended.phase is Phase.PUBLISHED
    assert len(book) == 0
    with pytest.raises(LocalProtocolError, match="a session of that name exists"):
        book.add(session(2, keys=(9,), slots=(9,)))
    assert book.handle(JoinName("s", 2), ProcessReported("p", SLAB)) == ()
    book.check_integrity()


def test_a_key_under_way_cannot_be_added_and_a_refused_session_leaves_no_trace() -> None:
    book = SessionBook()
    book.add(session(1, keys=(1, 2), slots=(1, 2)))
    with pytest.raises(LocalProtocolError, match="a key of it is under way"):
        book.add(session(2, keys=(3, 2), slots=(3, 4)))
    assert book.missing([key(3)], nothing_present) == [0]
    assert book.held_slots == {1, 2}
    book.check_integrity()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="session s#9 is not known here"):
        SessionBook().handle(JoinName("s", 9), Abort())


def test_a_tick_ends_what_is_due_and_its_slots_stay_held() -> None:
    book = SessionBook()
    book.add(session(1))
    assert book.tick(9.0) == ()
    assert book.tick(10.0) == (ReleaseKey(key(1)),)
    assert [each.phase for each in book] == [Phase.QUARANTINED]
    assert book.held_slots == {1}


@given(st.lists(st.tuples(st.sampled_from("ajrgwt"), st.integers(0, 3)), max_size=60))
def test_no_history_shares_a_slot_or_a_key_under_way(history: list[tuple[str, int]]) -> None:
    book = SessionBook(tombstones_max=3)
    free = {0, 1, 2}
    published: dict[bytes, int] = {}
    count = 0
    for what, number in history:
        name = JoinName("s", number)
        try:
            if what == "a" and free:
                wanted = book.missing([key(number)], published.__contains__)
                if wanted:
                    slot = min(free)
                    book.add(session(count := count + 1, keys=(number,), slots=(slot,), given="pq"))
                    free.remove(slot)
                effects = ()
            elif what == "j":
                effects = book.handle(name, JoinCompleted((True,)))
            elif what == "r":
                effects = book.handle(name, ProcessReported("pq"[number % 2], SLAB))
            elif what == "g":
                effects = book.process_gone("pq"[number % 2])
            elif what == "w":
                effects = book.handle(name, WriterGone())
            else:
                effects = book.tick(3.0 * number)
        except ProtocolError:
            effects = ()
        for effect in effects:
            if isinstance(effect, FreeSlot):
                assert effect.slot not in free
                free.add(effect.slot)
            elif isinstance(effect, Publish):
                assert effect.key not in published
                published[effect.key] = effect.slot
        book.check_integrity()
        assert free | book.held_slots | set(published.values()) == {0, 1, 2}
        assert len(free) + len(book.held_slots) + len(published) == 3

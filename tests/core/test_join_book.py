"""The joins of a node: bounded in number and time, and one join's trouble stays its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core import join_book
from interlock.core.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from interlock.core.join_book import JoinBook
from interlock.core.joins import (
    Abort,
    Completed,
    Event,
    Failed,
    Forget,
    JoinName,
    Open,
    Phase,
    RankLost,
    Report,
)
from interlock.core.layouts import Shard

TWO = (Shard(0, 1, 0, 1), Shard(0, 1, 1, 2))


def name(number: int) -> JoinName:
    return JoinName("s", number)


def opened(number: int, deadline_s: float = 10.0) -> Open:
    return Open(name(number), 1, TWO, layers=1, heads=2, deadline_s=deadline_s)


def report(number: int, rank: int, good: bool = True) -> Report:
    return Report(name(number), rank, (good,))


def test_events_find_their_join_by_session_and_attempt() -> None:
    book = JoinBook()
    for event in (opened(1), opened(2), report(1, 0), report(2, 1)):
        assert book.handle(event) == ()
    assert book.handle(report(1, 1)) == (Completed(name(1), (True,), ()),)
    assert [join.phase for join in book] == [Phase.OPEN, Phase.COMPLETED]
    assert (book.open_count, len(book)) == (1, 2)
    book.check_integrity()


def test_a_thousand_repeats_after_completion_leave_nothing_behind() -> None:
    book = JoinBook()
    for event in (opened(1), report(1, 0), report(1, 1)):
        book.handle(event)
    for _ in range(1000):
        assert book.handle(report(1, 0)) == ()
    assert (len(book), book.early_reports) == (1, 0)
    book.tick(0.0)
    assert book.tick(1e6) == (Forget(name(1)),)
    assert len(book) == 0


def test_a_repeat_after_the_tombstone_is_early_and_forgotten_in_its_turn() -> None:
    book = JoinBook()
    book.handle(report(1, 0))
    assert book.early_reports == 1
    assert book.tick(0.0) == ()
    assert book.tick(1e6) == (Forget(name(1)),)
    assert (len(book), book.early_reports) == (0, 0)
    book.check_integrity()


def test_early_reports_have_a_bound_and_repeats_do_not_count() -> None:
    book = JoinBook(early_reports_max=2)
    book.handle(report(1, 0))
    book.handle(report(2, 0))
    assert book.handle(report(2, 0)) == ()
    with pytest.raises(RemoteProtocolError, match="2 such reports are kept already") as refusal:
        book.handle(report(1, 1))
    assert refusal.value.retryable
    book.handle(opened(1))
    assert book.handle(report(3, 0)) == ()
    book.check_integrity()


def test_open_joins_have_a_bound_and_a_repeated_open_does_not_count() -> None:
    book = JoinBook(joins_max=1)
    book.handle(opened(1))
    assert book.handle(opened(1)) == ()
    with pytest.raises(LocalProtocolError, match="1 joins are open, which is the limit"):
        book.handle(opened(2))
    book.handle(Abort(name(1)))
    assert book.handle(opened(2)) == ()
    book.check_integrity()


def test_the_oldest_tombstone_is_forgotten_first() -> None:
    book = JoinBook(tombstones_max=2)
    for number in (1, 2, 3):
        book.handle(opened(number))
        book.handle(Abort(name(number)))
    assert book.get(name(1)) is None
    assert {join.name for join in book} == {name(2), name(3)}
    book.check_integrity()


def test_a_tick_ends_exactly_the_joins_that_are_due() -> None:
    book = JoinBook()
    book.handle(opened(1, deadline_s=1.0))
    book.handle(opened(2, deadline_s=2.0))
    assert book.tick(1.5) == (Failed(name(1), "its deadline passed", (0, 1)),)
    assert book.open_count == 1


def test_the_loss_of_a_rank_makes_no_join() -> None:
    book = JoinBook()
    assert book.handle(RankLost(name(1), 0)) == ()
    assert len(book) == 0


def test_a_refused_event_changes_nothing() -> None:
    book = JoinBook()
    book.handle(opened(1))
    before = list(book)
    for event in (report(1, 7), opened(1, deadline_s=3.0), RankLost(name(1), 7)):
        with pytest.raises(ProtocolError):
            book.handle(event)
    with pytest.raises(RemoteProtocolError):
        book.handle(Report(name(2), -1, (True,)))
    assert list(book) == before


EVENTS = st.one_of(
    st.builds(opened, st.integers(1, 3)),
    st.builds(report, st.integers(1, 3), st.integers(0, 2), st.booleans()),
    st.builds(lambda number, rank: RankLost(name(number), rank), st.integers(1, 3), st.integers(0, 1)),
    st.builds(lambda number: Abort(name(number)), st.integers(1, 3)),
    st.floats(0, 1000),
)


@given(st.lists(EVENTS, max_size=40))
def test_no_order_of_events_breaks_a_bound_or_ends_a_held_join_twice(events: list[Event | float]) -> None:
    book = JoinBook(joins_max=2, early_reports_max=2, tombstones_max=2)
    now_s = 0.0
    ended: set[JoinName] = set()
    for event in events:
        try:
            if isinstance(event, float):
                now_s += event
                effects = book.tick(now_s)
            else:
                effects = book.handle(event)
        except ProtocolError:
            effects = ()
        book.check_integrity()
        for effect in effects:
            if isinstance(effect, Completed | Failed):
                assert effect.join not in ended
                ended.add(effect.join)
        # A name that is no longer known may be used by a test; nodes never use one twice.
        ended &= {join.name for join in book}


def test_what_is_remembered_expires_in_its_order_also_when_it_changed_meanwhile() -> None:
    book = JoinBook()
    book.handle(report(1, 0))
    assert book.tick(0.0) == ()
    book.handle(report(2, 0))
    assert book.tick(20.0) == ()
    book.handle(report(1, 1))
    assert book.tick(30.0) == (Forget(name(1)),)
    assert book.tick(49.0) == ()
    assert book.tick(50.0) == (Forget(name(2)),)
    book.check_integrity()


def test_a_tick_does_not_look_at_every_tombstone(monkeypatch: pytest.MonkeyPatch) -> None:
    book = JoinBook()
    for number in range(100):
        book.handle(opened(number))
        book.handle(Abort(name(number)))
    book.tick(0.0)
    seen = []
    transition = join_book.transition
    monkeypatch.setattr(
        join_book, "transition", lambda join, event: seen.append(join) or transition(join, event)
    )
    book.tick(1.0)
    assert len(seen) == 1

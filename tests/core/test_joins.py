"""One join: order does not matter, it ends once, and what cannot be is refused and changes nothing."""

import itertools
import timeit

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core import joins
from interlock.core.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from interlock.core.joins import (
    Abort,
    Completed,
    Contradicted,
    Event,
    Failed,
    Forget,
    Join,
    JoinName,
    Kind,
    Open,
    Phase,
    RankLost,
    Refused,
    Report,
    Tick,
    transition,
)
from interlock.core.layouts import EMPTY_SHARD, Shard, shard_of_rank
from interlock.core.limits import (
    BLOCKS_PER_CALL_MAX,
    EARLY_REPORT_SECONDS_MAX,
    RANKS_MAX,
    TOMBSTONE_SECONDS_MAX,
)
from interlock.core.packed_sums import pack_sums

NAME = JoinName("engine-0/7", 1)
TWO = (Shard(0, 1, 0, 1), Shard(0, 1, 1, 2))
OPEN = Open(NAME, 2, TWO, layers=1, heads=2, deadline_s=10.0)
LOAD = msgspec.structs.replace(OPEN, kind=Kind.LOAD)
WELL = (True, True)


def told(*events: Event, join: Join | None = None) -> tuple[Join, list[joins.Effect]]:
    join = Join(NAME) if join is None else join
    heard: list[joins.Effect] = []
    for event in events:
        join, effects = transition(join, event)
        heard += effects
    return join, heard


def sums(*blocks: tuple[int, ...]) -> joins.Checksums:
    return tuple(map(pack_sums, blocks))


def report(rank: int, *good: bool, checksums: joins.Checksums = ()) -> Report:
    return Report(NAME, rank, good or WELL, checksums)


def in_phase(phase: Phase) -> Join:
    return {
        Phase.EARLY: Join(NAME),
        Phase.OPEN: told(OPEN)[0],
        Phase.COMPLETED: told(OPEN, report(0), report(1))[0],
        Phase.FAILED: told(OPEN, Abort(NAME))[0],
    }[phase]


def test_open_and_reports_in_any_order_with_repeats_give_the_same_end_once() -> None:
    first, second = report(0, True, False), report(1, True, True)
    for order in itertools.permutations([OPEN, first, second, OPEN, first, second]):
        join, heard = told(*order)
        assert heard == [Completed(NAME, (True, False), ())]
        assert join.phase is Phase.COMPLETED


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5), st.randoms())
def test_a_block_is_good_exactly_if_every_rank_says_so(said: list[list[bool]], random: object) -> None:
    shards = tuple(Shard(0, 2, rank, rank + 1) for rank in range(len(said)))
    opened = Open(NAME, 3, shards, layers=2, heads=len(said), deadline_s=1.0)
    reports = [Report(NAME, rank, tuple(good)) for rank, good in enumerate(said)]
    random.shuffle(reports)  # type: ignore[attr-defined]
    _, heard = told(opened, *reports)
    assert heard == [Completed(NAME, tuple(map(all, zip(*said, strict=True))), ())]


def test_a_load_fails_where_any_rank_failed_whoever_reports_last() -> None:
    for order in itertools.permutations([report(0, True, False), report(1, False, True)]):
        assert told(LOAD, *order)[1] == [Completed(NAME, (False, False), ())]


def test_a_load_waits_for_every_rank_although_one_covers_the_block() -> None:
    both = Open(NAME, 2, (Shard(0, 1, 0, 1), Shard(0, 1, 0, 1)), 1, 1, 10.0, Kind.LOAD)
    join, heard = told(both, report(0))
    assert heard == []
    assert told(report(1), join=join)[1] == [Completed(NAME, WELL, ())]


def test_a_rank_that_writes_nothing_is_not_waited_for_and_reports_nothing() -> None:
    four = tuple(shard_of_rank(rank, 4, layers=1, heads=2) for rank in range(4))
    opened = Open(NAME, 2, four, layers=1, heads=2, deadline_s=10.0)
    join, heard = told(opened, RankLost(NAME, 1), Report(NAME, 3, ()), report(0), report(2))
    assert heard == [Completed(NAME, WELL, ())]
    with pytest.raises(RemoteProtocolError, match="rank 1 tells the outcome of 2 blocks, and it has 0"):
        told(opened, report(1))
    assert told(Report(NAME, 1, ()), join=join)[1] == []


@pytest.mark.parametrize(("shards", "first"), [(TWO, 10), (TWO[::-1], 20)], ids=["in order", "swapped"])
def test_checksums_come_out_in_head_order_and_only_for_good_blocks(
    shards: tuple[Shard, ...], first: int
) -> None:
    _, heard = told(
        msgspec.structs.replace(OPEN, shards=shards),
        report(0, True, True, checksums=sums((first,), (first + 1,))),
        report(1, True, False, checksums=sums((30 - first,), ())),
    )
    assert heard == [Completed(NAME, (True, False), sums((10, 20), ()))]


def test_a_rank_that_writes_nothing_cuts_no_layer_group_wherever_its_rectangle_lies() -> None:
    """It has layers in the middle, and no head of them."""
    opened = Open(NAME, 1, (Shard(0, 4, 0, 2), Shard(1, 3, 0, 0)), layers=4, heads=2, deadline_s=1.0)
    _, heard = told(opened, Report(NAME, 0, (True,), sums((1, 2))))
    assert heard == [Completed(NAME, (True,), sums((1, 2)))]


def test_checksums_of_layer_groups_come_out_layer_by_layer() -> None:
    piped = Open(NAME, 1, (Shard(1, 2, 0, 2), Shard(0, 1, 0, 2)), layers=2, heads=2, deadline_s=1.0)
    _, heard = told(piped, Report(NAME, 0, (True,), sums((3, 4))), Report(NAME, 1, (True,), sums((1, 2))))
    assert heard == [Completed(NAME, (True,), sums((1, 2, 3, 4)))]


def test_checksums_of_ranks_that_hold_several_groups_are_put_where_each_belongs() -> None:
    """Two tensor-parallel ranks, each with both layer groups, whose boundary the opener names."""
    opened = Open(
        NAME, 1, (Shard(0, 4, 1, 2), Shard(0, 4, 0, 1)), layers=4, heads=2, deadline_s=1.0, cuts=(3,)
    )
    _, heard = told(opened, Report(NAME, 0, (True,), sums((2, 4))), Report(NAME, 1, (True,), sums((1, 3))))
    assert heard == [Completed(NAME, (True,), sums((1, 2, 3, 4)))]


def test_a_rank_that_sums_up_too_few_layer_groups_is_refused_and_told() -> None:
    opened = Open(NAME, 1, (Shard(0, 4, 0, 2),), layers=4, heads=2, deadline_s=1.0, cuts=(2,))
    with pytest.raises(
        RemoteProtocolError, match="2 checksums for block 0, and it has 2 heads of it in 2 layer groups"
    ):
        told(opened, Report(NAME, 0, (True,), sums((1, 2))))
    whole = msgspec.structs.replace(opened, cuts=())
    with pytest.raises(RemoteProtocolError, match=r"1 checksums for block 0, and it has 2 heads of it$"):
        told(whole, Report(NAME, 0, (True,), sums((1,))))


@pytest.mark.parametrize("cuts", [(0,), (4,), (-1,)])
def test_an_open_whose_layer_groups_begin_outside_its_layers_is_refused(cuts: tuple[int, ...]) -> None:
    with pytest.raises(LocalProtocolError, match="layer groups begin at"):
        told(Open(NAME, 1, (Shard(0, 4, 0, 2),), layers=4, heads=2, deadline_s=1.0, cuts=cuts))


def test_a_load_has_no_layer_groups_whatever_its_ranks_hold() -> None:
    overlapping = Open(NAME, 1, (Shard(0, 3, 0, 1), Shard(1, 4, 0, 1)), 4, 1, 10.0, Kind.LOAD)
    _, heard = told(overlapping, Report(NAME, 0, (True,), sums((1,))), Report(NAME, 1, (True,), sums((2,))))
    assert heard == [Completed(NAME, (True,), ())]


def test_one_rank_without_checksums_leaves_the_join_without() -> None:
    _, heard = told(OPEN, report(0, checksums=sums((1,), (2,))), report(1))
    assert heard == [Completed(NAME, WELL, ())]


# --- ends without completion -------------------------------------------------------------------------------------


def test_the_deadline_fails_it_and_names_who_is_missing() -> None:
    join, heard = told(OPEN, report(0), Tick(9.99))
    assert heard == []
    join, heard = told(Tick(10.0), join=join)
    assert join.phase is Phase.FAILED
    assert heard == [Failed(NAME, "its deadline passed", (1,))]
    assert str(heard[0]) == "join engine-0/7#1 failed: its deadline passed; no report from ranks: 1"


def test_a_rank_lost_before_its_report_fails_it_and_after_its_report_does_not() -> None:
    _, heard = told(OPEN, RankLost(NAME, 1))
    assert heard == [Failed(NAME, "rank 1 was lost before it reported", (0, 1))]
    _, heard = told(OPEN, report(1), RankLost(NAME, 1), report(0))
    assert heard == [Completed(NAME, WELL, ())]


def test_an_abort_fails_it_once_and_later_reports_change_nothing() -> None:
    join, heard = told(OPEN, report(0), Abort(NAME), Abort(NAME), report(1), RankLost(NAME, 1))
    assert heard == [Failed(NAME, "it was aborted", (1,))]
    assert join.phase is Phase.FAILED


def test_an_abort_that_overtakes_the_open_is_told_to_the_opener_once() -> None:
    join, heard = told(report(0), Abort(NAME), OPEN, OPEN, report(1))
    assert heard == [Failed(NAME, "it was aborted before it was opened", (1,))]
    assert join.phase is Phase.FAILED


# --- early, late, repeated ---------------------------------------------------------------------------------------


def test_a_loss_heard_before_the_open_counts_unless_that_rank_had_reported() -> None:
    _, heard = told(RankLost(NAME, 1), RankLost(NAME, 1), RankLost(NAME, 0), OPEN)
    assert heard == [Failed(NAME, "rank 0 was lost before it reported", (0, 1))]
    _, heard = told(report(1), RankLost(NAME, 1), OPEN, report(0))
    assert heard == [Completed(NAME, WELL, ())]


def test_all_reports_may_come_before_the_open() -> None:
    assert told(report(1), report(0), OPEN)[1] == [Completed(NAME, WELL, ())]


def test_an_early_report_that_proves_impossible_is_dropped_naming_it_and_harms_nothing() -> None:
    join, heard = told(report(5), Report(NAME, 1, (True,)), report(0), OPEN)
    assert heard == [
        Refused(NAME, 1, "rank 1 tells the outcome of 1 blocks, and it has 2 of them"),
        Refused(NAME, 5, "it speaks for rank 5, and the group has ranks 0 to 1"),
    ]
    assert told(report(1), join=join)[1] == [Completed(NAME, WELL, ())]


def test_a_refusal_is_told_also_when_the_open_ends_the_join() -> None:
    _, heard = told(report(5), report(0), report(1), OPEN)
    assert [type(effect) for effect in heard] == [Refused, Completed]
    _, heard = told(report(5), RankLost(NAME, 0), OPEN)
    assert [type(effect) for effect in heard] == [Refused, Failed]


@pytest.mark.parametrize("before", [[], [OPEN], [OPEN, report(1)], [OPEN, Abort(NAME)]])
def test_the_first_report_of_a_rank_stands_and_a_different_one_is_named(before: list[Event]) -> None:
    events = [*before[:1], report(0, True, True), *before[1:]]
    join, _ = told(*events)
    after, heard = told(report(0, True, True), report(0, False, True), join=join)
    assert heard == [Contradicted(NAME, 0)]
    assert after == join


def test_a_report_to_a_finished_join_that_its_rank_never_sent_in_time_is_ordinary() -> None:
    join, _ = told(OPEN, Abort(NAME))
    assert told(report(0), join=join) == (join, [])


def test_an_early_join_is_forgotten_after_its_time_counted_from_its_first_tick() -> None:
    join, heard = told(report(0), Tick(100.0), Tick(100.0 + EARLY_REPORT_SECONDS_MAX - 0.01))
    assert heard == []
    assert told(Tick(100.0 + EARLY_REPORT_SECONDS_MAX), join=join)[1] == [Forget(NAME)]


@pytest.mark.parametrize("phase", [Phase.COMPLETED, Phase.FAILED])
def test_a_finished_join_is_forgotten_after_its_time(phase: Phase) -> None:
    join, heard = told(Tick(5.0), Tick(5.0 + TOMBSTONE_SECONDS_MAX - 0.01), join=in_phase(phase))
    assert heard == []
    assert told(Tick(5.0 + TOMBSTONE_SECONDS_MAX), join=join)[1] == [Forget(NAME)]


def test_opening_stops_the_clock_of_an_early_join() -> None:
    join, _ = told(report(0), Tick(0.0), OPEN)
    assert join.expires_s is None


# --- what is refused ---------------------------------------------------------------------------------------------


def check_refused(join: Join, event: Event, error: type[ProtocolError], match: str) -> None:
    """Raises `error` with these words, and changes nothing."""
    before = msgspec.to_builtins(join)
    with pytest.raises(error, match=match):
        transition(join, event)
    assert msgspec.to_builtins(join) == before


@pytest.mark.parametrize(
    ("event", "match"),
    [
        (report(2), "it speaks for rank 2, and the group has ranks 0 to 1"),
        (report(-1), "it speaks for rank -1"),
        (Report(NAME, 1, (True,)), "rank 1 tells the outcome of 1 blocks, and it has 2"),
        (report(1, checksums=sums((1,))), "rank 1 sends checksums of 1 blocks, and it has 2"),
        (report(1, checksums=sums((1,), (1, 2))), "rank 1 sends 2 checksums for block 1, and it has 1 heads"),
    ],
)
def test_an_impossible_report_is_refused_naming_both_and_the_join_completes_all_the_same(
    event: Report, match: str
) -> None:
    join, _ = told(OPEN)
    check_refused(join, event, RemoteProtocolError, match)
    assert told(report(0), report(1), join=join)[1] == [Completed(NAME, WELL, ())]


@pytest.mark.parametrize(
    "event",
    [Report(NAME, RANKS_MAX, (True,)), Report(NAME, 0, (True,) * (BLOCKS_PER_CALL_MAX + 1)), report(-1)],
)
def test_an_early_report_beyond_all_limits_is_refused(event: Report) -> None:
    check_refused(Join(NAME), event, RemoteProtocolError, "outside the limits")


def test_what_lies_exactly_at_the_limits_is_accepted() -> None:
    most = (True,) * BLOCKS_PER_CALL_MAX
    many = (TWO[0],) * RANKS_MAX
    opened = Open(NAME, BLOCKS_PER_CALL_MAX, many, 1, 1, 10.0, Kind.LOAD)
    join, _ = told(Report(NAME, RANKS_MAX - 1, most), Report(NAME, 0, most), opened)
    assert (join.phase, join.missing) == (Phase.OPEN, RANKS_MAX - 2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"blocks": 0}, "it names 0 blocks"),
        ({"blocks": BLOCKS_PER_CALL_MAX + 1}, "blocks, where 1 to"),
        ({"shards": ()}, "it names 0 ranks"),
        ({"shards": (EMPTY_SHARD,) * (RANKS_MAX + 1)}, "ranks, where 1 to"),
        ({"shards": (TWO[0], TWO[0])}, "do not cover 1 layers × 2 heads exactly once"),
        ({"shards": (TWO[0], EMPTY_SHARD)}, "do not cover"),
    ],
)
@pytest.mark.parametrize("aborted", [False, True])
def test_an_open_that_no_reports_could_satisfy_is_refused(
    changes: dict[str, object], match: str, aborted: bool
) -> None:
    join = told(Abort(NAME))[0] if aborted else Join(NAME)
    check_refused(join, msgspec.structs.replace(OPEN, **changes), LocalProtocolError, match)


@pytest.mark.parametrize("phase", [Phase.OPEN, Phase.COMPLETED, Phase.FAILED])
def test_another_open_of_the_same_name_is_refused_and_the_same_open_changes_nothing(phase: Phase) -> None:
    join = in_phase(phase)
    assert transition(join, OPEN) == (join, ())
    check_refused(
        join,
        msgspec.structs.replace(OPEN, blocks=1),
        LocalProtocolError,
        f"is {phase} and Open is not possible",
    )


def test_the_loss_of_a_rank_outside_the_group_is_refused() -> None:
    check_refused(in_phase(Phase.OPEN), RankLost(NAME, 2), LocalProtocolError, "ranks 0 to 1")
    check_refused(in_phase(Phase.OPEN), RankLost(NAME, -1), LocalProtocolError, "ranks 0 to 1")


@pytest.mark.parametrize("phase", list(Phase))
def test_an_event_of_another_join_or_of_no_join_is_refused_in_every_state(phase: Phase) -> None:
    join, other = in_phase(phase), JoinName("engine-0/7", 2)
    for event in (
        msgspec.structs.replace(OPEN, join=other),
        Report(other, 0, WELL),
        RankLost(other, 0),
        Abort(other),
    ):
        check_refused(join, event, LocalProtocolError, "it is meant for join engine-0/7#2")
    check_refused(join, "Open", LocalProtocolError, "str is not possible")  # type: ignore[arg-type]


def test_every_row_of_the_table_leads_where_it_says() -> None:
    events: list[Event] = [OPEN, report(0), report(1), RankLost(NAME, 0), Abort(NAME)]
    events += [Tick(0.0), Tick(1e9)]
    seen: set[tuple[Phase, type, Phase]] = set()
    states, waiting = {Join(NAME)}, [Join(NAME)]
    while waiting:
        state = waiting.pop()
        for event in events:
            after, _ = transition(state, event)
            seen.add((state.phase, type(event), after.phase))
            if after not in states:
                states.add(after)
                waiting.append(after)
    assert seen == {(*row, to) for row, move in joins.TABLE.items() for to in move.to}


def test_a_transition_costs_microseconds() -> None:
    """The bound is ten times the aim, for busy machines; docs/protocols/joins.md says what was measured."""
    join, event = told(OPEN)[0], report(0)
    cost = min(timeit.repeat(lambda: transition(join, event), number=1000, repeat=5)) / 1000
    assert cost < 100e-6

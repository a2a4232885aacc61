"""A leader fences, grants the maximum, and says PAUSED only where every rank stands; a group ends whole."""

import timeit
from itertools import product

import msgspec
import pytest

from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.limits import LOCKSTEP_SECONDS_PER_TOKEN, LOCKSTEP_STEP_SECONDS, RANKS_MAX
from interlock.core.lockstep import (
    Grant,
    RankReport,
)
from interlock.core.lockstep_leader import (
    TABLE,
    Advance,
    EndGroup,
    GroupEvent,
    GroupState,
    Pause,
    Paused,
    Phase,
    Proceed,
    RankLost,
    StepDown,
    Tell,
    Tick,
    lead,
    transition,
)


def says(rank: int, granted: int, reached: int, *, leader: int = 2, tokens: int = 0) -> RankReport:
    return RankReport(rank, leader, granted, reached, tokens)


def group(*events: GroupEvent, ranks: int = 2) -> GroupState:
    state = lead(2, ranks, deadline_s=5.0)
    for event in events:
        state, _ = transition(state, event)
    return state


FENCED = group(says(0, 0, 0), says(1, 0, 0))
GOING = group(says(0, 0, 0), says(1, 0, 0), Proceed())


def test_a_new_leader_grants_the_maximum_once_every_rank_has_told_its_own() -> None:
    state, effects = transition(lead(2, 2, deadline_s=5.0), says(0, 1, 1, tokens=8))
    assert (state.phase, effects) == (Phase.FENCING, ())
    state, effects = transition(state, says(1, 2, 1, tokens=64))
    assert (state.phase, state.granted) == (Phase.GRANTING, 2)
    assert effects == (Tell(Grant(2, 2, 64)),)
    assert not state.paused


def test_a_group_fenced_at_rest_is_paused_at_once() -> None:
    state, effects = transition(group(says(0, 3, 3)), says(1, 3, 3))
    assert effects == (Tell(Grant(2, 3)), Paused(3))
    assert state.standing


def test_paused_is_said_once_when_every_rank_stands_at_the_grant() -> None:
    state = group(says(0, 0, 0), says(1, 0, 0), Proceed(), Advance(0.0, 1), Pause(), says(0, 1, 1))
    assert not state.paused
    state, effects = transition(state, says(1, 1, 1))
    assert effects == (Paused(1),)
    assert transition(state, Pause()) == (state, ())
    assert transition(state, says(1, 1, 1)) == (state, ())


def test_pausing_a_group_that_stands_is_paused_at_once() -> None:
    assert transition(GOING, Pause())[1] == (Paused(0),)


def test_at_most_two_steps_are_granted_ahead_of_the_slowest_rank() -> None:
    state = group(says(0, 0, 0), says(1, 0, 0), Proceed(), Advance(0.0, 1), Advance(0.0, 1), says(0, 2, 2))
    with pytest.raises(
        LocalProtocolError,
        match=r"step 3 may not be granted: the group is GRANTING, and .* has reached step 0",
    ):
        transition(state, Advance(0.0, 1))
    assert state.granted == 2
    state, _ = transition(state, says(1, 2, 1))
    assert transition(state, Advance(0.0, 1))[0].granted == 3


def test_no_step_is_granted_while_pausing() -> None:
    with pytest.raises(LocalProtocolError, match="pausing"):
        transition(FENCED, Advance(0.0, 1))


def test_a_deadline_follows_from_the_tokens_of_all_steps_under_way() -> None:
    state, effects = transition(GOING, Advance(100.0, 8000))
    one = LOCKSTEP_STEP_SECONDS + 8000 * LOCKSTEP_SECONDS_PER_TOKEN
    assert state.deadline_s == pytest.approx(100.0 + one)
    assert effects == (Tell(Grant(2, 1, 8000)),)
    state, _ = transition(state, Advance(100.0, 1))
    assert state.deadline_s == pytest.approx(100.0 + 2 * one)
    for number in (0, 1):
        state, _ = transition(state, says(number, 2, 2))
    state, _ = transition(state, Advance(200.0, 1))
    assert state.deadline_s == pytest.approx(200.0 + LOCKSTEP_STEP_SECONDS + LOCKSTEP_SECONDS_PER_TOKEN)


def test_a_deadline_that_passes_ends_the_group_and_names_who_was_missing() -> None:
    state = group(says(0, 0, 0), says(1, 0, 0), Proceed(), Advance(0.0, 0), says(0, 1, 1))
    assert transition(state, Tick(LOCKSTEP_STEP_SECONDS - 0.1)) == (state, ())
    ended, effects = transition(state, Tick(LOCKSTEP_STEP_SECONDS))
    assert ended.phase is Phase.ENDED
    assert effects == (EndGroup("step 1 missed its deadline, waiting for rank 1"),)


def test_a_fence_that_is_not_answered_ends_the_group() -> None:
    _, effects = transition(group(says(1, 0, 0)), Tick(5.0))
    assert effects == (EndGroup("fencing missed its deadline, waiting for rank 0"),)


def test_a_new_leader_gives_the_steps_it_found_their_time_from_its_first_tick() -> None:
    state = group(says(0, 1, 0, tokens=10), says(1, 1, 0, tokens=10))
    assert state.deadline_s is None
    state, effects = transition(state, Tick(50.0))
    assert effects == ()
    assert state.deadline_s == pytest.approx(50.0 + LOCKSTEP_STEP_SECONDS + 10 * LOCKSTEP_SECONDS_PER_TOKEN)


def test_a_group_that_stands_has_no_deadline() -> None:
    assert transition(FENCED, Tick(1e9)) == (FENCED, ())


@pytest.mark.parametrize("state", [lead(2, 2, deadline_s=5.0), FENCED, GOING])
def test_a_lost_rank_ends_the_group_whole(state: GroupState) -> None:
    ended, effects = transition(state, RankLost(1))
    assert ended.phase is Phase.ENDED
    assert effects == (EndGroup("rank 1 is lost"),)
    for late in (says(0, 0, 0), RankLost(0), Tick(1e9)):
        assert transition(ended, late) == (ended, ())


def test_who_hears_of_a_newer_leader_grants_nothing_any_more() -> None:
    ended, effects = transition(GOING, says(0, 0, 0, leader=3))
    assert ended.phase is Phase.ENDED
    assert effects == (StepDown(3),)


def test_reports_to_an_older_leader_and_older_reports_change_nothing() -> None:
    state = group(says(0, 1, 1), says(1, 1, 1))
    for late in (says(0, 1, 1, leader=1), says(0, 1, 0), says(0, 0, 0)):
        assert transition(state, late) == (state, ())


@pytest.mark.parametrize("report", [says(2, 0, 0), says(-1, 0, 0), says(0, 0, 1), says(0, 1, 0)])
def test_a_report_that_no_rank_of_this_group_can_make_is_refused_and_changes_nothing(
    report: RankReport,
) -> None:
    with pytest.raises(RemoteProtocolError):
        transition(FENCED, report)
    assert group(says(0, 0, 0), says(1, 0, 0)) == FENCED


EVENTS: list[GroupEvent] = [says(0, 0, 0), Advance(0.0, 1), Pause(), Proceed(), RankLost(0), Tick(1e9)]
STATES = {
    Phase.FENCING: lead(2, 2, deadline_s=5.0),
    Phase.GRANTING: GOING,
    Phase.ENDED: msgspec.structs.replace(GOING, phase=Phase.ENDED),
}


@pytest.mark.parametrize(("phase", "event"), list(product(Phase, EVENTS)), ids=str)
def test_what_the_table_lacks_is_refused_and_what_it_has_leads_where_it_says(
    phase: Phase, event: GroupEvent
) -> None:
    state = STATES[phase]
    if (phase, type(event)) in TABLE:
        assert transition(state, event)[0].phase in TABLE[phase, type(event)]
    else:
        with pytest.raises(
            LocalProtocolError, match=f"{type(event).__name__} does not fit a group that is {phase}"
        ):
            transition(state, event)


def test_a_group_has_at_least_one_rank_and_at_most_the_bound() -> None:
    for ranks in (0, RANKS_MAX + 1):
        with pytest.raises(LocalProtocolError, match="outside 1 to"):
            lead(1, ranks, deadline_s=0.0)
    for ranks in (1, RANKS_MAX):
        assert lead(1, ranks, deadline_s=0.0).slowest == 0


@pytest.mark.parametrize(
    ("phase", "event", "hint"),
    [(Phase.FENCING, Advance(0.0, 1), "await its ranks"), (Phase.ENDED, Proceed(), "started anew")],
)
def test_what_does_not_fit_says_what_to_do(phase: Phase, event: GroupEvent, hint: str) -> None:
    with pytest.raises(LocalProtocolError, match=hint):
        transition(STATES[phase], event)


def test_a_report_is_cheap() -> None:
    """10 µs asked for; the machine that tests run on is busy, so the test allows ten times as much."""
    state = lead(2, 8, deadline_s=5.0)
    for number in range(8):
        state, _ = transition(state, says(number, 2, 1))
    report = says(3, 2, 2)
    seconds = min(timeit.repeat(lambda: transition(state, report), number=1000, repeat=5)) / 1000
    assert seconds < 100e-6


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="str does not fit"):
        transition(FENCED, "tea")  # type: ignore[arg-type]

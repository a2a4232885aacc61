"""A member walks to every target from every state, and nothing late, repeated or wrong moves it otherwise."""

import timeit

import pytest

from interlock.core import lifecycle
from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.identity import Epoch
from interlock.core.lifecycle import (
    Admission,
    AnswerHigher,
    Begin,
    Leave,
    MemberEffect,
    MemberState,
    Report,
    StepFailed,
    StepFinished,
    TargetHeard,
    TryAgain,
    admission,
    transition,
)
from interlock.core.targets import Mode, State, Step, Target

VERSIONS = ("v1", "v2")


def target(state: State, number: int = 1, *, mode: Mode = Mode.KEEP, version: str = "v1") -> Target:
    return Target(Epoch(1, number), state, mode, version)


def begun(effects: tuple[MemberEffect, ...]) -> Begin | None:
    return next((effect for effect in effects if isinstance(effect, Begin)), None)


def walk(member: MemberState, effects: tuple[MemberEffect, ...]) -> tuple[MemberState, list[Step]]:
    """Let every step succeed until none is begun."""
    steps = []
    while (begin := begun(effects)) is not None:
        steps.append(begin.step)
        version = begin.version if begin.step is Step.UPDATE else member.version
        member, effects = transition(member, StepFinished(begin.attempt, version))
        assert len(steps) < 10, steps
    return member, steps


def standing(state: State, *, mode: Mode = Mode.KEEP, version: str = "v1") -> MemberState:
    """A member that reached this target by the walk itself."""
    member, _ = transition(MemberState(), StepFinished(1, "v1"))
    member, _ = walk(*transition(member, TargetHeard(target(state, mode=mode, version=version))))
    assert member.standing == Epoch(1, 1)
    return member


def test_a_running_engine_that_missed_the_pause_stops_by_way_of_a_pause() -> None:
    """Hazard F1: RUNNING hears STOPPED; a table that refuses it is wedged for ever."""
    _, steps = walk(*transition(standing(State.RUNNING), TargetHeard(target(State.STOPPED, 9))))
    assert steps == [Step.PAUSE, Step.STOP]


def test_a_member_with_old_weights_pauses_and_takes_the_new_before_it_runs() -> None:
    _, steps = walk(*transition(standing(State.RUNNING), TargetHeard(target(State.RUNNING, 2, version="v2"))))
    assert steps == [Step.PAUSE, Step.UPDATE, Step.UNPAUSE]


def test_a_suspended_member_behind_in_weights_takes_its_memory_back_for_them() -> None:
    _, steps = walk(
        *transition(standing(State.SUSPENDED), TargetHeard(target(State.SUSPENDED, 2, version="v2")))
    )
    assert steps == [Step.RESUME, Step.UPDATE, Step.SUSPEND]


def test_a_stricter_pause_is_taken_again_and_a_laxer_one_is_not() -> None:
    """Hazard F1: a second pause(abort) while PAUSED(keep) was idempotent, that is, ignored."""
    member, steps = walk(
        *transition(standing(State.PAUSED), TargetHeard(target(State.PAUSED, 2, mode=Mode.ABORT)))
    )
    assert steps == [Step.PAUSE]
    assert member.mode is Mode.ABORT
    _, steps = walk(*transition(member, TargetHeard(target(State.PAUSED, 3, mode=Mode.WAIT))))
    assert steps == []


def test_a_pause_under_way_is_begun_again_more_strictly_and_the_first_end_is_not_looked_at() -> None:
    waiting, effects = transition(
        standing(State.RUNNING), TargetHeard(target(State.PAUSED, 2, mode=Mode.WAIT))
    )
    first = begun(effects)
    aborting, effects = transition(waiting, TargetHeard(target(State.PAUSED, 3, mode=Mode.ABORT)))
    second = begun(effects)
    assert first is not None
    assert second is not None
    assert (second.step, second.mode) == (Step.PAUSE, Mode.ABORT)
    assert transition(aborting, StepFinished(first.attempt, "v1")) == (aborting, ())
    assert transition(aborting, StepFailed(first.attempt, "cancelled")) == (aborting, ())
    done, _ = transition(aborting, StepFinished(second.attempt, "v1"))
    assert done.standing == Epoch(1, 3)


def test_a_pause_that_waits_for_requests_is_cut_short_when_the_fleet_runs_again() -> None:
    waiting, _ = transition(standing(State.RUNNING), TargetHeard(target(State.PAUSED, 2, mode=Mode.WAIT)))
    _, effects = transition(waiting, TargetHeard(target(State.RUNNING, 3)))
    begin = begun(effects)
    assert begin is not None
    assert (begin.step, begin.mode) == (Step.PAUSE, Mode.KEEP)


def test_a_newcomer_stands_paused_before_it_runs() -> None:
    member, _ = transition(MemberState(), StepFinished(1, "v1"))
    assert member.state is State.PENDING_WEIGHTS
    _, steps = walk(*transition(member, TargetHeard(target(State.RUNNING))))
    assert steps == [Step.PAUSE, Step.UNPAUSE]


def test_a_target_heard_while_starting_is_walked_to_once_the_start_is_over() -> None:
    member, effects = transition(MemberState(), TargetHeard(target(State.RUNNING, version="v2")))
    assert begun(effects) is None
    _, steps = walk(*transition(member, StepFinished(1, "v1")))
    assert steps == [Step.PAUSE, Step.UPDATE, Step.UNPAUSE]


def test_an_engine_may_be_stopped_while_it_starts() -> None:
    member, steps = walk(*transition(MemberState(), TargetHeard(target(State.STOPPED))))
    assert steps == [Step.STOP]
    assert member.state is State.STOPPED


# --- what is late, repeated or contradictory -----------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.RUNNING, State.PAUSED, State.SUSPENDED])
def test_a_lower_epoch_is_answered_with_the_higher_target_and_changes_nothing(state: State) -> None:
    member = standing(state)
    old = Target(Epoch(0, 99), State.STOPPED, Mode.ABORT, "v9")
    assert transition(member, TargetHeard(old)) == (member, (AnswerHigher(target(state)),))


def test_a_repeated_target_is_reported_and_changes_nothing() -> None:
    member = standing(State.PAUSED)
    assert transition(member, TargetHeard(target(State.PAUSED))) == (member, (Report(),))


def test_one_epoch_told_with_two_targets_is_refused_and_changes_nothing() -> None:
    member = standing(State.PAUSED)
    with pytest.raises(RemoteProtocolError, match="told with two targets: PAUSED and then RUNNING"):
        transition(member, TargetHeard(target(State.RUNNING)))
    assert member == standing(State.PAUSED)


@pytest.mark.parametrize("event", [StepFinished(99, "v1"), StepFailed(99, "why")])
def test_the_end_of_a_step_never_begun_is_refused_and_changes_nothing(event: lifecycle.MemberEvent) -> None:
    member = standing(State.PAUSED)
    with pytest.raises(LocalProtocolError, match="attempt 99 ended"):
        transition(member, event)
    assert member == standing(State.PAUSED)


def test_a_step_ends_once() -> None:
    member = standing(State.PAUSED)
    with pytest.raises(LocalProtocolError, match="in PAUSED"):
        transition(member, StepFinished(member.attempt, "v1"))


# --- steps that fail -----------------------------------------------------------------------------------------------------


def under_way(start: MemberState, to: Target) -> tuple[MemberState, Begin]:
    member, effects = transition(start, TargetHeard(to))
    begin = begun(effects)
    assert begin is not None
    return member, begin


def test_a_failed_update_leaves_version_none_and_is_not_repeated_before_a_higher_epoch() -> None:
    member, begin = under_way(standing(State.PAUSED), target(State.PAUSED, 2, version="v2"))
    failed, effects = transition(member, StepFailed(begin.attempt, "no such weights"))
    assert effects == (Report(),)
    assert (failed.state, failed.version, failed.failed) == (State.PAUSED, None, "no such weights")
    assert failed.standing is None
    same, effects = transition(failed, TargetHeard(target(State.PAUSED, 2, version="v2")))
    assert begun(effects) is None
    _, steps = walk(*transition(same, TargetHeard(target(State.PAUSED, 3, version="v2"))))
    assert steps == [Step.UPDATE]


@pytest.mark.parametrize(
    ("start", "to"),
    [
        (State.RUNNING, State.PAUSED),
        (State.PAUSED, State.RUNNING),
        (State.PAUSED, State.SUSPENDED),
        (State.SUSPENDED, State.PAUSED),
    ],
)
def test_a_step_that_failed_half_way_ends_the_member(start: State, to: State) -> None:
    member, begin = under_way(standing(start), target(to, 2))
    stopping, effects = transition(member, StepFailed(begin.attempt, "out of memory"))
    begin = begun(effects)
    assert begin is not None
    assert begin.step is Step.STOP
    stopped, effects = transition(stopping, StepFinished(begin.attempt, None))
    assert stopped.state is State.STOPPED
    assert isinstance(effects[-1], Leave)


@pytest.mark.parametrize("start", [State.RUNNING, State.PAUSED])
def test_a_step_that_failed_and_changed_nothing_leaves_the_member_where_it_was(start: State) -> None:
    to = State.PAUSED if start is State.RUNNING else State.SUSPENDED
    member, begin = under_way(standing(start), target(to, 2))
    back, effects = transition(member, StepFailed(begin.attempt, "cannot", unchanged=True))
    assert effects == (Report(),)
    assert back.state is start
    assert back.standing is None


def test_a_stricter_pause_that_failed_is_not_taken_to_be_in_force() -> None:
    member, begin = under_way(standing(State.PAUSED), target(State.PAUSED, 2, mode=Mode.ABORT))
    back, _ = transition(member, StepFailed(begin.attempt, "busy", unchanged=True))
    _, steps = walk(*transition(back, TargetHeard(target(State.PAUSED, 3, mode=Mode.ABORT))))
    assert steps == [Step.PAUSE]


def test_the_origin_of_a_pause_begun_twice_is_where_the_first_began() -> None:
    member, _ = under_way(standing(State.RUNNING), target(State.PAUSED, 2, mode=Mode.WAIT))
    member, begin = under_way(member, target(State.PAUSED, 3, mode=Mode.ABORT))
    back, _ = transition(member, StepFailed(begin.attempt, "busy", unchanged=True))
    assert (back.state, back.mode) == (State.RUNNING, None)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_an_update_that_fails_says_nothing_of_the_one_that_was_asked_for_meanwhile(version: str) -> None:
    """Found by seed 32: two trainers update at once, and the second was told the first one's failure as its own."""
    member, begin = under_way(standing(State.PAUSED), target(State.PAUSED, 2, version="v2"))
    member, effects = transition(member, TargetHeard(target(State.PAUSED, 3, version=version)))
    assert begun(effects) is None
    member, effects = transition(member, StepFailed(begin.attempt, "v2 is torn"))
    assert (member.failed, member.version) == (None, None)
    again = begun(effects)
    assert again is not None
    assert (again.step, again.version) == (Step.UPDATE, version)
    assert transition(member, StepFailed(again.attempt, "torn, too"))[0].failed == "torn, too"


def test_a_pause_that_fails_is_tried_once_more_for_who_asked_meanwhile() -> None:
    member, begin = under_way(standing(State.RUNNING), target(State.PAUSED, 2))
    member, _ = transition(member, TargetHeard(target(State.PAUSED, 3)))
    member, effects = transition(member, StepFailed(begin.attempt, "busy", unchanged=True))
    again = begun(effects)
    assert again is not None
    assert again.step is Step.PAUSE
    back, effects = transition(member, StepFailed(again.attempt, "busy", unchanged=True))
    assert (back.state, back.failed, effects) == (State.RUNNING, "busy", (Report(),))


@pytest.mark.parametrize("unchanged", [False, True])
@pytest.mark.parametrize(
    ("start", "to", "version", "begun_for_it"),
    [
        (State.RUNNING, State.STOPPED, "v1", True),
        (State.RUNNING, State.PAUSED, "v1", False),
        (State.PAUSED, State.PAUSED, "v2", False),
        (State.PAUSED, State.SUSPENDED, "v1", False),
        (State.PAUSED, State.RUNNING, "v1", False),
        (State.SUSPENDED, State.PAUSED, "v1", False),
    ],
)
def test_no_step_that_fails_keeps_a_member_from_being_stopped(
    start: State, to: State, version: str, begun_for_it: bool, unchanged: bool
) -> None:
    """Found by seed 32: a STOP crossed an update that failed, and that engine stood PAUSED for ever; STOP is not legal twice."""
    member, begin = under_way(standing(start), target(to, 2, version=version))
    if not begun_for_it:
        member, effects = transition(member, TargetHeard(target(State.STOPPED, 3)))
        assert begun(effects) is None
    member, effects = transition(member, StepFailed(begin.attempt, "it broke", unchanged))
    member, steps = walk(member, effects)
    assert steps == [Step.STOP]
    assert (member.state, member.standing, member.failed) == (State.STOPPED, member.epoch, None)


def waiting() -> tuple[MemberState, Begin]:
    """An UNPAUSE failed, and its cause may pass."""
    member, begin = under_way(standing(State.PAUSED), target(State.RUNNING, 2))
    member, effects = transition(member, StepFailed(begin.attempt, "full", unchanged=True, may_pass=True))
    assert (member.state, member.failed, member.waits, effects) == (State.PAUSED, "full", True, (Report(),))
    return member, begin


def test_a_step_whose_cause_may_pass_is_begun_anew_when_the_driver_has_waited() -> None:
    member, begin = waiting()
    assert member.standing is None
    again, effects = transition(member, TryAgain(begin.attempt))
    second = begun(effects)
    assert second is not None
    assert (second.step, second.attempt) == (Step.UNPAUSE, begin.attempt + 1)
    assert (again.failed, again.waits) == (None, False)
    assert transition(again, TryAgain(begin.attempt)) == (again, ()), "once"
    failed, _ = transition(again, StepFailed(second.attempt, "torn", unchanged=True))
    assert (failed.failed, failed.waits) == ("torn", False)
    done, _ = transition(again, StepFinished(second.attempt, "v1"))
    assert done.standing == Epoch(1, 2)


@pytest.mark.parametrize(("unchanged", "may_pass"), [(True, False), (False, False), (False, True)])
def test_a_step_that_changed_something_or_fails_for_good_is_not_tried_again(
    unchanged: bool, may_pass: bool
) -> None:
    member, begin = under_way(standing(State.PAUSED), target(State.PAUSED, 2, version="v2"))
    member, _ = transition(member, StepFailed(begin.attempt, "torn", unchanged, may_pass))
    assert not member.waits
    assert transition(member, TryAgain(begin.attempt)) == (member, ())


@pytest.mark.parametrize("state", [State.PAUSED, State.RUNNING, State.STOPPED])
def test_a_wait_is_over_with_the_next_target(state: State) -> None:
    member, begin = waiting()
    after, effects = transition(member, TargetHeard(target(state, 3)))
    assert (after.failed, after.waits) == (None, False)
    assert transition(after, TryAgain(begin.attempt)) == (after, ())
    end, _ = walk(after, effects)
    assert end.standing == Epoch(1, 3)


def test_a_step_that_failed_for_a_lower_epoch_waits_for_nothing() -> None:
    member, begin = under_way(standing(State.PAUSED), target(State.RUNNING, 2))
    member, _ = transition(member, TargetHeard(target(State.SUSPENDED, 3)))
    member, effects = transition(member, StepFailed(begin.attempt, "full", unchanged=True, may_pass=True))
    assert (member.failed, member.waits) == (None, False)
    _, steps = walk(member, effects)
    assert steps == [Step.SUSPEND]


def test_a_start_or_a_stop_that_failed_leaves() -> None:
    failed, effects = transition(MemberState(), StepFailed(1, "no GPU"))
    assert failed.state is State.STOPPED
    assert effects == (Report(), Leave("no GPU"))
    member, begin = under_way(standing(State.PAUSED), target(State.STOPPED, 2))
    assert transition(member, StepFailed(begin.attempt, "hangs"))[0].state is State.STOPPED


def test_a_stopped_member_stays_stopped_whatever_it_hears() -> None:
    member = standing(State.STOPPED)
    after, effects = transition(member, TargetHeard(target(State.RUNNING, 2)))
    assert after.state is State.STOPPED
    assert isinstance(effects[-1], Leave)
    assert after.standing is None


def test_weights_lost_in_a_suspension_are_taken_again_before_the_member_stands() -> None:
    """A level-2 sleeper of vLLM wakes without weights."""
    member, begin = under_way(standing(State.SUSPENDED), target(State.PAUSED, 2))
    _, steps = walk(*transition(member, StepFinished(begin.attempt, None)))
    assert steps == [Step.UPDATE]
    suspending, begin = under_way(standing(State.PAUSED), target(State.SUSPENDED, 2))
    suspended, _ = transition(suspending, StepFinished(begin.attempt, None))
    assert suspended.version == "v1"


# --- work ----------------------------------------------------------------------------------------------------------------


def test_work_begins_only_at_the_epoch_heard_and_standing_running() -> None:
    running, paused = standing(State.RUNNING), standing(State.PAUSED)
    assert admission(running, Epoch(1, 1)) is Admission.ADMIT
    assert admission(running, Epoch(1, 0)) is Admission.SENDER_BEHIND
    assert admission(running, Epoch(2, 0)) is Admission.MEMBER_BEHIND
    assert admission(paused, Epoch(1, 1)) is Admission.NOT_RUNNING
    assert admission(MemberState(), Epoch()) is Admission.NOT_RUNNING


def test_a_transition_is_cheap() -> None:
    """10 µs asked for; the machine that tests run on is busy, so the test allows ten times as much."""
    member, event = standing(State.RUNNING), TargetHeard(target(State.PAUSED, 2))
    seconds = min(timeit.repeat(lambda: transition(member, event), number=1000, repeat=5)) / 1000
    assert seconds < 100e-6


def test_what_is_no_event_is_refused_naming_it_and_the_state() -> None:
    with pytest.raises(LocalProtocolError, match="'tea' is no event of a member that is PAUSED"):
        transition(standing(State.PAUSED), "tea")  # type: ignore[arg-type]

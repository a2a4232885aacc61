"""From every state there is a step towards every target, and each begins only where it is legal."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.identity import Epoch
from interlock.core.lifecycle import Begin, MemberEffect, MemberState, StepFinished, TargetHeard, transition
from interlock.core.targets import BEGUN, FINISHED, PATH, TARGETS, Mode, State, Step, Target, next_step

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


def test_the_walk_has_a_step_for_every_state_and_every_target() -> None:
    assert set(PATH) == set(product(State, TARGETS))


@given(
    st.sampled_from(State),
    st.sampled_from([*VERSIONS, None]),
    st.sampled_from([*Mode, None]),
    st.sampled_from(TARGETS),
    st.sampled_from(Mode),
)
def test_next_step_is_total_and_a_step_begins_only_where_it_is_legal(
    state: State, version: str | None, mode: Mode | None, to: State, wanted: Mode
) -> None:
    step = next_step(state, version, mode, target(to, mode=wanted))
    legal_from = {
        Step.PAUSE: {State.RUNNING, State.PENDING_WEIGHTS, State.PAUSED, State.PAUSING},
        Step.UNPAUSE: {State.PAUSED},
        Step.UPDATE: {State.PAUSED},
        Step.SUSPEND: {State.PAUSED},
        Step.RESUME: {State.SUSPENDED},
        Step.STOP: {State.STARTING, State.PENDING_WEIGHTS, State.PAUSED, State.SUSPENDED},
        Step.LEAVE: {State.STOPPED},
        Step.STAND: set(TARGETS),
        Step.WAIT: set(FINISHED),
    }
    assert state in legal_from[step]


@pytest.mark.parametrize(
    ("state", "version", "mode", "to"),
    [
        (state, version, mode, to)
        for state, version, mode, to in product(State, (*VERSIONS, None), (*Mode, None), TARGETS)
        if state is not State.STOPPED
    ],
)
def test_every_target_is_reached_from_every_state_by_steps_that_succeed(
    state: State, version: str | None, mode: Mode | None, to: State
) -> None:
    member = MemberState(state=state, version=version, mode=mode)
    wanted = target(to, mode=Mode.ABORT, version="v2")
    after, effects = transition(member, TargetHeard(wanted))
    if begun(effects) is None and after.state in FINISHED:  # what was under way ends first
        end = "v1" if state is State.STARTING else version
        after, effects = transition(after, StepFinished(after.attempt, end))
    after, _ = walk(after, effects)
    if state is State.STOPPING:
        assert after.state is State.STOPPED
    else:
        assert after.standing == wanted.epoch


def test_begun_and_finished_are_of_the_same_states() -> None:
    assert set(BEGUN.values()) == set(FINISHED)


@pytest.mark.parametrize(
    ("under_way", "to", "wanted", "step"),
    [
        (Mode.WAIT, State.PAUSED, Mode.ABORT, Step.PAUSE),
        (Mode.ABORT, State.PAUSED, Mode.KEEP, Step.WAIT),
        (Mode.KEEP, State.SUSPENDED, Mode.KEEP, Step.WAIT),
        (Mode.WAIT, State.RUNNING, Mode.WAIT, Step.PAUSE),
        (Mode.KEEP, State.RUNNING, Mode.ABORT, Step.WAIT),
        (Mode.WAIT, State.STOPPED, Mode.ABORT, Step.WAIT),
    ],
)
def test_a_pause_under_way_is_begun_again_only_to_be_stricter_or_to_be_cut_short(
    under_way: Mode, to: State, wanted: Mode, step: Step
) -> None:
    assert next_step(State.PAUSING, "v1", under_way, target(to, mode=wanted)) is step

"""What listeners of a command are told before it has ended, and when it has, or was overtaken."""

from __future__ import annotations

import pytest

from interlock.core.fleet_state import FleetState, Phase
from interlock.core.identity import Epoch
from interlock.core.roster import Condition, MemberRecord
from interlock.core.targets import Command, Hold, Mode, State
from interlock.fleet.command_book import judge, progress_of
from interlock.fleet.coordinator_state import CommandRecord


def test_half_of_a_composite_is_not_told_as_the_end() -> None:
    """Whoever hears *done* stops listening: a stop by way of a pause is done when it has stopped, not when it stands."""
    stop = CommandRecord(
        owner="me", command_id="1", command="STOP", epoch=Epoch(1, 2), wanted=State.STOPPED, deadline_s=60.0
    )
    progress = progress_of(stop, Condition((), True, True, "every member is PAUSED"))
    assert (progress.done, progress.ok) == (False, False)
    assert progress.message == "every member is PAUSED"


def command(verb: Command, wanted: State, version: str | None = None) -> CommandRecord:
    return CommandRecord(
        owner="me",
        command_id="1",
        command=verb,
        epoch=Epoch(1, 2),
        wanted=wanted,
        deadline_s=60.0,
        version=version,
    )


def fleet(state: State, *, stop_for: str | None = None, version: str = "v1") -> FleetState:
    holds = (Hold("other", Mode.WAIT),) if state is State.PAUSED else ()
    return FleetState(Phase.LEADING, Epoch(1, 9), state, version, holds=holds, stop_for=stop_for)


def member(state: State, standing: Epoch | None) -> MemberRecord:
    return MemberRecord("e", 1, state, Epoch(1, 9), standing, "v1")


@pytest.mark.parametrize("verb", [Command.START, Command.UNPAUSE])
def test_what_a_stop_by_way_of_a_pause_overtook_is_told_at_once_and_not_at_its_deadline(
    verb: Command,
) -> None:
    """The pause may wait for requests that take an hour."""
    pausing = fleet(State.PAUSED, stop_for="other")
    after, _ = judge(command(verb, State.RUNNING), pausing, [member(State.PAUSING, None)], 1.0)
    assert (after.done, after.ok) == (True, False)
    assert after.message.startswith("superseded: the fleet's target is PAUSED")


def test_a_start_that_another_with_other_weights_overtook_is_not_told_as_done() -> None:
    runs = member(State.RUNNING, Epoch(1, 9))
    start = command(Command.START, State.RUNNING, "v5")
    after, _ = judge(start, fleet(State.RUNNING, version="v6"), [runs], 1.0)
    assert (after.done, after.ok) == (True, False)
    assert "the weights asked for are 'v6'" in after.message
    assert judge(start, fleet(State.RUNNING, version="v5"), [runs], 1.0)[0].ok


def test_a_stop_that_is_late_in_its_first_half_says_that_it_goes_on_and_how_it_is_called_off() -> None:
    pausing = fleet(State.PAUSED, stop_for="other")
    after, _ = judge(command(Command.STOP, State.STOPPED), pausing, [member(State.PAUSING, None)], 61.0)
    assert (after.done, after.ok) == (True, False)
    assert (
        "e did not get there by the deadline; it still goes there, unless UNPAUSE releases" in after.message
    )

"""Commands are judged once, on the fleet's target; holds have owners; what is refused changes nothing."""

import timeit
from itertools import product

import pytest

from interlock.core.commands import INSTEAD, LEGAL, CommandRefused, transition
from interlock.core.errors import ProtocolError
from interlock.core.fleet_state import (
    Accept,
    Commanded,
    FleetState,
    Persist,
    Phase,
    Settled,
    TellMembers,
    Tick,
    allot,
)
from interlock.core.identity import Epoch
from interlock.core.limits import HOLDS_MAX
from interlock.core.targets import TARGETS, Command, Hold, Mode, State

C, S = Command, State
RUNNING = FleetState(Phase.LEADING, Epoch(1, 1), S.RUNNING, "v1")


def do(fleet: FleetState, command: Command, owner: str = "a", **more: object) -> FleetState:
    return transition(fleet, Commanded(command, owner, **more))[0]  # type: ignore[arg-type]


PAUSED = do(RUNNING, C.PAUSE)
SUSPENDED = do(PAUSED, C.SUSPEND)
STOPPED = do(PAUSED, C.STOP)
AT = {S.RUNNING: RUNNING, S.PAUSED: PAUSED, S.SUSPENDED: SUSPENDED, S.STOPPED: STOPPED}


def test_every_command_at_every_target_is_either_legal_or_told_what_to_do_instead() -> None:
    assert set(LEGAL) | set(INSTEAD) == set(product(Command, TARGETS))
    assert not set(LEGAL) & set(INSTEAD)


@pytest.mark.parametrize(("command", "state"), LEGAL)
def test_a_legal_command_is_stored_then_answered_then_told(command: Command, state: State) -> None:
    fleet = AT[state]
    owner = "b" if command is C.PAUSE else "a"
    after, effects = transition(fleet, Commanded(command, owner, version="v2"))
    assert after.state is LEGAL[command, state]
    assert after.epoch == Epoch(1, fleet.epoch.number + 1)
    assert effects == (Persist(), Accept(command, after.epoch), TellMembers(after.target))


@pytest.mark.parametrize(("command", "state"), INSTEAD)
def test_an_illegal_command_names_state_command_and_remedy_and_changes_nothing(
    command: Command, state: State
) -> None:
    fleet = AT[state]
    with pytest.raises(CommandRefused) as refused:
        transition(fleet, Commanded(command, "a", version="v2"))
    assert isinstance(refused.value, ProtocolError)
    for word in (command, state, INSTEAD[command, state], f"at epoch {fleet.epoch.number}:"):
        assert word in str(refused.value)
    assert refused.value.fields["epoch"] == fleet.epoch
    assert refused.value.fields["command"] is command
    assert refused.value.fields["state"] is state


def test_resume_of_a_paused_fleet_is_told_that_the_command_is_unpause() -> None:
    with pytest.raises(CommandRefused, match=r"vLLM's resume.*UNPAUSE"):
        do(PAUSED, C.RESUME)


# --- holds ---------------------------------------------------------------------------------------------------------------


def test_the_fleet_runs_when_no_hold_remains() -> None:
    both = do(PAUSED, C.PAUSE, "b")
    one = do(both, C.UNPAUSE, "a")
    assert (one.state, one.holds) == (S.PAUSED, (Hold("b"),))
    assert do(one, C.UNPAUSE, "b").state is S.RUNNING


def test_the_strictest_hold_wins_and_its_end_relaxes_the_rest() -> None:
    wait = do(RUNNING, C.PAUSE, "a", mode=Mode.WAIT)
    abort = do(wait, C.PAUSE, "b", mode=Mode.ABORT)
    assert (wait.mode, abort.mode, do(abort, C.UNPAUSE, "b").mode) == (Mode.WAIT, Mode.ABORT, Mode.WAIT)
    assert RUNNING.mode is Mode.KEEP


def test_a_pause_repeated_by_its_owner_changes_nothing() -> None:
    fleet, effects = transition(PAUSED, Commanded(C.PAUSE, "a", mode=Mode.WAIT))
    assert fleet == PAUSED
    assert effects == (Accept(C.PAUSE, PAUSED.epoch),)


def test_an_owner_may_make_its_hold_stricter_or_longer_never_laxer_or_shorter() -> None:
    held = do(RUNNING, C.PAUSE, mode=Mode.KEEP, deadline_s=10.0)
    assert do(held, C.PAUSE, mode=Mode.ABORT, deadline_s=5.0).holds == (Hold("a", Mode.ABORT, 10.0),)
    assert do(held, C.PAUSE, mode=Mode.WAIT, deadline_s=20.0).holds == (Hold("a", Mode.KEEP, 20.0),)
    assert do(held, C.PAUSE).holds == (Hold("a", Mode.KEEP, None),)


def test_an_administrator_breaks_anothers_hold_by_name_and_keeps_his_own() -> None:
    both = do(PAUSED, C.PAUSE, "b")
    assert do(both, C.UNPAUSE, "b", break_hold_of="a").holds == (Hold("b"),)
    with pytest.raises(CommandRefused, match="'c' holds nothing; the owners are a, b"):
        do(both, C.UNPAUSE, "b", break_hold_of="c")


def test_holds_are_bounded() -> None:
    fleet = RUNNING
    for number in range(HOLDS_MAX):
        fleet = do(fleet, C.PAUSE, f"owner-{number}")
    with pytest.raises(CommandRefused, match=f"{HOLDS_MAX} holds are placed"):
        do(fleet, C.PAUSE, "one-more")
    assert do(fleet, C.PAUSE, "owner-0") == fleet


def test_a_hold_ends_at_its_deadline_as_if_its_owner_had_unpaused() -> None:
    held = do(do(RUNNING, C.PAUSE, "a", deadline_s=10.0), C.PAUSE, "b")
    assert transition(held, Tick(9.9)) == (held, ())
    after, effects = transition(held, Tick(10.0))
    assert after.holds == (Hold("b"),)
    assert effects == (Persist(), TellMembers(after.target))


def test_a_hold_does_not_end_where_unpause_is_not_legal() -> None:
    held = do(RUNNING, C.PAUSE, deadline_s=10.0)
    for busy in (do(held, C.SUSPEND), do(held, C.UPDATE, version="v2"), do(held, C.STOP)):
        assert transition(busy, Tick(99.0)) == (busy, ())
    back = do(do(held, C.SUSPEND), C.RESUME)
    assert transition(back, Tick(99.0))[0].state is S.RUNNING


# --- weights -------------------------------------------------------------------------------------------------------------


def test_while_an_update_is_under_way_or_failed_only_update_and_stop_are_legal() -> None:
    """Hazard W4: B unpauses while A loads weights, and the fleet decodes with half of them."""
    updating = do(PAUSED, C.UPDATE, version="v2")
    for state in (updating, transition(updating, Settled(updating.epoch, False))[0]):
        for command in (C.UNPAUSE, C.SUSPEND, C.PAUSE):
            with pytest.raises(CommandRefused, match="'v2' is under way or has failed"):
                do(state, command)
        assert do(state, C.UPDATE, version="v3").version == "v3"
        assert do(state, C.STOP).state is S.STOPPED


def test_the_version_is_known_once_the_members_stand_at_the_updates_epoch() -> None:
    updating = do(PAUSED, C.UPDATE, version="v2")
    assert transition(updating, Settled(PAUSED.epoch, True)) == (updating, ())
    known, effects = transition(updating, Settled(updating.epoch, True))
    assert known.version_known
    assert effects == (Persist(),)
    assert transition(known, Settled(known.epoch, True)) == (known, ())
    assert do(known, C.UNPAUSE).state is S.RUNNING


def test_an_update_names_its_weights_and_so_does_a_start_after_a_failed_one() -> None:
    with pytest.raises(CommandRefused, match="names no version"):
        do(PAUSED, C.UPDATE)
    stopped = do(do(PAUSED, C.UPDATE, version="v2"), C.STOP)
    with pytest.raises(CommandRefused, match="names no version"):
        do(stopped, C.START)
    assert do(stopped, C.START, version="v1").version == "v1"


def test_a_start_releases_all_holds_and_takes_the_version_as_before() -> None:
    started = do(STOPPED, C.START)
    assert (started.state, started.holds, started.version) == (S.RUNNING, (), "v1")


# --- composites ----------------------------------------------------------------------------------------------------------


def test_a_stop_from_running_goes_on_without_its_client_once_the_pause_stands() -> None:
    """Hazard F1: a client that dies between the halves leaves the fleet paused."""
    first = do(RUNNING, C.STOP, composite=True)
    assert (first.state, first.stop_for) == (S.PAUSED, "a")
    assert transition(first, Settled(first.epoch, False)) == (first, ())
    second, effects = transition(first, Settled(first.epoch, True))
    assert (second.state, second.stop_for) == (S.STOPPED, None)
    assert effects == (Persist(), TellMembers(second.target))


def test_the_owner_of_a_stop_under_way_calls_it_off_by_unpausing() -> None:
    both = do(do(RUNNING, C.STOP, composite=True), C.PAUSE, "b")
    assert do(both, C.UNPAUSE, "b").stop_for == "a"
    assert do(both, C.UNPAUSE, "a").stop_for is None


def test_a_composite_stop_of_a_paused_fleet_is_a_stop() -> None:
    assert do(PAUSED, C.STOP, "b", composite=True).state is S.STOPPED


# --- who may decide ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "why"), [(Phase.RECOVERING, "lost its state"), (Phase.DEPOSED, "newer coordinator")]
)
def test_only_a_leader_decides_and_the_refusal_may_be_retried(phase: Phase, why: str) -> None:
    fleet = FleetState(phase, Epoch(1, 0), S.RUNNING, "v1", deadline_s=10.0)
    with pytest.raises(CommandRefused, match=why) as refused:
        do(fleet, C.PAUSE)
    assert refused.value.retryable
    assert transition(fleet, Settled(fleet.epoch, True)) == (fleet, ())


def test_recovery_ends_at_its_deadline() -> None:
    fleet = FleetState(Phase.RECOVERING, Epoch(1, 0), S.RUNNING, "v1", deadline_s=10.0)
    assert transition(fleet, Tick(9.9)) == (fleet, ())
    assert transition(fleet, Tick(10.0))[0].phase is Phase.LEADING


def test_an_epoch_only_grows() -> None:
    fleet, effects = allot(RUNNING)
    assert fleet.epoch > RUNNING.epoch
    assert isinstance(effects[0], Persist)


def test_a_decision_is_cheap() -> None:
    """10 µs asked for; the machine that tests run on is busy, so the test allows ten times as much."""
    ask = Commanded(C.PAUSE, "b")
    seconds = min(timeit.repeat(lambda: transition(PAUSED, ask), number=1000, repeat=5)) / 1000
    assert seconds < 100e-6


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(ProtocolError, match="'tea' is no event"):
        transition(PAUSED, "tea")  # type: ignore[arg-type]

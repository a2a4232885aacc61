"""A coordinator that lost its state becomes as strict as its members remember, and unpauses nobody."""

import msgspec
import pytest

from interlock.core.commands import transition
from interlock.core.fleet_state import (
    Commanded,
    Excused,
    FleetEffect,
    FleetState,
    Heard,
    Persist,
    Phase,
    Remembered,
    Settled,
    StepDown,
    TellMembers,
    Tick,
)
from interlock.core.identity import Epoch
from interlock.core.limits import HOLDS_MAX
from interlock.core.recovery import restarted
from interlock.core.targets import Command, Hold, KeptCache, Mode, State, Target

HOLD = Hold("trainer", Mode.ABORT, 12.0)


def told(state: State, term: int, number: int, *holds: Hold, version: str = "v1") -> Target:
    return Target(Epoch(term, number), state, Mode.KEEP, version, holds)


def recovering(*names: str, term: int = 7) -> FleetState:
    fleet, effects = restarted(None, term=term, version="v0", deadline_s=10.0, expected=frozenset(names))
    assert effects == ()
    assert fleet.phase is Phase.RECOVERING
    return fleet


def hear(
    fleet: FleetState, member: str, target: Target | None, version: str | None = "v1"
) -> tuple[FleetState, tuple[FleetEffect, ...]]:
    return transition(fleet, Heard(member, 1, State.PAUSED, target, version))


# --- with its state ------------------------------------------------------------------------------------------------------


def test_a_restart_with_state_tells_the_same_target_anew_in_its_own_term() -> None:
    kept = FleetState(Phase.LEADING, Epoch(3, 9), State.PAUSED, "v2", holds=(HOLD,))
    fleet, effects = restarted(kept, term=8, version="v0", deadline_s=0.0)
    assert fleet == msgspec.structs.replace(kept, epoch=Epoch(8, 1))
    assert effects == (Persist(), TellMembers(fleet.target))


def test_a_term_grows_even_when_the_election_says_otherwise() -> None:
    kept = FleetState(Phase.LEADING, Epoch(3, 9), State.RUNNING, "v2")
    assert restarted(kept, term=2, version="v0", deadline_s=0.0)[0].epoch == Epoch(4, 1)


def test_a_deposed_coordinator_that_restarts_listens_before_it_leads() -> None:
    kept = FleetState(Phase.DEPOSED, Epoch(3, 9), State.PAUSED, "v2", holds=(HOLD,))
    fleet, _ = restarted(kept, term=9, version="v0", deadline_s=1.0, expected=frozenset({"e0"}))
    assert fleet.phase is Phase.RECOVERING
    fleet, _ = hear(fleet, "e0", told(State.RUNNING, 5, 1))
    assert (fleet.phase, fleet.state, fleet.epoch) == (Phase.LEADING, State.PAUSED, Epoch(9, 1))


@pytest.mark.parametrize("known", [True, False])
def test_a_deposed_coordinator_knows_its_weights_only_if_it_knew_them(known: bool) -> None:
    kept = FleetState(Phase.DEPOSED, Epoch(3, 9), State.PAUSED, "v2", version_known=known, holds=(HOLD,))
    fleet, _ = restarted(kept, term=9, version="v0", deadline_s=1.0)
    assert transition(fleet, Tick(1.0))[0].version_known is known


# --- without -------------------------------------------------------------------------------------------------------------


def test_it_leads_when_all_that_it_expects_were_heard() -> None:
    fleet, effects = hear(recovering("e0", "e1"), "e0", told(State.RUNNING, 5, 1))
    assert fleet.phase is Phase.RECOVERING
    assert effects == ()
    fleet, effects = hear(fleet, "e1", None, None)
    assert (fleet.phase, fleet.state, fleet.epoch, fleet.version) == (
        Phase.LEADING,
        State.RUNNING,
        Epoch(7, 1),
        "v1",
    )
    assert effects == (Persist(), TellMembers(fleet.target))


def test_it_leads_at_its_deadline_and_still_awaits_who_was_not_heard() -> None:
    fleet, _ = hear(recovering("e0", "e1"), "e0", told(State.RUNNING, 5, 1))
    assert transition(fleet, Tick(9.9)) == (fleet, ())
    fleet, _ = transition(fleet, Tick(10.0))
    assert fleet.phase is Phase.LEADING
    assert fleet.awaited == {"e1"}
    fleet, effects = hear(fleet, "e1", None)
    assert fleet.awaited == frozenset()
    assert effects == (Persist(),)


def test_who_is_excused_is_not_awaited() -> None:
    fleet, _ = hear(recovering("e0", "e1"), "e0", told(State.RUNNING, 5, 1))
    assert transition(fleet, Excused("stranger", 1)) == (fleet, ())
    fleet, effects = transition(fleet, Excused("e1", 1))
    assert fleet.phase is Phase.LEADING
    assert isinstance(effects[0], Persist)


def test_the_term_is_above_every_epoch_reported() -> None:
    fleet, _ = hear(recovering("e0", term=7), "e0", told(State.RUNNING, 20, 3))
    assert fleet.epoch == Epoch(21, 1)


@pytest.mark.parametrize("order", [("e0", "e1"), ("e1", "e0")])
def test_the_most_restrictive_target_reported_is_taken_with_all_holds(order: tuple[str, str]) -> None:
    """Hazard F2: a coordinator without state unpaused a fleet in the middle of an update."""
    said = {
        "e0": told(State.PAUSED, 5, 1, HOLD, Hold("b")),
        "e1": told(State.RUNNING, 5, 2),
    }
    fleet = recovering(*order)
    for name in order:
        fleet, _ = hear(fleet, name, said[name])
    assert fleet.state is State.PAUSED
    assert [hold.owner for hold in fleet.holds] == ["b", "trainer"]
    assert fleet.mode is Mode.ABORT


def test_a_hold_of_another_life_has_no_deadline_for_its_clock_is_unknown() -> None:
    fleet, _ = hear(recovering("e0"), "e0", told(State.PAUSED, 5, 1, HOLD))
    assert fleet.holds == (Hold("trainer", Mode.ABORT, None),)
    assert transition(fleet, Tick(1e9)) == (fleet, ())


def test_an_interrupted_update_leaves_the_version_unknown() -> None:
    fleet, _ = hear(recovering("e0", "e1"), "e0", told(State.PAUSED, 5, 4, HOLD, version="v2"), "v2")
    fleet, _ = hear(fleet, "e1", told(State.PAUSED, 5, 4, HOLD, version="v2"), None)
    assert fleet.version == "v2"
    assert not fleet.version_known


def test_the_version_is_that_of_the_highest_epoch_reported() -> None:
    fleet, _ = hear(recovering("e0", "e1"), "e0", told(State.RUNNING, 5, 4, version="v2"), "v2")
    fleet, _ = hear(fleet, "e1", told(State.RUNNING, 5, 1, version="v1"), "v1")
    assert fleet.version == "v2"
    assert fleet.version_known


def test_the_first_start_of_all_runs_the_configured_version() -> None:
    fleet, _ = transition(recovering("e0"), Tick(10.0))
    assert (fleet.state, fleet.version, fleet.epoch) == (State.RUNNING, "v0", Epoch(7, 1))


# --- later ---------------------------------------------------------------------------------------------------------------


def lead(*targets: Target) -> FleetState:
    fleet = recovering(*(f"e{number}" for number in range(len(targets))))
    for number, target in enumerate(targets):
        fleet, _ = hear(fleet, f"e{number}", target)
    assert fleet.phase is Phase.LEADING
    return fleet


def test_a_member_that_turns_up_with_an_unknown_epoch_makes_the_target_stricter() -> None:
    fleet = lead(told(State.RUNNING, 5, 1))
    after, effects = hear(fleet, "e9", told(State.PAUSED, 5, 2, HOLD))
    assert (after.state, after.holds) == (State.PAUSED, (Hold("trainer", Mode.ABORT, None),))
    assert effects == (Persist(), TellMembers(after.target))
    assert after.version_known
    again, effects = hear(after, "e9", told(State.PAUSED, 5, 2, HOLD))
    assert (again, effects) == (after, ())


def test_it_never_makes_the_target_laxer() -> None:
    fleet = lead(told(State.SUSPENDED, 5, 1, HOLD))
    after, effects = hear(fleet, "e9", told(State.RUNNING, 5, 2))
    assert (after.target, after.basis, effects) == (fleet.target, Epoch(5, 2), (Persist(),))
    assert hear(after, "e9", told(State.RUNNING, 5, 2)) == (after, ())


# --- the weights that somebody remembers late ----------------------------------------------------------------------------


def newer(state: State, *holds: Hold) -> Target:
    return Target(Epoch(5, 2), state, Mode.KEEP, "v2", holds, "/weights/v2", KeptCache.KEEP)


def test_a_member_that_comes_late_teaches_its_newer_weights_and_nobody_goes_back() -> None:
    """New lives of all others have reported, the one that knows of the update comes after the deadline."""
    fleet, _ = hear(recovering("e0", "e1"), "e0", None, "v0")
    fleet, _ = transition(fleet, Tick(10.0))
    assert (fleet.state, fleet.version) == (State.RUNNING, "v0")
    after, effects = hear(fleet, "e1", newer(State.RUNNING), "v2")
    assert (after.state, after.version, after.weights, after.kv) == (
        State.RUNNING,
        "v2",
        "/weights/v2",
        KeptCache.KEEP,
    )
    assert after.version_known
    assert effects == (Persist(), TellMembers(after.target))
    assert after.epoch > fleet.epoch


def test_a_front_that_speaks_late_teaches_the_weights_too() -> None:
    fleet, _ = transition(recovering("e0"), Tick(10.0))
    after, _ = transition(fleet, Remembered(newer(State.RUNNING)))
    assert (after.version, after.weights) == ("v2", "/weights/v2")


@pytest.mark.parametrize("has", ["v2", None])
def test_other_weights_remembered_in_a_pause_are_taken_and_unknown_until_all_stand(has: str | None) -> None:
    after, _ = hear(lead(told(State.RUNNING, 5, 1)), "e9", newer(State.PAUSED, HOLD), has)
    assert (after.version, after.version_known) == ("v2", False)
    settled, _ = transition(after, Settled(after.epoch, ok=True))
    assert settled.version_known


def test_a_member_whose_update_was_interrupted_makes_the_weights_unknown() -> None:
    fleet = lead(told(State.PAUSED, 5, 1, HOLD))
    after, _ = hear(fleet, "e9", told(State.PAUSED, 5, 2, HOLD), None)
    assert (after.version, after.version_known) == ("v1", False)


@pytest.mark.parametrize("command", [Command.UPDATE, Command.START])
def test_weights_that_a_command_of_this_life_named_are_kept(command: Command) -> None:
    state = State.PAUSED if command is Command.UPDATE else State.STOPPED
    fleet, _ = transition(lead(told(state, 5, 1, HOLD)), Commanded(command, "a", version="v9", weights="/v9"))
    after, _ = hear(fleet, "e9", newer(State.RUNNING), "v2")
    assert (after.version, after.weights, after.version_known) == ("v9", "/v9", command is Command.START)


def test_a_start_that_names_no_weights_names_none_that_count() -> None:
    fleet, _ = transition(lead(told(State.STOPPED, 5, 1)), Commanded(Command.START, "a"))
    assert hear(fleet, "e9", newer(State.RUNNING), "v2")[0].version == "v2"


def test_a_hold_that_was_remembered_late_and_released_does_not_come_back_when_it_is_repeated() -> None:
    fleet, _ = hear(lead(told(State.RUNNING, 5, 1)), "e9", told(State.PAUSED, 5, 2, HOLD))
    fleet, _ = transition(fleet, Commanded(Command.UNPAUSE, "trainer"))
    assert fleet.state is State.RUNNING
    assert hear(fleet, "e9", told(State.PAUSED, 5, 2, HOLD)) == (fleet, ())
    assert transition(fleet, Remembered(told(State.PAUSED, 5, 2, HOLD))) == (fleet, ())


# --- START awaits new lives ----------------------------------------------------------------------------------------------


def started(*before: tuple[str, int]) -> FleetState:
    ask = Commanded(Command.START, "a", expected=frozenset({"e0", "e1"}), before=frozenset(before))
    fleet, _ = transition(lead(told(State.STOPPED, 5, 1)), ask)
    assert fleet.awaited == {"e0", "e1"}
    return fleet


def word(state: State, life: int, target: Target | None) -> Heard:
    return Heard("e0", life, state, target, "v1")


@pytest.mark.parametrize("restarted_within", ["", "with its state", "deposed"])
def test_neither_the_end_nor_the_last_words_of_the_life_before_excuse_whom_start_has_launched(
    restarted_within: str,
) -> None:
    fleet = started(("e0", 7))
    start = fleet.target
    if restarted_within == "deposed":
        fleet, _ = transition(fleet, Remembered(told(State.RUNNING, 90, 1)))
        assert fleet.phase is Phase.DEPOSED
    if restarted_within:
        kept = msgspec.json.decode(msgspec.json.encode(fleet), type=FleetState)
        fleet, _ = restarted(kept, term=9, version="v0", deadline_s=0.0)
    for late in (
        Excused("e0", 7),
        Excused("e0", 6),
        word(State.STOPPED, 7, told(State.STOPPED, 5, 1)),
        word(State.PAUSED, 7, told(State.STOPPED, 5, 1)),  # about to walk there
        word(State.STOPPED, 7, start),  # it has heard of START, too late
    ):
        assert transition(fleet, late) == (fleet, ())
    for counts in (
        word(State.PAUSED, 8, None),
        Excused("e0", 8),  # the new life died before its first word
        Excused("e0", 0),  # an administrator: nothing of that name
        word(State.RUNNING, 7, start),  # START overtook its STOP: it goes on
    ):
        after, effects = transition(fleet, counts)
        assert after.awaited == {"e1"}
        assert effects == (() if fleet.phase is Phase.RECOVERING else (Persist(),))
        assert after.state is State.RUNNING


def test_a_start_is_forgotten_when_the_last_was_heard() -> None:
    fleet = started(("e0", 7), ("e1", 3))
    fleet, _ = transition(fleet, word(State.PAUSED, 8, None))
    assert fleet.launch is not None
    fleet, _ = transition(fleet, Excused("e1", 4))
    assert (fleet.awaited, fleet.launch) == (frozenset(), None)


def test_an_epoch_that_was_already_known_changes_nothing() -> None:
    fleet = lead(told(State.PAUSED, 5, 2, HOLD))
    fleet, _ = transition(fleet, Commanded(Command.UNPAUSE, "trainer"))
    for stale in (
        told(State.PAUSED, 5, 1, HOLD),
        told(State.PAUSED, 5, 2, HOLD),
        told(State.PAUSED, 7, 1, HOLD),
    ):
        assert hear(fleet, "e9", stale) == (fleet, ())


def test_what_was_gathered_is_remembered_over_a_restart_with_state() -> None:
    fleet, _ = restarted(lead(told(State.RUNNING, 5, 1)), term=9, version="v0", deadline_s=0.0)
    after, _ = hear(fleet, "e9", told(State.PAUSED, 5, 2, HOLD))
    assert after.state is State.PAUSED
    assert hear(fleet, "e9", told(State.PAUSED, 7, 1, HOLD)) == (fleet, ())


def test_a_hold_that_both_know_keeps_its_deadline_and_takes_the_stricter_mode() -> None:
    fleet = lead(told(State.RUNNING, 5, 1))
    fleet, _ = transition(fleet, Commanded(Command.PAUSE, "trainer", mode=Mode.WAIT, deadline_s=5.0))
    after, _ = hear(fleet, "e9", told(State.PAUSED, 5, 2, HOLD))
    assert after.holds == (Hold("trainer", Mode.ABORT, 5.0),)


def test_a_hold_remembered_more_laxly_stays_as_strict_as_it_is() -> None:
    fleet = lead(told(State.PAUSED, 5, 1, HOLD), told(State.PAUSED, 5, 2, Hold("trainer", Mode.WAIT)))
    assert fleet.holds == (Hold("trainer", Mode.ABORT, None),)


def test_as_many_holds_as_the_bound_stay_as_they_are() -> None:
    many = tuple(Hold(f"a{number:03}") for number in range(HOLDS_MAX))
    assert lead(told(State.PAUSED, 5, 1, *many)).holds == many


def test_more_holds_than_the_bound_become_one_and_none_is_released() -> None:
    many = tuple(Hold(f"a{number:03}") for number in range(HOLDS_MAX))
    more = (Hold("b", Mode.ABORT), Hold("c"))
    fleet = lead(told(State.PAUSED, 5, 1, *many), told(State.PAUSED, 5, 2, *more))
    assert len(fleet.holds) == HOLDS_MAX
    assert fleet.holds[-1] == Hold("holds of an earlier coordinator", Mode.ABORT)


def test_who_hears_of_a_higher_epoch_leads_no_more() -> None:
    fleet = lead(told(State.RUNNING, 5, 1))
    deposed, effects = hear(fleet, "e0", told(State.RUNNING, 8, 1))
    assert deposed.phase is Phase.DEPOSED
    assert effects == (Persist(), StepDown(Epoch(8, 1)))
    assert hear(deposed, "e0", told(State.RUNNING, 9, 1)) == (deposed, ())


def test_who_is_deposed_writes_down_by_what_and_leads_above_it_though_nobody_says_it_again() -> None:
    """Found by seed 1012: fronts alone remember an epoch, and a life that begins below it would be dropped for a day."""
    fleet = lead(told(State.RUNNING, 5, 1))
    deposed, _ = hear(fleet, "e0", told(State.PAUSED, 90, 4, HOLD))
    again, _ = restarted(deposed, term=9, version="v0", deadline_s=1.0)
    assert again.phase is Phase.RECOVERING
    leading, _ = transition(again, Tick(1.0))
    assert (leading.epoch, leading.state, leading.holds[0].owner) == (
        Epoch(91, 1),
        State.PAUSED,
        "trainer",
    )


# --- fronts --------------------------------------------------------------------------------------------------------------


def test_what_a_front_remembers_counts_while_recovering_and_nobody_waits_for_it() -> None:
    fleet, effects = transition(recovering("e0"), Remembered(told(State.PAUSED, 50, 2, HOLD)))
    assert effects == ()
    assert fleet.phase is Phase.RECOVERING
    assert fleet.awaited == {"e0"}
    fleet, _ = hear(fleet, "e0", None, None)
    assert (fleet.phase, fleet.epoch, fleet.state) == (Phase.LEADING, Epoch(51, 1), State.PAUSED)


def test_a_front_that_remembers_a_higher_epoch_deposes_and_a_known_one_changes_nothing() -> None:
    fleet = lead(told(State.RUNNING, 5, 1))
    assert transition(fleet, Remembered(fleet.target)) == (fleet, ())
    assert transition(fleet, Remembered(told(State.RUNNING, 5, 1))) == (fleet, ())
    deposed, effects = transition(fleet, Remembered(told(State.RUNNING, 8, 1)))
    assert effects == (Persist(), StepDown(Epoch(8, 1)))
    assert transition(deposed, Remembered(told(State.RUNNING, 9, 1))) == (deposed, ())


def test_a_front_that_remembers_a_pause_that_every_engine_forgot_makes_the_target_stricter() -> None:
    fleet = lead(told(State.RUNNING, 5, 1))
    after, effects = transition(fleet, Remembered(told(State.PAUSED, 5, 2, HOLD)))
    assert after.state is State.PAUSED
    assert effects == (Persist(), TellMembers(after.target))

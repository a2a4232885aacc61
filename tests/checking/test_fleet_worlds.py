"""The worlds of lifecycle and lockstep see what they must: each rule of ours, taken away, is missed in a story."""

from typing import Any

import msgspec
import pytest

from interlock.checking.explorer import Result, World, explore
from interlock.checking.lifecycle_world import Lifecycle
from interlock.checking.lockstep_world import Lockstep
from interlock.checking.worlds.lifecycle import A_PAUSES, A_UNPAUSES, A_UPDATES, B_ABORTS, B_BREAKS, B_STOPS
from interlock.core import commands, lifecycle, lockstep, lockstep_leader
from interlock.core.fleet_state import Commanded, FleetState, Heard, Phase, Remembered, TellMembers
from interlock.core.lifecycle import MemberState, StepFailed, TargetHeard
from interlock.core.lockstep import Grant, RankReport, RankState
from interlock.core.lockstep_leader import GroupState, RankLost
from interlock.core.targets import Command, State, Step, Target

pytestmark = pytest.mark.explorer


def violation(world: World[Any], *, reduce: bool = True) -> str:
    found = explore(world, reduce=reduce, seconds_max=20.0).violation
    assert found is not None, "not seen"
    return f"{found.kind}: {found.what}"


def both_ways(world: World[Any]) -> tuple[Result, Result]:
    reduced, whole = explore(world, seconds_max=20.0), explore(world, reduce=False, seconds_max=20.0)
    assert reduced.exhausted
    assert whole.exhausted
    assert reduced.states < whole.states
    return reduced, whole


# --- reductions ----------------------------------------------------------------------------------------------------------


def test_the_reduction_of_the_lifecycle_world_judges_as_the_whole_world_does() -> None:
    world = Lifecycle(A_PAUSES, engines=2, deaths=1, freezes=1, restarts="with state")
    reduced, whole = both_ways(world)
    assert reduced.violation is whole.violation is None


def test_the_reduction_of_the_lockstep_world_judges_as_the_whole_world_does() -> None:
    reduced, whole = both_ways(Lockstep(ranks=2, steps=1, changes=1, deaths=1))
    plain = explore(
        Lockstep(ranks=2, steps=1, changes=1, deaths=1, worst_leaders=False), reduce=False, seconds_max=20.0
    )
    assert plain.exhausted
    assert reduced.violation is whole.violation is plain.violation is None


# --- the fleet without one of its rules ------------------------------------------------------------------------------------


def test_without_taking_the_strictest_target_that_members_remember_a_promised_pause_is_broken() -> None:
    def forgets(fleet: FleetState, event: Any) -> Any:
        if isinstance(event, Heard) and event.target is not None:
            running = msgspec.structs.replace(event.target, state=State.RUNNING, holds=())
            event = msgspec.structs.replace(event, target=running)
        return commands.transition(fleet, event)

    world = Lifecycle(A_PAUSES, engines=2, restarts="without state", fleet_transition=forgets)
    assert "a pause that its owner was promised is not released" in violation(world)


def test_a_coordinator_that_late_members_cannot_teach_their_weights_sends_them_back_to_old_ones() -> None:
    def learns_no_weights(fleet: FleetState, event: Any) -> Any:
        if isinstance(event, Heard) and event.target is not None and fleet.phase is Phase.LEADING:
            event = msgspec.structs.replace(event, target=_at(event.target, fleet.version))
        return commands.transition(fleet, event)

    faults: dict[str, Any] = {"engines": 1, "joiners": 1, "freezes": 1, "restarts": "without state"}
    world = Lifecycle(A_UPDATES, before=(A_PAUSES,), fleet_transition=learns_no_weights, **faults)
    assert "tells of weights v2, with which the fleet stood, and its coordinator wants v1" in violation(world)


def test_an_unpause_that_runs_the_fleet_whatever_holds_remain_breaks_a_promise() -> None:
    def runs(fleet: FleetState, event: Any) -> Any:
        after, effects = commands.transition(fleet, event)
        if isinstance(event, Commanded) and event.command is Command.UNPAUSE:
            after = msgspec.structs.replace(after, state=State.RUNNING)
            effects = (*effects[:-1], TellMembers(after.target))
        return after, effects

    world = Lifecycle(A_UNPAUSES, B_ABORTS, engines=1, before=(A_PAUSES,), fleet_transition=runs)
    assert "a pause that its owner was promised is not released" in violation(world)


def test_a_member_that_runs_with_the_weights_it_has_is_seen() -> None:
    """Hazard W4, the member's half: the coordinator's is that UNPAUSE is refused, a row of its unit tests."""

    def runs_as_it_is(core: MemberState, event: Any) -> Any:
        told = core.heard
        seen = msgspec.structs.replace(core, heard=told and _at(told, core.version))
        if isinstance(event, TargetHeard):
            told = told if told and event.target.epoch <= told.epoch else event.target
            event = TargetHeard(_at(event.target, core.version))
        after, effects = lifecycle.transition(seen, event)
        return msgspec.structs.replace(after, heard=told), effects

    world = Lifecycle(A_UPDATES, B_BREAKS, engines=1, before=(A_PAUSES,), member_transition=runs_as_it_is)
    assert violation(world).startswith("stuck")


def _at(target: Target, version: str | None) -> Target:
    return msgspec.structs.replace(target, version=version or target.version)


def test_a_member_that_a_failed_update_keeps_from_being_stopped_is_seen() -> None:
    """Found by the simulator (seed 32): STOP crosses an update that fails, and nobody may ask for STOP a second time."""

    def stands(core: MemberState, event: Any) -> Any:
        if isinstance(event, StepFailed) and core.state is State.UPDATING and event.attempt == core.attempt:
            return msgspec.structs.replace(core, state=State.PAUSED, version=None, failed=event.why), ()
        return lifecycle.transition(core, event)

    world = Lifecycle(A_UPDATES, B_STOPS, before=(A_PAUSES,), failures=1, engines=1, member_transition=stands)
    assert violation(world).startswith("stuck")


def test_a_front_whose_memory_nobody_asks_for_waits_for_ever_when_the_clock_stepped_back() -> None:
    """Found by the simulator (seed 1012): the disk is lost, every engine is new, and fronts drop the lower epoch."""

    def deaf(fleet: FleetState, event: Any) -> Any:
        return (fleet, ()) if isinstance(event, Remembered) else commands.transition(fleet, event)

    faults: dict[str, Any] = {"engines": 1, "deaths": 1, "restarts": "without state"}
    world = Lifecycle(A_PAUSES, front=True, clock_back=True, fleet_transition=deaf, **faults)
    assert violation(world).startswith("stuck")


def test_a_member_that_obeys_older_targets_is_seen() -> None:
    def obeys(core: MemberState, event: Any) -> Any:
        if isinstance(event, TargetHeard) and core.heard and event.target.epoch < core.heard.epoch:
            core = msgspec.structs.replace(core, heard=None)
        return lifecycle.transition(core, event)

    world = Lifecycle(A_PAUSES, B_ABORTS, engines=1, member_transition=obeys)
    assert violation(world)


def test_a_member_that_ignores_a_stricter_pause_is_seen() -> None:
    def ignores(core: MemberState, event: Any) -> Any:
        after, effects = lifecycle.transition(core, event)
        if core.state is State.PAUSED and any(getattr(e, "step", None) is Step.PAUSE for e in effects):
            mode = core.heard.mode if core.heard else core.mode
            return msgspec.structs.replace(core, heard=after.heard, mode=mode), ()
        return after, effects

    world = Lifecycle(A_PAUSES, B_ABORTS, engines=1, member_transition=ignores)
    assert violation(world)


# --- the group without one of its rules ------------------------------------------------------------------------------------


def test_without_the_fence_an_old_grant_reaches_one_rank_and_the_group_hangs() -> None:
    """Hazard F6 (a)."""

    def unfenced(rank: RankState, event: Any) -> Any:
        if isinstance(event, Grant) and event.leader_epoch < rank.leader_epoch:
            event = msgspec.structs.replace(event, leader_epoch=rank.leader_epoch)
        return lockstep.transition_rank(rank, event)

    world = Lockstep(ranks=2, steps=1, changes=1, rank_transition=unfenced)
    assert violation(world)


def test_a_new_leader_that_grants_the_minimum_strands_the_rank_that_went_on() -> None:
    def grants_less(group: GroupState, event: Any) -> Any:
        after, effects = lockstep_leader.transition(group, event)
        if isinstance(event, RankReport) and after.phase is lockstep_leader.Phase.GRANTING is not group.phase:
            least = min(report.granted for report in after.reports if report is not None)
            after = msgspec.structs.replace(after, granted=least)
            effects = tuple(
                lockstep_leader.Tell(Grant(e.word.leader_epoch, least)) if hasattr(e, "word") else e
                for e in effects
            )
        return after, effects

    # The leader hears of a step that it never granted, which no message in order could tell it.
    world = Lockstep(ranks=2, steps=1, changes=1, leader_transition=grants_less)
    assert "was granted step 1, and its leader 2 granted 0" in violation(world, reduce=False)


def test_a_group_whose_dead_rank_is_not_its_end_waits_for_ever() -> None:
    def shrugs(group: GroupState, event: Any) -> Any:
        return (group, ()) if isinstance(event, RankLost) else lockstep_leader.transition(group, event)

    assert violation(Lockstep(ranks=2, steps=1, deaths=1, leader_transition=shrugs)).startswith("stuck")


def test_a_leader_that_says_paused_before_all_have_reported_is_seen() -> None:
    def hasty(group: GroupState, event: Any) -> Any:
        after, effects = lockstep_leader.transition(group, event)
        if after.phase is lockstep_leader.Phase.GRANTING and after.pausing and isinstance(event, RankReport):
            report = msgspec.structs.replace(event, granted=after.granted, reached=after.granted)
            reports = tuple(msgspec.structs.replace(report, rank=rank) for rank in range(len(after.reports)))
            after = msgspec.structs.replace(after, reports=reports)
        return after, effects

    assert violation(Lockstep(ranks=2, steps=1, leader_transition=hasty)).startswith("safety")

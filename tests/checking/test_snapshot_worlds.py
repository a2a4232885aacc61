"""The snapshots' world sees what it should: each fault adds something, and each rule of the core that is taken away is missed."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from interlock.checking.explorer import explore
from interlock.checking.scope_model import Local
from interlock.checking.worlds.snapshots import Snapshots
from interlock.core.snapshot_events import CloseDirectory, Loaded, LoadRead, Missed
from interlock.core.snapshot_state import Phase, Scope
from interlock.core.snapshots import transition

pytestmark = pytest.mark.explorer
Outcome = tuple[Scope, tuple[Any, ...]]


def names_used_twice(scope: Scope, event: Any) -> Outcome:
    """The epoch does not count: the next life of an id has the directory of the one before."""
    after, effects = transition(scope, event)
    return (msgspec.structs.replace(after, epoch=0) if after.phase is Phase.EMPTY else after), effects


def no_second_look(scope: Scope, event: Any) -> Outcome:
    """A load returns what it read, without asking again."""
    load = next((each for each in scope.loads if isinstance(event, LoadRead)), None)
    after, effects = transition(scope, event)
    if load is None:
        return after, effects
    return after, tuple(
        Loaded(load) if isinstance(effect, Missed) and event.is_good else effect for effect in effects
    )


def erase_closes_descriptors(scope: Scope, event: Any) -> Outcome:
    """The directory's descriptor is closed when it is in the trash, whoever works through it."""
    after, effects = transition(scope, event)
    if scope.phase is Phase.MOVING and not any(isinstance(effect, CloseDirectory) for effect in effects):
        effects += tuple(CloseDirectory(folder.name) for folder in scope.folders if not folder.trashed)
    return after, effects


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        (names_used_twice, "made a second time"),
        (no_second_look, "returns life 0"),
        (erase_closes_descriptors, "which was closed"),
    ],
)
def test_a_rule_that_is_taken_away_is_missed(rule: Callable[..., Outcome], what: str) -> None:
    violation = explore(Snapshots(lives=(2,), transition=rule)).violation
    assert violation is not None
    assert what in violation.what


@pytest.mark.parametrize("fault", ["failed_writes", "failed_calls", "crashes", "erase_alls"])
def test_every_fault_of_the_budget_adds_states(fault: str) -> None:
    result = explore(Snapshots(lives=(2,), **{fault: 1}))
    assert result.violation is None
    assert result.exhausted
    assert result.states > explore(Snapshots(lives=(2,))).states


@pytest.mark.parametrize("fault", ["failed_writes", "failed_calls", "crashes", "erase_alls"])
def test_the_reduced_world_sees_every_state_of_the_scope_that_the_whole_world_has(fault: str) -> None:
    seen = []
    for is_reduced in (True, False):
        world = Snapshots(lives=(2,), is_reduced=is_reduced, **{fault: 1})
        result = explore(world)
        assert result.violation is None
        seen.append({world.machine[local.core] for local in world._parts if isinstance(local, Local)})
    assert seen[0] == seen[1]


def test_two_scopes_side_by_side_are_each_as_free_as_alone() -> None:
    alone = explore(Snapshots(lives=(1,))).states
    assert explore(Snapshots(lives=(1, 1))).states == alone**2

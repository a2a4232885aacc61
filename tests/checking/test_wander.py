"""Paths through worlds too big to exhaust; and races of the past found by seed and shrunk by Hypothesis."""

from types import SimpleNamespace

import pytest
from hypothesis import find, settings
from hypothesis import strategies as st

from interlock.checking.choices import Drawn, Replay, Seeded, by_seed
from interlock.checking.explorer import Violation
from interlock.checking.museum import mooncake_late_bytes, tair_208, tair_last_rank
from interlock.checking.wander import wander
from interlock.checking.worlds.joins import ANY_BLOCK_BAD, Joins
from interlock.checking.worlds.sessions import Sessions
from interlock.core.joins import Kind


@pytest.mark.explorer
@pytest.mark.parametrize(
    "world",
    [
        Joins(ranks=5, attempts=3, losses=2, aborts=1, timers=3, may_become=ANY_BLOCK_BAD),
        Joins(ranks=4, attempts=2, losses=1, aborts=1, timers=2, kind=Kind.LOAD),
        Sessions(
            asks=[[(0, 1), (2,)], [(1, 2), (0,)], [(2, 0)]],
            ranks=2,
            slots=3,
            faults=(2, 2, 2, 1, 3, 1),
        ),
    ],
    ids=lambda world: world.name,
)
def test_no_path_of_many_through_a_big_world_meets_anything_wrong(world: Joins | Sessions) -> None:
    for _, violation in by_seed(lambda choices: wander(world, choices, steps_max=60), range(150)):
        assert violation is None, f"\n{violation}"


@pytest.mark.parametrize("exhibit", [tair_208, tair_last_rank, mooncake_late_bytes])
def test_some_seed_finds_a_race_of_the_past(exhibit: object) -> None:
    world = exhibit.EXHIBIT.broken()  # type: ignore[attr-defined]
    found = [v for _, v in by_seed(lambda choices: wander(world, choices, steps_max=40), range(200)) if v]
    assert found


@st.composite
def paths(draw: st.DrawFn) -> Violation | None:
    return wander(tair_208.EXHIBIT.broken(), Drawn(SimpleNamespace(draw=draw)), steps_max=20)


def test_hypothesis_shrinks_a_race_to_a_short_story() -> None:
    told = find(paths(), lambda violation: violation is not None, settings=settings(database=None))
    assert told is not None
    assert len(told.story) <= 5  # The explorer finds 3: shrinking is local.


def test_a_path_is_walked_again_by_its_choices() -> None:
    world = tair_208.EXHIBIT.broken()
    chooses = next(c for c in map(Seeded, range(200)) if wander(world, c, steps_max=20) is not None)
    first = wander(world, Seeded(0), steps_max=20)
    assert first == wander(world, Seeded(0), steps_max=20)
    assert wander(world, Replay(chooses.digits), steps_max=20) is not None


def test_a_path_ends_where_nothing_can_happen_any_more() -> None:
    chooses = Seeded(1)
    assert wander(Joins(ranks=2, attempts=1), chooses, steps_max=1000) is None
    assert len(chooses.digits) < 20

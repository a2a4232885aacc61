"""Every protocol's small worlds are exhausted without violation; every race of the museum is found, ours holds beside it."""

import ast
from pathlib import Path
from typing import Any

import pytest

from interlock.checking import gallery
from interlock.checking.explorer import World, explore
from interlock.checking.worlds.joins import Joins
from interlock.checking.worlds.sessions import Sessions

SOURCE = Path(gallery.__file__).parent.parent
SMALL = [(name, world) for name in gallery.protocols() for world in gallery.worlds_of(name, "small")]
EXHIBITS = gallery.exhibits()


@pytest.mark.explorer
@pytest.mark.parametrize("world", [w for _, w in SMALL], ids=[f"{n}: {w.name}" for n, w in SMALL])
def test_a_small_world_is_exhausted_without_violation(world: World[Any]) -> None:
    result = explore(world, seconds_max=40.0)
    assert result.violation is None, f"\n{result.violation}"
    assert result.exhausted, str(result)
    assert result.good_states > 0


@pytest.mark.explorer
@pytest.mark.parametrize("exhibit", EXHIBITS, ids=[exhibit.title for exhibit in EXHIBITS])
def test_a_race_of_the_past_is_found_as_stated_and_our_rule_is_exhausted(exhibit: gallery.Exhibit) -> None:
    seen = gallery.visit(exhibit, seconds_max=20.0)
    assert seen.as_stated, f"\n{seen}"


@pytest.mark.explorer
def test_the_reduction_of_the_joins_world_judges_as_the_whole_world_does() -> None:
    world = Joins(ranks=3, attempts=1, losses=1, aborts=1, timers=1)
    reduced, whole = explore(world), explore(world, reduce=False)
    assert reduced.states < whole.states / 3
    assert reduced.exhausted
    assert whole.exhausted
    assert reduced.violation is whole.violation is None


@pytest.mark.explorer
def test_every_fault_of_the_small_sessions_world_is_needed_for_what_it_sees() -> None:
    """A budget that adds no state would be no budget."""
    faults = (1, 1, 1, 1, 1, 1)
    asks = [[(0,)], [(0,)]]
    whole = explore(Sessions(asks=asks, slots=1, faults=faults))
    assert whole.violation is None
    assert whole.exhausted
    for at in range(len(faults)):
        fewer = tuple(count * (number != at) for number, count in enumerate(faults))
        assert explore(Sessions(asks=asks, slots=1, faults=fewer)).states < whole.states


def test_an_unknown_protocol_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"no protocol 'tea'; there are .*joins"):
        gallery.worlds_of("tea", "small")


def test_full_budgets_exist_for_every_protocol() -> None:
    for name in gallery.protocols():
        assert gallery.worlds_of(name, "full"), name


def test_titles_differ_and_every_exhibit_names_where_the_public_can_read_of_it() -> None:
    titles = [exhibit.title for exhibit in EXHIBITS]
    assert len(set(titles)) == len(titles)
    for exhibit in EXHIBITS:
        assert "#" in exhibit.public, exhibit.title
        assert exhibit.protocol in gallery.protocols()


def test_nothing_outside_checking_imports_the_museum() -> None:
    for path in SOURCE.rglob("*.py"):
        if SOURCE / "checking" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            assert not any(name.startswith("interlock.checking.museum") for name in names), path

"""The explorer finds what is wrong in small worlds whose faults are known, by the shortest story, and nothing elsewhere."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Hashable, Iterable
from itertools import permutations
from typing import Any

import pytest

from interlock.checking import explorer
from interlock.checking.explorer import Broken, World, explore

Edges = dict[int, list[tuple[str, Any]]]


class Drawn(World[int]):
    """A world drawn by hand: for each state its actions and where they lead; 0 is the first, `ends` are good."""

    protocol, name, budget = "test", "by hand", {}

    def __init__(
        self, edges: Edges, *, ends: Iterable[int], bad: Iterable[int] = (), reaches: bool = False
    ) -> None:
        self.edges, self.ends, self.bad, self.reaches = edges, set(ends), set(bad), reaches

    def initial(self) -> Iterable[int]:
        return [0]

    def steps(self, state: int) -> Iterable[tuple[Hashable, Any]]:
        for action, after in self.edges.get(state, []):
            if callable(after):
                after()
            yield action, after

    def good(self, state: int) -> bool:
        return state in self.ends

    def wrong(self, state: int) -> str | None:
        return f"{state} must not be" if state in self.bad else None


def story_of(world: World[Any]) -> tuple[str, tuple[str, ...]]:
    violation = explore(world).violation
    assert violation is not None
    return violation.kind, violation.story


def test_the_example_in_its_documentation_runs() -> None:
    assert doctest.testmod(explorer).failed == 0


def test_a_sound_world_is_exhausted_and_counted() -> None:
    result = explore(Drawn({0: [("a", 1), ("b", 2)], 1: [("c", 3)], 2: [("c", 3), ("stay", 2)]}, ends=[3]))
    assert (result.states, result.edges, result.depth, result.good_states) == (4, 5, 2, 1)
    assert result.exhausted
    assert result.violation is None


def test_a_wrong_state_is_found_by_the_shortest_story() -> None:
    world = Drawn(
        {0: [("a", 1), ("long", 2)], 1: [("b", 9)], 2: [("way", 3)], 3: [("round", 9)]}, ends=[9], bad=[9]
    )
    assert story_of(world) == ("safety", ("a", "b"))


def test_a_wrong_first_state_has_an_empty_story() -> None:
    assert story_of(Drawn({}, ends=[0], bad=[0])) == ("safety", ())


def test_a_broken_step_ends_its_story() -> None:
    assert story_of(Drawn({0: [("a", 1)], 1: [("ok", 1), ("breaks", Broken("no"))]}, ends=[0, 1])) == (
        "safety",
        ("a", "breaks"),
    )


def test_an_exception_in_a_step_is_a_violation_and_not_a_crash_of_the_explorer() -> None:
    def fails() -> None:
        raise KeyError("save 7")

    violation = explore(Drawn({0: [("a", 1)], 1: [("b", fails)]}, ends=[0, 1])).violation
    assert violation is not None
    assert violation.what == "a step raised KeyError: 'save 7'"
    assert violation.story == ("a",)
    assert str(violation) == "  1. a\n  => a step raised KeyError: 'save 7'"


def test_a_state_from_which_no_good_end_can_be_reached_is_found_at_its_entrance() -> None:
    world = Drawn({0: [("good", 1), ("trap", 2)], 2: [("on", 3)], 3: [("back", 2)]}, ends=[1])
    assert story_of(world) == ("stuck", ("trap",))


def test_a_good_end_that_can_be_left_must_stay_reachable() -> None:
    assert story_of(Drawn({0: [("good", 1)], 1: [("off", 2)]}, ends=[1])) == ("stuck", ("good", "off"))


@pytest.mark.parametrize(
    ("edges", "endless"),
    [
        # "go" can be taken all the time: a fair run takes it.
        ({0: [("round", 1), ("go", 9)], 1: [("back", 0), ("go", 9)]}, False),
        # "go" is taken away again and again, so it is starved without unfairness.
        ({0: [("round", 1), ("go", 9)], 1: [("back", 0)]}, True),
        # "go" is taken inside the circle too: taking it is no way out.
        ({0: [("go", 1)], 1: [("go", 0), ("out", 9)]}, True),
        # A circle inside a circle: the inner one starves nobody, the outer is left by "go".
        ({0: [("a", 1)], 1: [("b", 0), ("c", 2)], 2: [("d", 1), ("go", 9)]}, True),
        # No circle at all.
        ({0: [("a", 1), ("b", 2)], 1: [("c", 9)], 2: [("c", 9), ("nothing", 2)]}, False),
    ],
)
def test_in_fault_free_worlds_a_good_end_is_reached_unless_an_action_is_starved(
    edges: Edges, endless: bool
) -> None:
    result = explore(Drawn(edges, ends=[9], reaches=True))
    assert (result.violation is not None and result.violation.kind == "endless") == endless
    assert explore(Drawn(edges, ends=[9])).violation is None


class Race(World[tuple[tuple[int, ...], int]]):
    """Three runners run one lap each and then go home; the first home rings a bell. Runners are interchangeable."""

    protocol, name, budget = "test", "runners", {}

    def __init__(self, wrong_at: Callable[[tuple[int, ...]], bool] = lambda laps: False) -> None:
        self.wrong_at = wrong_at

    def initial(self) -> Iterable[tuple[tuple[int, ...], int]]:
        return [((0, 0, 0), 0)]

    def steps(self, state: Any) -> Iterable[tuple[Hashable, Any]]:
        laps, bell = state
        for runner, lap in enumerate(laps):
            if lap < 2:
                after = (*laps[:runner], lap + 1, *laps[runner + 1 :])
                yield f"runner {runner} runs", (after, 1 if lap == 1 else bell)

    def good(self, state: Any) -> bool:
        return bool(state[0] == (2, 2, 2))

    def wrong(self, state: Any) -> str | None:
        return "wrong" if self.wrong_at(state[0]) else None

    def canonical(self, state: Any) -> Any:
        return (min(permutations(state[0])), state[1])


def test_reducing_symmetry_sees_fewer_states_and_judges_alike() -> None:
    reduced, whole = explore(Race()), explore(Race(), reduce=False)
    assert (reduced.states, whole.states) == (10, 27)
    assert reduced.violation is whole.violation is None


def test_a_story_keeps_the_names_of_its_actors_under_symmetry() -> None:
    def first_is_home(laps: tuple[int, ...]) -> bool:
        return sorted(laps) == [0, 1, 2]

    violation = explore(Race(first_is_home)).violation
    assert violation is not None
    runs = [line.split()[1] for line in violation.story]
    assert len(runs) == 3
    assert sorted(map(runs.count, set(runs))) == [1, 2]


def test_a_bound_that_is_met_is_not_called_exhausted_and_judges_no_ends() -> None:
    class Counting(Drawn):
        def steps(self, state: int) -> Iterable[tuple[Hashable, Any]]:
            yield "on", state + 1

    result = explore(Counting({}, ends=[]), states_max=10_000)
    assert not result.exhausted
    assert result.violation is None
    assert result.states >= 10_000
    assert not explore(Counting({}, ends=[]), seconds_max=0.0).exhausted


def test_a_canonical_form_that_is_no_renaming_is_not_trusted_with_a_story() -> None:
    class Lying(Race):
        def canonical(self, state: Any) -> Any:
            return ((2, 2, 1), 1) if state[0][0] == 1 else state

    with pytest.raises(AssertionError, match="no renaming"):
        explore(Lying(lambda laps: laps == (2, 2, 2)))


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[int, int, int, float]] = []
    monkeypatch.setattr(explorer, "_LOOK_EVERY_STATES", 1)
    ticks = iter(range(10_000))
    monkeypatch.setattr(explorer.time, "perf_counter", lambda: float(next(ticks)))
    explore(Race(), progress=lambda *facts: heard.append(facts))
    assert heard
    assert heard[-1][0] <= 10

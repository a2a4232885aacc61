"""One scenario, run every way, by seed, and under Hypothesis."""

import doctest
import itertools

import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from interlock.checking import choices
from interlock.checking.choices import Choices, Drawn, Replay, Unrepeatable, by_seed, every_way


def sock_drawer(chooses: Choices) -> tuple[list[str], bool]:
    """A scenario whose questions depend on its answers."""
    order = chooses.shuffled(["a", "b", "c"])
    return order, chooses.flip() if order[0] == "a" else False


def test_the_example_in_its_documentation_runs() -> None:
    assert doctest.testmod(choices).failed == 0


def test_every_way_is_gone_once() -> None:
    seen = [(tuple(order), flipped) for _, (order, flipped) in every_way(sock_drawer)]
    wanted = [
        (order, flipped)
        for order in itertools.permutations("abc")
        for flipped in ([False, True] if order[0] == "a" else [False])
    ]
    assert seen == wanted


def test_some_of_gives_every_subset_in_order() -> None:
    subsets = {tuple(some) for _, some in every_way(lambda c: c.some_of("abc"))}
    assert len(subsets) == 8
    assert all(list(some) == sorted(some) for some in subsets)


def test_a_run_is_repeated_by_its_digits() -> None:
    for digits, result in every_way(sock_drawer):
        assert sock_drawer(Replay(digits)) == result


def test_a_failure_names_the_choices_that_lead_to_it() -> None:
    def fails(chooses: Choices) -> None:
        assert [chooses.below(3), chooses.below(3)] != [1, 2]

    with pytest.raises(AssertionError) as failure:
        list(every_way(fails))
    assert failure.value.__notes__ == ["with choices [1, 2]"]
    with pytest.raises(AssertionError) as failure:
        list(by_seed(fails, range(1000)))
    assert "choices [1, 2]" in failure.value.__notes__[0]


def test_the_same_seed_gives_the_same_run() -> None:
    assert list(by_seed(sock_drawer, range(50))) == list(by_seed(sock_drawer, range(50)))
    assert len({str(result) for _, result in by_seed(sock_drawer, range(50))}) > 3


def test_what_is_not_exhausted_does_not_pass_for_it() -> None:
    with pytest.raises(OverflowError, match="5 runs did not exhaust"):
        list(every_way(lambda c: c.below(6), runs_max=5))


def test_a_scenario_that_asks_other_questions_the_second_time_is_caught() -> None:
    counts = iter([3, 1])
    with pytest.raises(Unrepeatable, match="was answered 1 before and now has 1 answers"):
        list(every_way(lambda c: c.below(next(counts)) if c.below(1) == 0 else None))
    lengths = iter([3, 1])
    with pytest.raises(Unrepeatable, match="before, now fewer"):
        list(every_way(lambda c: [c.below(2) for _ in range(next(lengths))]))


def test_choosing_among_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to choose below 0"):
        Replay().pick([])


@given(st.data())
def test_hypothesis_drives_the_same_scenario(data: st.DataObject) -> None:
    order, flipped = sock_drawer(Drawn(data))
    assert sorted(order) == ["a", "b", "c"]
    assert not flipped or order[0] == "a"


def test_hypothesis_shrinks_a_failing_scenario_to_its_least_choices() -> None:
    digits: list[list[int]] = []

    def fails(data: st.DataObject) -> bool:
        chooses = Drawn(data)
        total = sum(chooses.below(10) for _ in range(1 + chooses.below(5)))
        if total >= 9:
            digits.append(chooses.digits)
        return total >= 9

    find(st.data(), fails)
    assert digits[-1] == [0, 9]

"""An incarnation only grows, whatever the clock and the state directory say (hazards E3)."""

import pytest

from interlock.core.identity import Epoch, next_incarnation


@pytest.mark.parametrize(
    ("stored", "wall_ns", "refused", "expected"),
    [
        (0, 1000, 0, 1000),  # a first life begins at the wall clock
        (1000, 500, 0, 1001),  # the clock stepped back: the counter goes on
        (0, 500, 2000, 2001),  # the directory was lost: a refuser's word counts
        (1000, 1000, 1000, 1001),
    ],
)
def test_a_new_life_is_above_all_that_is_known_of_former_ones(
    stored: int, wall_ns: int, refused: int, expected: int
) -> None:
    assert next_incarnation(stored=stored, wall_ns=wall_ns, refused=refused) == expected


def test_an_epoch_is_ordered_by_its_term_first_and_reads_as_both() -> None:
    assert Epoch(1, 9) < Epoch(2, 0) < Epoch(2, 1)
    assert str(Epoch(2, 1)) == "2.1"

"""What a pause of many ranks costs in words: the benchmark's own count, on the simulated host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from fleet_rounds import pause_of


@pytest.mark.parametrize("ranks", [1, 64])
def test_a_pause_takes_two_rounds_of_messages_however_many_ranks_there_are(ranks: int) -> None:
    found = pause_of(ranks)
    assert found.rounds == pytest.approx(2.0, abs=0.05)
    assert found.messages["Target"] == ranks
    assert found.messages["Command"] == found.messages["CommandAccepted"] == 1


def test_each_rank_says_no_more_than_that_it_pauses_and_that_it_stands() -> None:
    assert pause_of(64).messages["MemberReport"] <= 2 * 64

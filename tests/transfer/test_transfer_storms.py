"""Real processes: opens that cross, kills, freezes, restarts, and many at once. The long runs are `make long`."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.testing.transfer_storms import a_thousand_at_once, all_to_all, two_that_open_at_once


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("st", numbered=True)


@pytest.mark.parametrize("lanes", [("tcp",), ("shm", "tcp")], ids=["tcp", "both"])
async def test_two_that_open_at_once_get_one_connection(short: Path, lanes: tuple[str, ...]) -> None:
    seen = await two_that_open_at_once(short, rounds=60, lanes=lanes)
    assert seen["rounds"] == 60


async def test_all_to_all_with_a_kill_or_a_freeze_in_each_round_is_whole_after_it(short: Path) -> None:
    await all_to_all(short, peers=4, rounds=3, seed=4)


async def test_a_hundred_that_open_at_once_are_all_connected_and_none_twice(short: Path) -> None:
    await a_thousand_at_once(short, peers=100, in_processes=2)

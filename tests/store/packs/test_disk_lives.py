"""Lives of a disk tier that crash, lose power and find rot: a short walk here, 100,000 crashes in `make long`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from interlock.store import filling
from interlock.store.packs import files
from interlock.testing.sim.disk_lives import Outcome, live_through

SEEDS = range(6)
LIVES = 25


def test_no_crash_power_cut_or_flipped_bit_makes_a_wrong_byte() -> None:
    total = Outcome(0)
    for seed in SEEDS:
        total.add(live_through(seed, LIVES))
    assert not total.wrong
    assert total.crashes > 50
    assert total.power_cuts > 20
    assert total.promoted > 30
    assert total.evicted > 100
    assert total.deleted > 3


def test_a_seed_plays_the_same_lives_again() -> None:
    assert live_through(3, 5) == live_through(3, 5)


def _believes_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "verify_block", lambda *_: True)


def _takes_a_sum_of_what_lies_in_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    def rebind(layout: Any, data: Any, binding: Any, slab: Any) -> list[int]:
        there = bytearray(layout.block_bytes)
        slab.read_into(binding.slot * 4096, memoryview(there))
        return filling.block_checksums(binding, layout, there)  # and copies nothing

    monkeypatch.setattr("interlock.store.filling.rebind", rebind)


def _forgets_a_file_it_could_not_take_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async def discard(self: Any, number: int, condemned: Any) -> None:
        with contextlib.suppress(OSError):
            await self.host.in_thread(self.files.set_aside if condemned.aside else self.files.delete, number)

    monkeypatch.setattr("interlock.store.packs.state.DiskState.discard", discard)


@pytest.mark.parametrize(
    ("plant", "first_seed"),
    [
        (_believes_every_byte, 30),
        (_takes_a_sum_of_what_lies_in_the_slot, 0),
        (_forgets_a_file_it_could_not_take_away, 50),
    ],
)
def test_planted_bugs_are_found(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], first_seed: int
) -> None:
    """Seeds near one that finds it: from seed 0 the first takes some ten seconds, which `make long` has."""
    plant(monkeypatch)
    assert any(live_through(seed, 15).wrong for seed in range(first_seed, first_seed + 40))

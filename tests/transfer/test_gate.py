"""The gate: so many handshakes at a time, in order, and nobody who dawdles holds the others up."""

from __future__ import annotations

import asyncio
import time

import pytest

from interlock.transfer import gate as gate_module
from interlock.transfer.gate import Gate


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_who_comes_when_all_places_are_taken_waits_and_goes_in_in_order() -> None:
    gate, went_in = Gate(2), []

    async def come(name: str) -> None:
        await gate.enter(name)
        went_in.append(name)

    tasks = [asyncio.create_task(come(name)) for name in "abcde"]
    await turns()
    assert went_in == ["a", "b"]
    gate.leave("b")
    await turns()
    assert went_in == ["a", "b", "c"]
    gate.leave("a")
    gate.leave("a")  # leaving twice frees one place
    await turns()
    assert went_in == ["a", "b", "c", "d"]
    assert len(gate) == 2
    gate.leave("c")
    await asyncio.gather(*tasks)
    for name in "de":
        gate.leave(name)
    assert len(gate) == 0


async def test_who_has_a_place_enters_again_at_once() -> None:
    gate = Gate(1)
    async with asyncio.timeout(1):
        await gate.enter("a")
        await gate.enter("a")
    gate.leave("a")
    assert len(gate) == 0


async def test_who_gives_up_waiting_takes_nobodys_place() -> None:
    gate = Gate(1)
    await gate.enter("a")
    quitter, patient = asyncio.create_task(gate.enter("b")), asyncio.create_task(gate.enter("c"))
    await turns()
    quitter.cancel()
    await turns()
    gate.leave("a")
    async with asyncio.timeout(1):
        await patient


async def test_a_place_that_was_given_to_one_who_gives_up_in_that_moment_goes_to_the_next() -> None:
    gate = Gate(1)
    await gate.enter("a")
    quitter, patient = asyncio.create_task(gate.enter("b")), asyncio.create_task(gate.enter("c"))
    await turns()
    gate.leave("a")
    quitter.cancel()
    async with asyncio.timeout(1):
        await patient


async def test_who_dawdles_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "PLACE_SECONDS", 0.01)
    gate = Gate(1)
    await gate.enter("a mute one")
    async with asyncio.timeout(2):
        await gate.enter("b")
        await gate.enter("c")


async def test_who_is_looked_at_late_because_the_loop_stood_still_keeps_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without this all places lapse at once where the machine is busy, everybody is served at once, and nobody by the deadline."""
    monkeypatch.setattr(gate_module, "PLACE_SECONDS", 0.02)
    monkeypatch.setattr(gate_module, "LATE_TIMES", 2)
    gate = Gate(1)
    await gate.enter("a")
    time.sleep(0.2)  # the loop stands still, as on a machine without a free core
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(gate) == 1, "it lost its place though it had no moment in which to use it"
    async with asyncio.timeout(5):
        await gate.enter("b")  # a's place does lapse in the end
    assert len(gate) == 1
    gate.leave("b")

"""Somebody remembers what the coordinator has forgotten, and says so when it already leads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from scripted_engine import ScriptedEngine

from interlock.core.errors import ChannelFault
from interlock.fleet.client import CommandFailed

if TYPE_CHECKING:
    from conftest import Fleet

ABLE = ("updates", "suspends")


async def unplug(engine: ScriptedEngine) -> None:
    """It goes on, and nobody hears it: as if it were frozen while the coordinator listens."""
    for task in list(engine._tasks):
        task.cancel()
    await asyncio.gather(*engine._tasks, return_exceptions=True)


def plug_in(engine: ScriptedEngine) -> None:
    engine._spawn(engine._keep_connected())


async def forgotten(fleet: Fleet) -> ScriptedEngine:
    """Engine a has weights v1, and cannot be heard; the coordinator lost its state, heard engine b, which is new, and leads."""
    await fleet.start_coordinator()
    a = await fleet.engine("a", abilities=ABLE)
    async with fleet.client.paused(owner="trainer"):
        await fleet.client.update_weights("v1", "/weights/v1", owner="trainer", kv="keep")
    await a.until(lambda: a.member.state == "RUNNING")
    await unplug(a)
    await fleet.stop_coordinator(lose_state=True)
    coordinator = await fleet.start_coordinator(expected=["a", "b"], recovering_s=0.2, exit_is_proof=False)
    b = await fleet.engine("b", abilities=ABLE)
    await b.until(lambda: b.member.state == "RUNNING")
    assert coordinator.fleet.version == "0"
    assert b.member.version == "0"
    return a


async def test_an_engine_that_is_heard_late_teaches_its_weights_and_is_not_sent_back_to_old_ones(
    fleet: Fleet,
) -> None:
    a = await forgotten(fleet)
    before = len(a.taken)
    plug_in(a)
    assert fleet.coordinator is not None
    await fleet.until(lambda: fleet.coordinator is not None and fleet.coordinator.fleet.version == "v1")
    assert fleet.coordinator.fleet.weights == "/weights/v1"
    assert (await fleet.client.pause(owner="t")).ok
    status = await fleet.client.status()
    assert {m.name: m.version for m in status.members} == {"a": "v1", "b": "v1"}
    assert "UPDATE" not in [step.step for step in a.taken[before:]]


async def test_weights_that_a_command_of_the_new_life_named_are_not_taken_back_by_who_comes_late(
    fleet: Fleet,
) -> None:
    a = await forgotten(fleet)
    await fleet.client.pause(owner="t", timeout_s=0.3, allow_unknown=True)
    asking = asyncio.create_task(fleet.client.update_weights("v9", "/weights/v9", owner="t", timeout_s=20.0))
    await fleet.until(lambda: fleet.coordinator is not None and fleet.coordinator.fleet.version == "v9")
    plug_in(a)
    assert (await asking).ok
    assert (a.member.version, a.taken[-1].weights) == ("v9", "/weights/v9")


async def test_a_hold_that_who_came_late_remembered_can_be_released_for_good(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    a = await fleet.engine("a")
    await fleet.client.pause(owner="trainer")
    await unplug(a)
    await fleet.stop_coordinator(lose_state=True)
    coordinator = await fleet.start_coordinator(expected=["a", "b"], recovering_s=0.2, exit_is_proof=False)
    b = await fleet.engine("b")
    await b.until(lambda: b.member.state == "RUNNING")
    plug_in(a)
    await fleet.until(lambda: coordinator.fleet.state == "PAUSED")
    with pytest.raises(ChannelFault, match="holds nothing"):
        await fleet.client.unpause(owner="somebody else")
    assert (await fleet.client.unpause(owner="trainer")).ok
    await a.until(lambda: a.member.state == "RUNNING")
    assert coordinator.fleet.holds == ()


@pytest.mark.parametrize("again", [True, False])
async def test_the_late_word_of_an_end_excuses_nobody_whose_next_life_may_have_begun(
    fleet: Fleet, again: bool
) -> None:
    """The coordinator that let it run is gone with its state, and the launcher repeats the end of the life before to the next."""
    await fleet.start_coordinator()
    a = await fleet.engine("a")
    await a.until(lambda: a.member.state == "RUNNING")
    await unplug(a)
    await fleet.stop_coordinator(lose_state=True)
    await fleet.start_coordinator(expected=["a", "b"], recovering_s=0.2, exit_is_proof=False)
    b = await fleet.engine("b")
    await b.until(lambda: b.member.state == "RUNNING")
    await fleet.client.member_gone("a", a.me.incarnation - 1, again=again)
    if not again:  # a word that was true when it was said
        assert (await fleet.client.pause(owner="t")).ok
        return
    with pytest.raises(CommandFailed, match=r"\ba\b"):
        await fleet.client.pause(owner="t", timeout_s=0.3)
    plug_in(a)
    assert (await fleet.client.pause(owner="t")).ok
    assert a.member.state == "PAUSED"

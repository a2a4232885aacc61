"""START of a stopped fleet: legal where a launcher follows the target, done when every new life runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from scripted_engine import ScriptedEngine

from interlock.core.errors import ChannelFault
from interlock.fleet.client import CommandFailed

if TYPE_CHECKING:
    from conftest import Fleet

NAMES = ["a", "b"]


async def stopped(fleet: Fleet, *, launches: bool = True) -> dict[str, int]:
    """A fleet of two that was stopped, its launcher's word included; the lives that are over."""
    await fleet.start_coordinator(launches=launches, expected=NAMES, exit_is_proof=False)
    engines = [await fleet.engine(name) for name in NAMES]
    await fleet.start_dispatcher()
    await fleet.ready(*NAMES)
    stopping = asyncio.create_task(fleet.client.stop(owner="t", composite=True))
    for engine in engines:
        await engine.until(lambda engine=engine: engine.member.state == "STOPPED")
        await engine.close()
        await fleet.client.member_gone(engine.name, engine.me.incarnation)
    assert (await stopping).ok
    return {engine.name: engine.me.incarnation for engine in engines}


async def launch(fleet: Fleet, name: str) -> ScriptedEngine:
    return await fleet.engine(name)


async def test_a_stopped_fleet_is_started_when_every_new_life_runs_and_not_before(fleet: Fleet) -> None:
    await stopped(fleet)
    starting = asyncio.create_task(fleet.client.start(owner="t", timeout_s=20.0))
    await fleet.until(lambda: fleet.coordinator is not None and fleet.coordinator.fleet.state == "RUNNING")
    await launch(fleet, "a")
    await fleet.ready("a")
    assert not starting.done(), "one of two is not there yet"
    await launch(fleet, "b")
    progress = await starting
    assert progress.ok
    assert {m.name: m.outcome for m in progress.members} == dict.fromkeys(NAMES, "standing")


async def test_the_end_of_an_old_life_that_is_told_late_excuses_no_new_one(fleet: Fleet) -> None:
    lives = await stopped(fleet)
    starting = asyncio.create_task(fleet.client.start(owner="t", timeout_s=20.0))
    await fleet.until(lambda: fleet.coordinator is not None and fleet.coordinator.fleet.state == "RUNNING")
    await launch(fleet, "a")
    await fleet.ready("a")
    await fleet.client.member_gone("b", lives["b"])
    assert not starting.done()
    await launch(fleet, "b")
    assert (await starting).ok


async def test_a_start_that_nobody_answers_ends_at_its_deadline_and_names_who_is_missing(
    fleet: Fleet,
) -> None:
    await stopped(fleet)
    with pytest.raises(CommandFailed, match="a, b cannot be seen"):
        await fleet.client.start(owner="t", timeout_s=0.5)


async def test_without_a_launcher_start_is_refused_with_what_to_do(fleet: Fleet) -> None:
    await stopped(fleet, launches=False)
    with pytest.raises(ChannelFault, match="interlock serve"):
        await fleet.client.start(owner="t")


async def test_a_started_fleet_has_the_weights_it_had_or_those_that_start_names(fleet: Fleet) -> None:
    await stopped(fleet)
    starting = asyncio.create_task(
        fleet.client.start(owner="t", version="v5", weights="/weights/v5", timeout_s=20.0)
    )
    await fleet.until(lambda: fleet.coordinator is not None and fleet.coordinator.fleet.version == "v5")
    engines = [await fleet.engine(name, abilities=("updates",)) for name in NAMES]
    assert (await starting).ok
    for engine in engines:
        assert [step.weights for step in engine.taken if step.step == "UPDATE"] == ["/weights/v5"]


@pytest.mark.parametrize("restarted_within", [False, True])
async def test_the_last_words_of_the_life_before_are_not_taken_for_those_of_the_life_that_start_launches(
    fleet: Fleet, restarted_within: bool
) -> None:
    """STOP is done when all have said STOPPED; START may come before their processes are gone, or a coordinator's death between."""
    await fleet.start_coordinator(launches=True, expected=NAMES, exit_is_proof=False)
    engines = [await fleet.engine(name) for name in NAMES]
    await fleet.start_dispatcher()
    await fleet.ready(*NAMES)
    assert (await fleet.client.stop(owner="t", composite=True)).ok
    starting = asyncio.create_task(fleet.client.start(owner="t", timeout_s=20.0))
    await fleet.until(lambda: fleet.coordinator is not None and fleet.coordinator.fleet.state == "RUNNING")
    if restarted_within:
        await fleet.stop_coordinator()
        await fleet.start_coordinator(launches=True, expected=NAMES, exit_is_proof=False)
    for engine in engines:  # they are told of the new target, and say again that they are STOPPED
        await engine.until(lambda engine=engine: engine.targets[-1].state == "RUNNING")
        said = engine.reports
        await engine.until(lambda engine=engine, said=said: engine.reports > said + 1)
        await engine.close()
        await fleet.client.member_gone(engine.name, engine.me.incarnation)
    await launch(fleet, "a")
    await fleet.ready("a")
    assert not starting.done(), "b is not there: it was its last life that spoke"
    await launch(fleet, "b")
    progress = await starting
    assert {m.name: m.outcome for m in progress.members} == dict.fromkeys(NAMES, "standing")


async def test_a_start_that_a_stop_overtook_is_told_so_at_once(
    fleet: Fleet,
) -> None:
    await stopped(fleet)
    mine = asyncio.create_task(
        fleet.client.start(owner="a", version="v5", weights="/weights/v5", timeout_s=20.0)
    )
    await fleet.until(lambda: fleet.coordinator is not None and fleet.coordinator.fleet.version == "v5")
    engines = [await fleet.engine(name, directory=f"{name} again", abilities=("updates",)) for name in NAMES]
    for engine in engines:
        engine.hold_steps.clear()
    stopping = asyncio.create_task(fleet.client.stop(owner="b", composite=True, timeout_s=20.0))
    await fleet.until(lambda: fleet.coordinator is not None and fleet.coordinator.fleet.state == "PAUSED")
    with pytest.raises(CommandFailed, match="superseded"):
        await mine
    for engine in engines:
        engine.hold_steps.set()
    assert (await stopping).ok


async def test_a_coordinator_that_starts_again_still_awaits_whom_start_has_launched(fleet: Fleet) -> None:
    await stopped(fleet)
    starting = asyncio.create_task(fleet.client.start(owner="t", timeout_s=20.0))
    await fleet.until(lambda: fleet.coordinator is not None and fleet.coordinator.fleet.state == "RUNNING")
    await fleet.stop_coordinator()
    await fleet.start_coordinator(launches=True, expected=NAMES, exit_is_proof=False)
    await launch(fleet, "a")
    await fleet.ready("a")
    assert not starting.done()
    await launch(fleet, "b")
    assert (await starting).ok

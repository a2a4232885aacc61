"""UPDATE, SUSPEND and RESUME of a fleet: coordinator, fronts and members together, the engines' own part scripted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from scripted_engine import ScriptedEngine, continuation_of

from interlock.core.errors import ChannelFault
from interlock.fleet.client import CommandFailed
from interlock.fleet.generation import Generation, Made, extended

if TYPE_CHECKING:
    from conftest import Fleet

ABLE = ("updates", "suspends")


async def begin(fleet: Fleet, *names: str) -> list[ScriptedEngine]:
    await fleet.start_coordinator()
    engines = [await fleet.engine(name, abilities=ABLE) for name in names]
    await fleet.start_dispatcher()
    await fleet.ready(*names)
    return engines


async def read_made(generation: Generation) -> tuple[list[int], list[Made]]:
    tokens: list[int] = []
    made: list[Made] = []
    async for piece in generation:
        tokens += piece.token_ids
        for span in piece.made:
            made = extended(made, span)
    return tokens, made


async def test_an_update_reaches_every_engine_with_its_checkpoint_and_stands_paused(fleet: Fleet) -> None:
    engines = await begin(fleet, "a", "b")
    async with fleet.client.paused(owner="trainer"):
        progress = await fleet.client.update_weights("v1", "/weights/v1", owner="trainer", kv="keep")
        assert [member.outcome for member in progress.members] == ["standing", "standing"]
        for engine in engines:
            (update,) = [step for step in engine.taken if step.step == "UPDATE"]
            assert (update.version, update.weights, update.kv) == ("v1", "/weights/v1", "keep")
            assert engine.member.state == "PAUSED"
    await fleet.ready("a", "b")
    assert fleet.dispatcher is not None
    assert fleet.dispatcher.membership is not None
    assert fleet.dispatcher.membership.version == "v1"


async def test_an_answer_says_which_weights_made_which_of_its_tokens(fleet: Fleet) -> None:
    (engine,) = await begin(fleet, "a")
    prompt = [3, 1, 4]
    generation = fleet.ask(prompt, 7)
    await engine.until(lambda: len(engine.streams) == 1)
    await engine.step(3)
    async with fleet.client.paused(owner="trainer"):
        await fleet.client.update_weights("v1", "/weights/v1", owner="trainer")
    await fleet.ready("a")
    await engine.step(4)
    tokens, made = await read_made(generation)
    assert tokens == continuation_of(prompt, 7)
    assert made == [Made("0", 3), Made("v1", 4)]


async def test_an_update_that_one_engine_fails_leaves_the_fleet_without_weights_until_the_next(
    fleet: Fleet,
) -> None:
    good, bad = await begin(fleet, "a", "b")
    bad.fail_update = "shard 2 of 3 is torn"
    await fleet.client.pause(owner="trainer")
    with pytest.raises(CommandFailed, match="b failed on the way"):
        await fleet.client.update_weights("v1", "/weights/v1", owner="trainer")
    assert (good.member.version, bad.member.version) == ("v1", None)
    with pytest.raises(ChannelFault, match="the weights are unknown"):
        await fleet.client.unpause(owner="trainer")
    with pytest.raises(ChannelFault, match="other weights need another name"):
        await fleet.client.update_weights("v1", "/weights/other", owner="trainer")
    bad.fail_update = None
    await fleet.client.update_weights("v1", "/weights/v1", owner="trainer")
    assert [step.version for step in good.taken if step.step == "UPDATE"] == ["v1"]  # it had them already
    await fleet.client.unpause(owner="trainer")
    await fleet.ready("a", "b")


async def test_a_late_joiner_gets_the_weights_before_it_gets_work(fleet: Fleet) -> None:
    await begin(fleet, "a")
    async with fleet.client.paused(owner="trainer"):
        await fleet.client.update_weights("v1", "/weights/v1", owner="trainer")
    late = await fleet.engine("late", abilities=ABLE)
    await fleet.ready("a", "late")
    assert [step.step for step in late.taken] == ["PAUSE", "UPDATE", "UNPAUSE"]
    assert [step.weights for step in late.taken if step.step == "UPDATE"] == ["/weights/v1"]


async def test_a_coordinator_that_lost_its_state_still_knows_where_the_weights_lie(fleet: Fleet) -> None:
    await begin(fleet, "a")
    async with fleet.client.paused(owner="trainer"):
        await fleet.client.update_weights("v1", "/weights/v1", owner="trainer", kv="keep")
    await fleet.stop_coordinator(lose_state=True)
    coordinator = await fleet.start_coordinator(expected=["a"])
    await fleet.until(lambda: coordinator.fleet.phase == "LEADING")
    late = await fleet.engine("late", abilities=ABLE)
    await fleet.ready("a", "late")
    assert [step.weights for step in late.taken if step.step == "UPDATE"] == ["/weights/v1"]


async def test_a_suspended_fleet_keeps_its_requests_and_serves_them_after_resume(fleet: Fleet) -> None:
    (engine,) = await begin(fleet, "a")
    prompt = [2, 7]
    generation = fleet.ask(prompt, 5)
    await engine.until(lambda: len(engine.streams) == 1)
    await engine.step(2)
    await fleet.client.pause(owner="trainer")
    await fleet.client.suspend(owner="trainer")
    assert engine.member.state == "SUSPENDED"
    waiting = fleet.ask([9], 1)
    with pytest.raises(ChannelFault, match="RESUME first"):
        await fleet.client.unpause(owner="trainer")
    await fleet.client.resume(owner="trainer")
    assert engine.member.state == "PAUSED"
    assert len(engine.streams) == 1, "nothing is dispatched while it is paused"
    await fleet.client.unpause(owner="trainer")
    await fleet.ready("a")
    await engine.step(3)
    assert (await read_made(generation))[0] == continuation_of(prompt, 5)
    await engine.until(lambda: len(engine.streams) == 1)
    await engine.step(1)
    assert (await read_made(waiting))[0] == continuation_of([9], 1)


async def test_a_fleet_with_one_engine_that_cannot_suspend_is_not_suspended_at_all(fleet: Fleet) -> None:
    (able,) = await begin(fleet, "a")
    await fleet.engine("b", abilities=("updates",))
    await fleet.ready("a", "b")
    await fleet.client.pause(owner="t")
    with pytest.raises(ChannelFault, match="b cannot do it"):
        await fleet.client.suspend(owner="t")
    assert able.member.state == "PAUSED"


async def test_a_drain_lets_running_requests_end_and_then_stops(fleet: Fleet) -> None:
    (engine,) = await begin(fleet, "a")
    await fleet.client.drain(owner="operator")
    pause, stop = engine.taken[-2:]
    assert (pause.step, pause.mode, stop.step) == ("PAUSE", "wait", "STOP")

"""Sequences that mix weights, or break a promise of a pause (hazards W4, F1): over a real coordinator, front and sockets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from scripted_engine import ScriptedEngine, continuation_of, read_some

from interlock.core.errors import ChannelFault
from interlock.fleet.client import CommandFailed
from interlock.fleet.dispatching import cache_salt
from interlock.fleet.generation import Generation, Made, extended
from interlock.wire.engine_messages import Dispatch

if TYPE_CHECKING:
    from conftest import Fleet

ABLE = ("updates", "suspends")
PROMPT = [11, 22, 33]


async def begin(fleet: Fleet, *names: str) -> list[ScriptedEngine]:
    await fleet.start_coordinator()
    engines = [await fleet.engine(name, abilities=ABLE) for name in names]
    await fleet.start_dispatcher()
    await fleet.ready(*names)
    return engines


async def update(fleet: Fleet, version: str, owner: str = "trainer") -> None:
    await fleet.client.update_weights(version, f"/weights/{version}", owner=owner)


async def made_of(generation: Generation) -> tuple[list[int], list[Made]]:
    tokens: list[int] = []
    made: list[Made] = []
    async for piece in generation:
        tokens += piece.token_ids
        for span in piece.made:
            made = extended(made, span)
    return tokens, made


# --- W4 -----------------------------------------------------------------------------------------------------------------


async def test_nobody_lets_a_fleet_run_whose_weights_are_still_loading(fleet: Fleet) -> None:
    """Trainer A loads for thirty seconds, operator B says UNPAUSE: it decoded with half of them."""
    slow, quick = await begin(fleet, "a", "b")
    await fleet.client.pause(owner="trainer")
    await fleet.client.pause(owner="operator")
    slow.hold_steps.clear()
    loading = asyncio.create_task(update(fleet, "v1"))
    await quick.until(lambda: quick.member.version == "v1")
    assert slow.member.state == "UPDATING"
    for owner, other in (("operator", None), ("operator", "trainer"), ("trainer", None)):
        with pytest.raises(ChannelFault, match=r"UNPAUSE is refused.*the weights are unknown"):
            await fleet.client.unpause(owner=owner, break_hold_of=other)
    with pytest.raises(ChannelFault, match=r"SUSPEND is refused.*the weights are unknown"):
        await fleet.client.suspend(owner="operator")
    slow.hold_steps.set()
    await loading
    await fleet.client.unpause(owner="trainer")
    assert quick.member.state == "PAUSED", "the operator holds it still"
    await fleet.client.unpause(owner="operator")
    await fleet.ready("a", "b")
    assert {slow.member.version, quick.member.version} == {"v1"}


async def test_an_update_that_another_overtook_is_not_reported_as_done(fleet: Fleet) -> None:
    """Both end PAUSED: the state alone would tell the first trainer that its weights stand."""
    (engine,) = await begin(fleet, "a")
    await fleet.client.pause(owner="one")
    engine.hold_steps.clear()
    first = asyncio.create_task(update(fleet, "v1", "one"))
    await engine.until(lambda: engine.member.state == "UPDATING")
    second = asyncio.create_task(update(fleet, "v2", "two"))
    await engine.until(lambda: engine.targets[-1].version == "v2")
    engine.hold_steps.set()
    await second
    with pytest.raises(CommandFailed, match="superseded: the weights asked for are 'v2'"):
        await first
    assert engine.member.version == "v2"


async def test_a_pause_whose_hold_was_broken_before_it_stood_is_not_reported_as_done(fleet: Fleet) -> None:
    """Somebody else holds the fleet, so it stands; but not for this caller."""
    (engine,) = await begin(fleet, "a")
    engine.hold_steps.clear()
    mine = asyncio.create_task(fleet.client.pause(owner="mine"))
    await engine.until(lambda: engine.member.state == "PAUSING")
    other = asyncio.create_task(fleet.client.pause(owner="other"))
    await engine.until(lambda: len(engine.targets[-1].holds) == 2)
    breaking = asyncio.create_task(fleet.client.unpause(owner="admin", break_hold_of="mine"))
    await engine.until(lambda: [hold.owner for hold in engine.targets[-1].holds] == ["other"])
    engine.hold_steps.set()
    assert (await other).ok
    assert (await breaking).ok
    with pytest.raises(CommandFailed, match="superseded: the hold of 'mine' is over"):
        await mine


async def test_an_update_that_its_coordinator_did_not_survive_leaves_the_weights_unknown(
    fleet: Fleet,
) -> None:
    slow, quick = await begin(fleet, "a", "b")
    await fleet.client.pause(owner="trainer")
    slow.hold_steps.clear()
    loading = asyncio.create_task(update(fleet, "v1"))
    await quick.until(lambda: quick.member.version == "v1")
    loading.cancel()
    await fleet.stop_coordinator(lose_state=True)
    coordinator = await fleet.start_coordinator(expected=["a", "b"], recovering_s=5.0)
    await fleet.until(lambda: coordinator.fleet.phase == "LEADING")
    with pytest.raises(ChannelFault, match=r"UNPAUSE is refused.*the weights are unknown"):
        await fleet.client.unpause(owner="trainer")
    slow.hold_steps.set()
    await update(fleet, "v2")
    await fleet.client.unpause(owner="trainer")
    await fleet.ready("a", "b")
    assert {slow.member.version, quick.member.version} == {"v2"}


async def test_a_pause_that_allows_for_the_unseen_does_not_vouch_for_their_weights(fleet: Fleet) -> None:
    """Its leave to go on without them was given for the pause, not for the update that was asked for meanwhile."""
    await fleet.start_coordinator(exit_is_proof=False)
    child = await fleet.engine_process("b", 0.01)
    seen = await fleet.engine("a", abilities=ABLE)
    await fleet.start_dispatcher()
    await fleet.ready("a", "b")
    lost = fleet.member("b")
    assert lost is not None
    assert await child.end_tree(5.0)
    await fleet.until(lambda: (member := fleet.member("b")) is not None and member.state == "SUSPECT")
    pausing = asyncio.create_task(fleet.client.pause(owner="t", timeout_s=1.0, allow_unknown=True))
    await seen.until(lambda: seen.member.state == "PAUSED")
    updating = asyncio.create_task(update(fleet, "v1", "t"))
    assert (await pausing).ok
    assert seen.member.version == "v1"
    with pytest.raises(ChannelFault, match="the weights are unknown"):
        await fleet.client.unpause(owner="t")
    await fleet.client.member_gone("b", lost.incarnation)
    await updating
    await fleet.client.unpause(owner="t")


async def test_every_dispatch_names_tenant_and_weights_so_that_no_cached_block_crosses(fleet: Fleet) -> None:
    """Also that of a request which began before the update and goes on elsewhere after it."""
    first, second = await begin(fleet, "a", "b")
    stream = fleet.ask(PROMPT, 6, engine="a", tenant="t")
    await first.until(lambda: first.streams)
    await first.step(2)
    head = await read_some(stream, 2)
    async with fleet.client.paused(owner="trainer"):
        await update(fleet, "v1")
    await fleet.ready("a", "b")
    await first.step(1)
    await first.close()
    await fleet.client.member_gone("a", first.me.incarnation)
    await second.until(lambda: second.streams)
    await second.step(4)
    tail, made = await made_of(stream)
    assert head + tail == continuation_of(PROMPT, 6)
    assert made[-1].version == "v1"
    salts = [body.cache_salt for body in [*first.said(Dispatch), *second.said(Dispatch)]]  # type: ignore[attr-defined]
    assert salts == [cache_salt("t", "0"), cache_salt("t", "v1")]
    assert cache_salt("t", "11:v") != cache_salt("t1", "1:v"), "no name runs into another"


async def test_a_failed_update_serves_nothing_and_says_on_which_engine(fleet: Fleet) -> None:
    """A member whose update failed serves nothing; its requests are kept and go on with the next weights."""
    (engine,) = await begin(fleet, "a")
    stream = fleet.ask(PROMPT, 4)
    await engine.until(lambda: engine.streams)
    await engine.step(2)
    await fleet.client.pause(owner="trainer")
    engine.fail_update = "shard 2 of 3 is torn"
    with pytest.raises(CommandFailed, match="a failed on the way"):
        await update(fleet, "v1")
    assert engine.member.failed == "shard 2 of 3 is torn"
    await engine.step(1)
    engine.fail_update = None
    await update(fleet, "v2")
    await fleet.client.unpause(owner="trainer")
    await fleet.ready("a")
    await engine.step(2)
    tokens, made = await made_of(stream)
    assert tokens == continuation_of(PROMPT, 4)
    assert made == [Made("0", 2), Made("v2", 2)]


# --- F1 -----------------------------------------------------------------------------------------------------------------


async def test_a_member_that_missed_the_pause_and_hears_the_stop_walks_there_by_way_of_it(
    fleet: Fleet,
) -> None:
    """RUNNING × STOP has no row in a table of signals: it was refused, repeated for ever."""
    deaf, quick = await begin(fleet, "a", "b")
    hear = deaf._hear
    deaf._hear = lambda told: None  # type: ignore[method-assign]
    with pytest.raises(CommandFailed, match="a did not get there by the deadline"):
        await fleet.client.pause(owner="t", timeout_s=0.3)
    stopping = asyncio.create_task(fleet.client.stop(owner="t"))
    await quick.until(lambda: quick.member.state == "STOPPED")
    assert deaf.member.state == "RUNNING"
    deaf._hear = hear  # type: ignore[method-assign]
    assert (await stopping).ok
    assert [step.step for step in deaf.taken[-2:]] == ["PAUSE", "STOP"]


async def test_a_stricter_mode_reaches_engines_that_stand_already(fleet: Fleet) -> None:
    """pause(abort) on a fleet that was paused with keep was taken for a repetition."""
    (engine,) = await begin(fleet, "a")
    stream = fleet.ask(PROMPT, 9)
    await engine.until(lambda: engine.streams)
    await engine.step(2)
    await fleet.client.pause("keep", owner="t")
    await fleet.client.pause("abort", owner="t")
    tokens, _ = await made_of(stream)
    assert tokens == continuation_of(PROMPT, 2)
    assert engine.member.mode == "abort"

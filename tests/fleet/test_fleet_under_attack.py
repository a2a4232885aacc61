"""Words of one engine that make no sense must not cost the front, whatever they are."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_engine import continuation_of, read

from interlock.core.errors import ChannelFault
from interlock.core.identity import Epoch
from interlock.core.limits import NAME_CHARS_MAX
from interlock.fleet import engine_link
from interlock.wire.channel import Channel, connect_channel
from interlock.wire.engine_messages import Resume
from interlock.wire.fleet_messages import Command, EngineFacts, MemberReport, Target
from interlock.wire.identity import passing_identity

Fleet = Any


async def test_an_engine_with_an_address_that_is_none_costs_nobody_but_itself(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    await fleet.engine("a", step_s=0.0)
    dispatcher = await fleet.start_dispatcher()
    await fleet.ready("a")
    channel = await engine_channel(fleet, "odd")
    facts = EngineFacts("no address", "scripted", 100, "odd")
    await channel.send(MemberReport(facts, "RUNNING", Epoch(), None, "0"))
    await fleet.until(lambda: len(dispatcher.membership.members) == 2)
    odd = next(life for life in dispatcher._links if life.name != "a")
    await fleet.until(lambda: "no address" in dispatcher._links[odd].last_error)
    assert not dispatcher.stale.done()
    assert [piece.finish async for piece in fleet.ask([1, 2], 3)][-1] == "length"


async def engine_channel(fleet: Fleet, name: str) -> Channel:
    channel = await connect_channel(
        fleet.host,
        fleet.address,
        me=passing_identity(fleet.host, name),
        role="engine",
        accept=Target,
        deadline_s=5.0,
    )
    fleet.stack.push_async_callback(channel.close)
    return channel


async def test_a_version_that_would_fill_what_fronts_are_told_makes_nobody_a_member(fleet: Fleet) -> None:
    """Two of nine million characters do not fit into one frame, and the coordinator tells all members in one."""
    coordinator = await fleet.start_coordinator()
    await fleet.engine("a")
    await fleet.until(lambda: coordinator.fleet.phase == "LEADING")
    facts = EngineFacts("unix:/odd", "scripted", 100, "odd")
    channel = await engine_channel(fleet, "odd")
    with pytest.raises(ChannelFault, match="version"):
        long = "7" * (NAME_CHARS_MAX + 1)
        await channel.request(MemberReport(facts, "RUNNING", Epoch(), None, long), timeout_s=5.0)
    assert "odd" not in [member.name for member in (await fleet.client.status()).members]


@pytest.mark.parametrize("epoch", [Epoch((1 << 64) - 1, 1), Epoch(1 << 62, 0), Epoch(-1, 0), Epoch(1, -1)])
async def test_an_epoch_that_nobody_can_have_told_deposes_nobody(fleet: Fleet, epoch: Epoch) -> None:
    """Believed, it would be written down, and the next coordinator would lead above it: by a number that no message can carry."""
    coordinator = await fleet.start_coordinator()
    await fleet.engine("a")
    channel = await engine_channel(fleet, "odd")
    facts = EngineFacts("unix:/odd", "scripted", 100, "odd")
    heard = Target(epoch, "PAUSED", "keep", "0")
    with pytest.raises(ChannelFault, match="no coordinator has told"):
        await channel.request(MemberReport(facts, "RUNNING", epoch, None, "0", heard=heard), timeout_s=5.0)
    assert (await fleet.client.pause(owner="t")).ok
    assert [member.name for member in (await fleet.client.status()).members] == ["a"]
    assert coordinator.fleet.phase == "LEADING"


async def test_a_command_without_an_id_is_refused_for_nobody_could_ask_about_it(fleet: Fleet) -> None:
    coordinator = await fleet.start_coordinator()
    await fleet.engine("a")
    with pytest.raises(ChannelFault, match="command_id must not be empty"):
        await fleet.client.run(Command("PAUSE", "t", ""))
    assert (coordinator.fleet.state, coordinator.fleet.holds) == ("RUNNING", ())


async def test_a_gap_right_after_a_resume_is_asked_for_too_when_nothing_follows_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last words of a stream are the gap: no later word of the engine will bring it up again."""
    monkeypatch.setattr(engine_link, "REFUSED_SECONDS", 1.0)
    await fleet.start_coordinator()
    engine = await fleet.engine("a")
    await fleet.start_dispatcher()
    await fleet.ready("a")
    stream = fleet.ask([1, 2], 3)
    await engine.until(lambda: engine.streams)
    await engine.step(1)
    running = engine.streams[stream.request.id]
    engine._advance(running)
    running.sent += 1  # this token's frame is lost, within a second of the connection's Resume
    await engine.step(1)
    tokens, finish = await read(stream)
    assert (tokens, finish) == (continuation_of([1, 2], 3), "length")
    assert len(engine.said(Resume)) == 2

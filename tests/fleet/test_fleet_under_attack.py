"""Words of one engine that make no sense must not cost the front, whatever they are."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_engine import continuation_of, read

from interlock.core.identity import Epoch
from interlock.fleet import engine_link
from interlock.wire.channel import connect_channel
from interlock.wire.engine_messages import Resume
from interlock.wire.fleet_messages import EngineFacts, MemberReport, Target
from interlock.wire.identity import passing_identity

Fleet = Any


async def test_an_engine_with_an_address_that_is_none_costs_nobody_but_itself(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    await fleet.engine("a", step_s=0.0)
    dispatcher = await fleet.start_dispatcher()
    await fleet.ready("a")
    channel = await connect_channel(
        fleet.host,
        fleet.address,
        me=passing_identity(fleet.host, "odd"),
        role="engine",
        accept=Target,
        deadline_s=5.0,
    )
    fleet.stack.push_async_callback(channel.close)
    facts = EngineFacts("no address", "scripted", 100, "odd")
    await channel.send(MemberReport(facts, "RUNNING", Epoch(), None, "0"))
    await fleet.until(lambda: len(dispatcher.membership.members) == 2)
    odd = next(life for life in dispatcher._links if life.name != "a")
    await fleet.until(lambda: "no address" in dispatcher._links[odd].last_error)
    assert not dispatcher.stale.done()
    assert [piece.finish async for piece in fleet.ask([1, 2], 3)][-1] == "length"


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

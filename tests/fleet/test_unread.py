"""An engine may forget an answer when its reader has come to the end, and not before."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from scripted_engine import ScriptedEngine, continuation_of, read

from interlock.fleet.generation import Overloaded
from interlock.fleet.ledger import Life
from interlock.fleet.unread import UnreadEnds
from interlock.wire.engine_messages import Abort, Acknowledge, AcknowledgeAll, Cursor, Dispatch, End, Resume

if TYPE_CHECKING:
    from conftest import Fleet

A, B = Life("a", 1), Life("b", 1)


def acknowledged(engine: ScriptedEngine) -> list[str]:
    ends: list[str] = []
    for body in engine.heard:
        if isinstance(body, Acknowledge):
            ends.append(body.request)
        elif isinstance(body, AcknowledgeAll):
            ends += [end.request for end in body.ends]
    return ends


async def started(fleet: Fleet, **more: object) -> ScriptedEngine:
    await fleet.start_coordinator()
    engine = await fleet.engine("a", instant=True)
    await fleet.start_dispatcher(**more)
    await fleet.ready("a")
    return engine


async def test_an_end_is_acknowledged_when_it_is_read(fleet: Fleet) -> None:
    engine = await started(fleet)
    dispatcher = fleet.dispatcher
    assert dispatcher is not None
    slow, quick = fleet.ask([1], 3), fleet.ask([2], 3)
    assert await read(quick) == (continuation_of([2], 3), "length")
    await fleet.until(lambda: acknowledged(engine) == [quick.request.id])
    assert not dispatcher.ledger.entries()
    assert list(engine.streams) == [slow.request.id]
    assert await read(slow) == (continuation_of([1], 3), "length")
    await fleet.until(lambda: not engine.streams)


async def test_ends_are_acknowledged_while_there_is_always_more_to_dispatch(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines keep what is not acknowledged: at a thousand in flight they were full, and clients were turned away."""
    engine = await started(fleet)
    dispatcher = fleet.dispatcher
    assert dispatcher is not None
    some = dispatcher._dispatching.dispatch_some
    monkeypatch.setattr(dispatcher._dispatching, "dispatch_some", lambda: (some(), True)[1])
    monkeypatch.setattr(type(dispatcher._requests), "waiting", property(lambda _: True))
    one = fleet.ask([1], 3)
    assert await read(one) == (continuation_of([1], 3), "length")
    await fleet.until(lambda: acknowledged(engine) == [one.request.id])


async def test_what_nobody_will_read_is_acknowledged_too(fleet: Fleet) -> None:
    engine = await started(fleet)
    dispatcher = fleet.dispatcher
    assert dispatcher is not None
    left = fleet.ask([1], 3)
    await fleet.until(lambda: not dispatcher.ledger.entries())
    assert engine.streams
    await left.abort()
    await fleet.until(lambda: not engine.streams)
    assert not any(isinstance(body, Abort) for body in engine.heard)


async def test_an_end_that_is_told_again_changes_nothing_while_it_is_unread(fleet: Fleet) -> None:
    engine = await started(fleet)
    dispatcher = fleet.dispatcher
    assert dispatcher is not None
    slow = fleet.ask([1], 3)
    await fleet.until(lambda: not dispatcher.ledger.entries())
    (link,) = dispatcher._links.values()
    assert link._channel is not None
    await link._channel.close()
    await fleet.until(lambda: sum(isinstance(body, Resume) for body in engine.heard) == 2)
    resumed = [body for body in engine.heard if isinstance(body, Resume)][-1]
    assert resumed.streams == [Cursor(slow.request.id, 1, 3)]
    await fleet.until(lambda: dispatcher.counters["deltas_unknown"])
    assert acknowledged(engine) == []
    assert await read(slow) == (continuation_of([1], 3), "length")
    await fleet.until(lambda: not engine.streams)


async def test_answers_that_wait_for_their_readers_count_as_in_flight(fleet: Fleet) -> None:
    await started(fleet, requests_max=2)
    dispatcher = fleet.dispatcher
    assert dispatcher is not None
    slow = [fleet.ask([number], 1) for number in range(2)]
    await fleet.until(lambda: not dispatcher.ledger.entries())
    with pytest.raises(Overloaded, match="not read yet"):
        fleet.ask([3], 1)
    await asyncio.gather(*(read(generation) for generation in slow))
    assert await read(fleet.ask([3], 1)) == (continuation_of([3], 1), "length")


async def test_what_waits_together_goes_out_in_order_and_every_request_once(fleet: Fleet) -> None:
    engine = await started(fleet)
    asked = [fleet.ask([number], 1) for number in range(200)]
    answers = await asyncio.gather(*(read(generation) for generation in asked))
    assert answers == [(continuation_of([number], 1), "length") for number in range(200)]
    dispatched = [body.request for body in engine.heard if isinstance(body, Dispatch)]
    assert dispatched == [generation.request.id for generation in asked]


def test_ends_are_kept_by_engine_until_they_are_read_or_lost() -> None:
    told: list[None] = []
    unread = UnreadEnds(lambda: told.append(None))
    for name, life in (("x", A), ("y", A), ("z", B)):
        unread.keep(name, life, 2, 5)
    assert unread.holds("x", 2)
    assert not unread.holds("x", 1)
    unread.read("x")
    unread.read("x")
    unread.read("nobody's")
    assert (len(told), len(unread)) == (1, 2)
    assert unread.wanted(A) == [Cursor("y", 2, 5)]
    assert unread.take_read() == {A: [End("x", 2)]}
    assert unread.take_read() == {}
    unread.read("z")
    unread.lost(B)
    unread.lost(A)
    assert (unread.take_read(), len(unread)) == ({}, 0)

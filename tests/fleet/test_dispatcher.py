"""What a client reads is the undisturbed answer, whatever happens to engines, connections and the coordinator."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted_engine import continuation_of, read, read_some

from interlock.core.errors import StaleError
from interlock.core.limits import REQUEST_FAILURES_MAX
from interlock.fleet.dispatcher import Dispatcher
from interlock.fleet.generation import NoMember, Overloaded, RequestFailed
from interlock.wire.engine_messages import Abort, Acknowledge, Delta, Dispatch, Resume
from interlock.wire.identity import Identity

PROMPT = [11, 22, 33]
Fleet = Any


async def start(fleet: Fleet, *names: str, **more: object) -> list[Any]:
    await fleet.start_coordinator()
    engines = [await fleet.engine(name, **more) for name in names]
    await fleet.start_dispatcher()
    await fleet.ready(*names)
    return engines


async def test_an_undisturbed_stream_delivers_all_tokens_and_its_end_is_acknowledged(fleet: Fleet) -> None:
    (engine,) = await start(fleet, "a")
    stream = fleet.ask(PROMPT, 20)
    await engine.until(lambda: engine.streams)
    await engine.step(20)  # the end is said once: its acknowledgement answers that
    tokens, finish = await read(stream)
    assert tokens == continuation_of(PROMPT, 20)
    assert finish == "length"
    await engine.until(lambda: engine.said(Acknowledge) and not engine.streams)
    assert len(fleet.dispatcher.ledger) == 0


async def test_requests_go_to_the_least_loaded_engine(fleet: Fleet) -> None:
    a, b = await start(fleet, "a", "b")
    for _ in range(6):
        fleet.ask(PROMPT, 5)
    await a.until(lambda: len(a.streams) == 3)
    await b.until(lambda: len(b.streams) == 3)


async def test_a_killed_engine_process_is_noticed_by_its_exit_and_its_stream_goes_on_elsewhere(
    fleet: Fleet,
) -> None:
    """megatron.md §4.3 hole 2: an engine's death loses requests silently."""
    await fleet.start_coordinator()
    child = await fleet.engine_process("a", 0.004)
    await fleet.start_dispatcher()
    await fleet.ready("a")
    streams = [fleet.ask([*PROMPT, n], 1500) for n in range(4)]
    heads = [await read_some(stream, 3) for stream in streams]
    await fleet.engine("b", step_s=0.0)
    await fleet.ready("b")
    assert await child.end_tree(5.0)
    for n, (stream, head) in enumerate(zip(streams, heads, strict=True)):
        tail, finish = await read(stream)
        assert head + tail == continuation_of([*PROMPT, n], 1500)
        assert finish == "length"
        assert stream.attempts == 2
        assert 0 < len(head) < 1500


async def test_a_frozen_engine_is_suspected_and_what_it_says_after_waking_is_not_heard(fleet: Fleet) -> None:
    """Late tokens of an old attempt after a redispatch (hazards F5)."""
    a, b = await start(fleet, "a", "b")
    stream = fleet.ask(PROMPT, 10, engine="a")
    await a.until(lambda: a.streams)
    await a.step(3)
    head = await read_some(stream, 3)
    life = next(life for life in fleet.dispatcher._links if life.name == "a")
    fleet.dispatcher._suspect(life)
    await b.until(lambda: b.streams)
    name = stream.request.id
    assert next(iter(b.streams.values())).dispatch.attempt == 2
    await a.say(Delta(name, 1, 3, [1, 2, 3], [], "", 0))
    await a.say(Delta(name, 1, 6, [4], [], "stop", 0))
    await b.step(7)
    tail, finish = await read(stream)
    assert head + tail == continuation_of(PROMPT, 10)
    assert finish == "length"
    await a.until(lambda: Abort(name, 1) in a.heard)
    assert fleet.dispatcher.counters["deltas_stale"] + fleet.dispatcher.counters["deltas_unknown"] >= 2


async def test_frames_that_come_twice_deliver_once(fleet: Fleet) -> None:
    (engine,) = await start(fleet, "a", step_s=0.001)
    engine.repeat_frames = True
    tokens, _ = await read(fleet.ask(PROMPT, 30))
    assert tokens == continuation_of(PROMPT, 30)
    assert fleet.dispatcher.counters["deltas_repeat"] > 5


async def test_a_gap_is_asked_for_again_and_never_guessed(fleet: Fleet) -> None:
    (engine,) = await start(fleet, "a")
    stream = fleet.ask(PROMPT, 6)
    await engine.until(lambda: engine.streams)
    await engine.step(2)
    running = engine.streams[stream.request.id]
    engine._advance(running)
    running.sent += 1  # this token's frame is lost
    await engine.step(1)
    await engine.until(lambda: len(engine.said(Resume)) == 2)
    assert engine.said(Resume)[1].streams[0].start == 2
    await engine.step(5)
    tokens, _ = await read(stream)
    assert tokens == continuation_of(PROMPT, 6)


async def test_a_broken_connection_to_a_living_engine_loses_nothing(fleet: Fleet) -> None:
    (engine,) = await start(fleet, "a")
    stream = fleet.ask(PROMPT, 8, temperature=1.0, seed=3)  # could not be continued elsewhere
    await engine.until(lambda: engine.streams)
    await engine.step(3)
    head = await read_some(stream, 3)
    await engine.drop_front()
    for running in engine.streams.values():  # computed while nobody listened
        engine._advance(running)
    await engine.until(lambda: engine.channel is not None)
    await engine.step(5)
    tail, _ = await read(stream)
    assert head + tail == continuation_of(PROMPT, 8)
    assert stream.attempts == 1


async def test_an_engine_that_forgot_a_stream_is_replaced_for_it(fleet: Fleet) -> None:
    a, b = await start(fleet, "a", "b")
    stream = fleet.ask(PROMPT, 8, engine="a")
    await a.until(lambda: a.streams)
    await a.step(3)
    head = await read_some(stream, 3)
    a.streams.clear()
    await a.drop_front()
    await b.until(lambda: b.streams)
    await b.step(5)
    tail, _ = await read(stream)
    assert head + tail == continuation_of(PROMPT, 8)


async def test_what_cannot_be_carried_on_ends_by_name_and_is_not_invented(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    child = await fleet.engine_process("a", 0.002)
    await fleet.start_dispatcher()
    await fleet.ready("a")
    stream = fleet.ask(PROMPT, 4000, temperature=1.0, seed=3)
    head = await read_some(stream, 2)
    await fleet.engine("b", step_s=0.001)
    await fleet.ready("b")
    assert await child.end_tree(5.0)
    with pytest.raises(RequestFailed, match="seed") as failed:
        while True:
            head += await read_some(stream, 1)
    assert failed.value.code == "cannot_continue"
    assert head == continuation_of(PROMPT, len(head))


async def test_without_a_coordinator_the_front_sees_the_exit_of_an_engine_by_itself(fleet: Fleet) -> None:
    """Suspicion would not do: what cannot be carried on waits for a proof."""
    await fleet.start_coordinator()
    child = await fleet.engine_process("a", 0.002)
    await fleet.start_dispatcher()
    await fleet.ready("a")
    stream = fleet.ask(PROMPT, 4000, temperature=1.0, seed=3)
    await read_some(stream, 2)
    await fleet.stop_coordinator()
    assert await child.end_tree(5.0)
    with pytest.raises(RequestFailed, match="seed"):
        await read(stream)


async def test_a_client_that_leaves_aborts_its_request_on_the_engine(fleet: Fleet) -> None:
    """megatron.md §4.3 hole 1: a client's death with work in flight harms nobody else."""
    (engine,) = await start(fleet, "a")
    stream, other = fleet.ask(PROMPT, 50), fleet.ask([7], 3)
    await engine.until(lambda: len(engine.streams) == 2)
    await engine.step(2)
    await stream.abort()
    await stream.abort()
    await engine.until(lambda: Abort(stream.request.id, 1) in engine.heard)
    await engine.say(Delta(stream.request.id, 1, 2, [1], [], "", 0))
    await engine.step(1)
    assert (await read(other))[0] == continuation_of([7], 3)
    assert await anext(stream, None) is None
    assert len(fleet.dispatcher.ledger) == 0


async def test_a_client_that_leaves_while_waiting_leaves_no_trace(fleet: Fleet) -> None:
    await start(fleet, "a")
    await fleet.client.pause(owner="t")
    stream = fleet.ask(PROMPT, 5)
    await stream.abort()
    fleet.dispatcher.check_integrity()
    assert not fleet.dispatcher._requests.queue


async def test_an_abort_is_not_lost_with_its_connection(fleet: Fleet) -> None:
    (engine,) = await start(fleet, "a")
    stream, other = fleet.ask(PROMPT, 50), fleet.ask([7], 3)
    await engine.until(lambda: len(engine.streams) == 2)
    await engine.drop_front()
    await stream.abort()
    await engine.until(lambda: list(engine.streams) == [other.request.id])
    assert not engine.said(Abort)  # told by what the front did not want any more
    await engine.step(3)
    assert (await read(other))[0] == continuation_of([7], 3)


async def test_a_front_with_a_newer_life_is_told_to_stop(fleet: Fleet) -> None:
    await start(fleet, "a")
    old = fleet.dispatcher
    newer = Identity(old._me.name, old._me.incarnation + 1)
    async with Dispatcher(fleet.host, newer, fleet.address) as young:
        await fleet.until(lambda: young.ready)
        async with asyncio.timeout(10):
            assert isinstance(await old.stale, StaleError)


async def test_a_contradiction_is_not_believed(fleet: Fleet) -> None:
    a, b = await start(fleet, "a", "b")
    stream = fleet.ask(PROMPT, 6, engine="a")
    await a.until(lambda: a.streams)
    await a.step(2)
    head = await read_some(stream, 2)
    await a.say(Delta(stream.request.id, 1, 0, [1, 2, 3], [], "", 0))
    await b.until(lambda: b.streams)
    await b.step(4)
    tail, _ = await read(stream)
    assert head + tail == continuation_of(PROMPT, 6)
    assert fleet.dispatcher.counters["deltas_conflict"] == 1


async def test_an_engine_full_sends_the_request_on_and_all_full_is_overload(fleet: Fleet) -> None:
    """megatron.md §4.3 hole 14: no admission control."""
    a, b = await start(fleet, "a", "b")
    a.refuse_with = "overloaded"
    stream = fleet.ask(PROMPT, 3, engine="a")
    await b.until(lambda: b.streams)
    await b.step(3)
    assert (await read(stream))[0] == continuation_of(PROMPT, 3)
    b.refuse_with = "overloaded"
    with pytest.raises(Overloaded) as refused:
        await read(fleet.ask(PROMPT, 3))
    assert refused.value.retry_after_s > 0


async def test_a_full_ledger_refuses_at_once(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    await fleet.engine("a")
    await fleet.start_dispatcher(requests_max=2)
    await fleet.ready("a")
    first = fleet.ask(PROMPT, 3)
    fleet.ask(PROMPT, 3)
    with pytest.raises(Overloaded):
        fleet.ask(PROMPT, 3)
    await first.abort()
    fleet.ask(PROMPT, 3)


async def test_invalid_is_told_to_the_client_and_not_tried_elsewhere(fleet: Fleet) -> None:
    a, b = await start(fleet, "a", "b")
    a.refuse_with = "invalid"
    with pytest.raises(RequestFailed, match="refused") as failed:
        await read(fleet.ask(PROMPT, 3, engine="a"))
    assert failed.value.code == "invalid"
    assert not b.said(Dispatch)


async def test_a_request_that_ends_its_engines_without_a_token_is_given_up(fleet: Fleet) -> None:
    engines = await start(fleet, "a", "b", "c", "d")

    async def fail_each() -> None:
        for _ in range(REQUEST_FAILURES_MAX):
            await fleet.until(lambda: any(e.streams for e in engines))
            engine = next(e for e in engines if e.streams)
            name, running = next(iter(engine.streams.items()))
            attempt = running.dispatch.attempt
            engine.streams.clear()
            await engine.say(Delta(name, attempt, 0, [], [], "error", 0, "out of memory"))

    failing = asyncio.create_task(fail_each())
    with pytest.raises(RequestFailed, match="out of memory") as failed:
        await read(fleet.ask(PROMPT, 3))
    await failing
    assert failed.value.code == "engine_failed"


async def test_a_deadline_ends_a_request_wherever_it_is(fleet: Fleet) -> None:
    (engine,) = await start(fleet, "a")
    stream = fleet.ask(PROMPT, 30, deadline_s=0.3)
    await engine.until(lambda: engine.streams)
    with pytest.raises(RequestFailed, match="deadline") as failed:
        await read(stream)
    assert failed.value.code == "deadline"
    await engine.until(lambda: not engine.streams)


async def test_without_coordinator_or_engine_the_client_is_told_what_to_do(fleet: Fleet) -> None:
    """megatron.md §4.3 hole 9: zero engines and a request ended the coordinator."""
    await fleet.start_dispatcher(no_member_s=0.3)
    with pytest.raises(NoMember, match="coordinator"):
        fleet.ask(PROMPT, 3)
    await fleet.start_coordinator()
    await fleet.until(lambda: fleet.dispatcher.membership is not None)
    with pytest.raises(NoMember, match="no engine is alive"):
        fleet.ask(PROMPT, 3)


async def test_requests_whose_engines_are_all_gone_wait_for_a_new_life(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    child = await fleet.engine_process("a", 0.004)
    await fleet.start_dispatcher()
    await fleet.ready("a")
    stream = fleet.ask(PROMPT, 1500)
    head = await read_some(stream, 2)
    assert await child.end_tree(5.0)
    await fleet.engine_process("a", 0.0)
    tail, _ = await read(stream)
    assert head + tail == continuation_of(PROMPT, 1500)


async def test_what_was_begun_goes_on_before_what_waits(fleet: Fleet) -> None:
    (a,) = await start(fleet, "a")
    begun = fleet.ask(PROMPT, 8)
    await a.until(lambda: a.streams)
    await a.step(2)
    await read_some(begun, 2)
    await fleet.client.pause(owner="t")
    later = [fleet.ask([n], 3) for n in range(2)]
    await a.close()
    new = await fleet.engine("a", directory="a again")
    await fleet.ready("a", state="PAUSED")
    await fleet.client.unpause(owner="t")
    await new.until(lambda: len(new.streams) == 3)
    assert [d.request for d in new.said(Dispatch)] == [g.request.id for g in (begun, *later)]


async def test_a_coordinator_that_dies_disturbs_no_stream_and_no_new_request(fleet: Fleet) -> None:
    """megatron.md §4.3 hole 4."""
    (engine,) = await start(fleet, "a")
    stream = fleet.ask(PROMPT, 10)
    await engine.until(lambda: engine.streams)
    await engine.step(3)
    await fleet.stop_coordinator()
    await fleet.until(lambda: not fleet.dispatcher.coordinator_connected)
    later = fleet.ask([5], 7)
    await engine.until(lambda: len(engine.streams) == 2)
    await engine.step(7)
    assert (await read(stream))[0] == continuation_of(PROMPT, 10)
    assert (await read(later))[0] == continuation_of([5], 7)


async def test_a_slow_reader_blocks_nobody_else(fleet: Fleet) -> None:
    (_engine,) = await start(fleet, "a", step_s=0.0)
    slow, quick = fleet.ask(PROMPT, 300), fleet.ask([5], 300)
    assert (await read(quick))[0] == continuation_of([5], 300)
    await fleet.until(lambda: len(fleet.dispatcher.ledger) == 0)
    assert (await read(slow))[0] == continuation_of(PROMPT, 300)


async def test_closing_the_front_ends_what_it_had_in_flight(fleet: Fleet) -> None:
    (engine,) = await start(fleet, "a")
    stream = fleet.ask(PROMPT, 30)
    await engine.until(lambda: engine.streams)
    await fleet.dispatcher.close()
    with pytest.raises(RequestFailed) as failed:
        await read(stream)
    assert failed.value.code == "closed"
    await engine.until(lambda: not engine.streams)

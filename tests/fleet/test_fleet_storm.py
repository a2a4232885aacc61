"""Whatever happens in whatever order, every stream is the undisturbed one, and the books balance.

In-process engines whose lives, connections and frames are disturbed at random from a seed, with commands and coordinator
restarts among them; and processes that are really frozen and killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from typing import Any

import pytest
from scripted_engine import continuation_of, read, read_some

from interlock.core.errors import ChannelFault
from interlock.fleet import engine_link, members
from interlock.fleet.client import CommandFailed

Fleet = Any
NAMES = ["a", "b", "c"]


class Storm:
    """One disturbance at a time, drawn from the seed."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet, self.random = fleet, random.Random(seed)
        self.engines: dict[str, Any] = {}
        self.told: list[str] = []

    async def begin(self) -> None:
        await self.fleet.start_coordinator()
        for name in NAMES:
            self.engines[name] = await self.fleet.engine(name, step_s=0.003)
        await self.fleet.start_dispatcher()
        await self.fleet.ready(*NAMES)

    async def disturb(self) -> None:
        deeds = [
            self.end_a_life, self.break_a_connection, self.double_frames, self.forget_streams, self.lose_a_frame,
            self.pause_and_unpause, self.restart_coordinator, self.suspect,
        ]  # fmt: skip
        deed = self.random.choice(deeds)
        self.told.append(deed.__name__)
        await deed(self.engines[self.random.choice(NAMES)])

    async def end_a_life(self, engine: Any) -> None:
        """A crash and a restart under the same name, with everything forgotten."""
        await engine.close()
        self.engines[engine.name] = await self.fleet.engine(engine.name, step_s=0.003)

    async def break_a_connection(self, engine: Any) -> None:
        if engine.channel is not None:
            await engine.drop_front()

    async def double_frames(self, engine: Any) -> None:
        engine.repeat_frames = not engine.repeat_frames

    async def forget_streams(self, engine: Any) -> None:
        engine.streams.clear()
        await self.break_a_connection(engine)

    async def lose_a_frame(self, engine: Any) -> None:
        for stream in engine.streams.values():
            if not stream.finish:
                engine._advance(stream)
                stream.sent = len(stream.tokens)

    async def pause_and_unpause(self, _: Any) -> None:
        try:
            await self.fleet.client.pause("keep", owner="storm", timeout_s=2.0)
            await asyncio.sleep(0.02)
        except CommandFailed:
            pass
        finally:
            with contextlib.suppress(CommandFailed, ChannelFault):
                await self.fleet.client.unpause(owner="storm", timeout_s=2.0)

    async def restart_coordinator(self, _: Any) -> None:
        await self.fleet.stop_coordinator(lose_state=self.random.random() < 0.5)
        await self.fleet.start_coordinator(recovering_s=0.2, exit_is_proof=False)

    async def suspect(self, engine: Any) -> None:
        for life in list(self.fleet.dispatcher._links):
            if life.name == engine.name:
                self.fleet.dispatcher._suspect(life)


@pytest.mark.parametrize("seed", range(6))
async def test_no_order_of_disturbances_changes_a_token(fleet: Fleet, seed: int) -> None:
    storm = Storm(fleet, seed)
    await storm.begin()
    lengths = [storm.random.randrange(1, 250) for _ in range(24)]
    streams = [fleet.ask([seed, n, 7], length) for n, length in enumerate(lengths)]
    reading = [asyncio.create_task(read(stream)) for stream in streams]
    for _ in range(12):
        await storm.disturb()
        await asyncio.sleep(storm.random.random() * 0.08)
        fleet.dispatcher.check_integrity()
    try:
        for n, (length, answer) in enumerate(zip(lengths, reading, strict=True)):
            tokens, finish = await asyncio.wait_for(answer, 30)
            assert tokens == continuation_of([seed, n, 7], length), storm.told
            assert finish == "length"
    finally:
        for answer in reading:
            answer.cancel()
    await fleet.until(lambda: len(fleet.dispatcher.ledger) == 0)


async def test_a_process_frozen_and_thawed_is_suspected_replaced_and_not_heard(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP: no exit, only silence. What can go on elsewhere does; what cannot waits for the thaw, and is not lost."""
    for module in (engine_link, members):
        monkeypatch.setattr(module, "SILENCE_SECONDS_MAX", 2.0)
    await fleet.start_coordinator()
    child = await fleet.engine_process("a", 0.004)
    b = await fleet.engine("b", step_s=0.0)
    await fleet.start_dispatcher()
    await fleet.ready("a", "b")
    movable = fleet.ask([1, 2], 400, engine="a")
    bound = fleet.ask([3, 4], 400, engine="a", temperature=1.0, seed=9)
    heads = [await read_some(stream, 3) for stream in (movable, bound)]
    os.kill(child.pid, signal.SIGSTOP)
    try:
        await b.until(lambda: b.streams)  # after SILENCE_SECONDS_MAX
        tail, _ = await read(movable)
        assert heads[0] + tail == continuation_of([1, 2], 400)
        assert movable.attempts == 2
    finally:
        os.kill(child.pid, signal.SIGCONT)
    await fleet.ready("a")
    tail, finish = await read(bound)
    assert heads[1] + tail == continuation_of([3, 4], 400)
    assert (finish, bound.attempts) == ("length", 1)


async def test_engines_killed_one_after_the_other_under_load_lose_nothing(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    children = {name: await fleet.engine_process(name, 0.005) for name in ("a", "b")}
    await fleet.start_dispatcher()
    await fleet.ready("a", "b")
    streams = [fleet.ask([n, 5], 400) for n in range(12)]
    reading = [asyncio.create_task(read(stream)) for stream in streams]
    for name in ("a", "b"):
        await fleet.until(lambda name=name: fleet.dispatcher.in_flight().get(name), f"work on {name}")
        assert await children[name].end_tree(5.0)
        children[name] = await fleet.engine_process(name, 0.005)
        await fleet.ready(name)
    for n, answer in enumerate(reading):
        tokens, finish = await asyncio.wait_for(answer, 30)
        assert tokens == continuation_of([n, 5], 400)
        assert finish == "length"
    assert fleet.dispatcher.counters["continuations"] > 0
    assert fleet.dispatcher.counters["engines_gone"] == 2

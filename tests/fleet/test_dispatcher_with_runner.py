"""The front's half and the engine's half of the wire, which two people wrote, agree: real runners with a scripted model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from scripted_engine import MODEL_TOKENS, continuation_of, next_token, read, read_some

from interlock.core.targets import Mode
from interlock.engines.base import Capabilities, Progress, Work
from interlock.engines.runner import Runner, RunnerConfig
from interlock.wire.fleet_messages import Load

PROMPT = [11, 22, 33]
Fleet = Any


class ScriptedModel:
    """An `Engine` whose tokens are a function of the sequence. `pace_s` between tokens."""

    def __init__(self, pace_s: float = 0.002) -> None:
        self.pace_s = pace_s
        self.open = asyncio.Event()
        self.open.set()
        self.aborted: set[str] = set()
        self.running: set[str] = set()

    async def start(self) -> Capabilities:
        return Capabilities(
            kind="scripted",
            model="scripted",
            max_model_tokens=MODEL_TOKENS,
            pause_modes=frozenset(Mode),
            features=[],
        )

    async def generate(self, work: Work) -> AsyncIterator[Progress]:
        sequence = list(work.prompt)
        self.running.add(work.key)
        try:
            for n in range(work.sampling.max_tokens):
                await asyncio.sleep(self.pace_s)
                await self.open.wait()
                if work.key in self.aborted:
                    yield Progress([], [], "abort", 0)
                    return
                sequence.append(next_token(sequence))
                last = n + 1 == work.sampling.max_tokens
                yield Progress(sequence[-1:], [], "length" if last else "", 0)
        finally:
            self.running.discard(work.key)

    async def abort(self, key: str) -> None:
        self.aborted.add(key)

    async def pause(self, mode: Mode) -> None:
        self.open.clear()

    async def unpause(self) -> None:
        self.open.set()

    async def stop(self) -> None:
        self.open.set()

    async def died(self) -> str:
        await asyncio.Event().wait()
        return ""

    def load(self) -> Load:
        return Load(running=len(self.running))


@asynccontextmanager
async def runner(fleet: Fleet, name: str, model: ScriptedModel) -> AsyncIterator[Runner]:
    home = fleet.directory / name
    config = RunnerConfig(
        name=name, address=f"unix:{home}.sock", coordinator=fleet.address, state_dir=home, version="0"
    )
    running = Runner(fleet.host, model, config)  # type: ignore[arg-type]
    task = asyncio.create_task(running.run())
    try:
        yield running
    finally:
        running.stop("the test is over")
        async with asyncio.timeout(10):
            await task


async def test_streams_pauses_aborts_and_broken_connections_over_real_runners(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    one, two = ScriptedModel(), ScriptedModel()
    async with runner(fleet, "one", one), runner(fleet, "two", two):
        await fleet.start_dispatcher()
        await fleet.ready("one", "two")
        streams = [fleet.ask([*PROMPT, n], 300) for n in range(4)]
        heads = [await read_some(stream, 3) for stream in streams]
        assert one.running
        assert two.running
        assert (await fleet.client.pause("keep", owner="t")).ok
        for link in list(fleet.dispatcher._links.values()):
            await link._channel.close()  # a connection breaks while the fleet stands
        assert (await fleet.client.unpause(owner="t")).ok
        await fleet.ready("one", "two")
        leaving = fleet.ask([5], 3000)
        await read_some(leaving, 1)
        await leaving.abort()
        for n, (stream, head) in enumerate(zip(streams, heads, strict=True)):
            tail, finish = await read(stream)
            assert head + tail == continuation_of([*PROMPT, n], 300)
            assert (finish, stream.attempts) == ("length", 1)
        await fleet.until(lambda: not one.running and not two.running, "both models to be idle")
        await fleet.dispatcher.close()


async def test_the_stop_of_a_fleet_ends_its_runners(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    async with runner(fleet, "one", ScriptedModel()) as running:
        await fleet.start_dispatcher()
        await fleet.ready("one")
        stopping = asyncio.create_task(fleet.client.stop(owner="t", composite=True))
        async with asyncio.timeout(10):
            assert await asyncio.shield(running._end) == 0
        await fleet.client.member_gone("one", 0)
        assert (await stopping).ok
        with pytest.raises(Exception, match="stopped"):
            fleet.ask(PROMPT, 3)

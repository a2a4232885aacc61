"""Our side of `fleet.py`: coordinator, engines and front as processes of their own; this one is the client.

Answers on standard input (`harness.answer`): {"do": "pause", "busy": bool, "count": n} with the milliseconds of each;
{"do": "requests", "prompt": tokens, "in_flight": n, "seconds": s} over the dispatcher's interface, in this process as in a
front's; {"do": "http", …} the same through the front process's port; {"do": "alone", "count": n} one request at a time, by each of
these ways and as a bare question and answer with an engine process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop
from fleet_common import STEP_SECONDS, drive, post, prompts
from harness import answer

from interlock.core.errors import ChannelFault
from interlock.core.sampling import Sampling
from interlock.fleet.client import FleetClient
from interlock.fleet.dispatcher import Dispatcher
from interlock.fleet.generation import Generation
from interlock.fleet.ledger import GenerationRequest
from interlock.host.loops import LoopThread
from interlock.host.real import RealHost
from interlock.testing.text_files import write_text_files
from interlock.wire.channel import connect_channel
from interlock.wire.engine_messages import Dispatch, FromEngine, Resume
from interlock.wire.identity import passing_identity
from interlock.wire.token_ids import pack_ids

PROGRAM = Path(__file__).with_name("fleet_engine.py")
HTTP_VOCABULARY = 250
"""The test tokenizer's smallest."""
READY_SECONDS = 60.0
QUESTION_SECONDS = 250.0
STREAM_TOKENS = 1 << 18
ONE = Sampling(max_tokens=1)


class Fleet:
    """`engines` of them; `step_s` as in `fleet_engine`."""

    def __init__(self, home: Path, engines: int, step_s: float) -> None:
        self._home, self._engines, self._step_s = home, engines, step_s
        self.host = RealHost()
        self.address = f"unix:{home}/coordinator.sock"
        self.children: dict[str, subprocess.Popen[str]] = {}
        kept = home / "client"  # as a front's: requests outlive it
        self.host.files.make_private_dir(kept)
        self.dispatcher = Dispatcher(
            self.host, passing_identity(self.host, "front"), self.address, keep_in=kept
        )
        self.client = FleetClient(self.host, self.address)
        self._asked = 0

    async def start(self) -> None:
        self._spawn("coordinator", "coordinator")
        for number in range(self._engines):
            self._spawn(f"engine-{number}", "engine", f"engine-{number}", str(self._step_s))
        await self.dispatcher.start()
        async with asyncio.timeout(READY_SECONDS):
            while not self._all_up():  # noqa: ASYNC110 - asked once, from outside
                await asyncio.sleep(0.02)

    def _all_up(self) -> bool:
        view = self.dispatcher.membership
        links = list(self.dispatcher._links.values())
        running = [m for m in view.members if m.state == "RUNNING"] if view is not None else []
        return (
            len(running) == self._engines and len(links) == self._engines and all(link.up for link in links)
        )

    def _spawn(self, child: str, kind: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(PROGRAM), kind, str(self._home), self.address, *more]
        self.children[child] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROGRAM.parent
        )
        return self.children[child]

    def pids(self) -> dict[str, int]:
        return {"client": os.getpid(), **{name: child.pid for name, child in self.children.items()}}

    async def running(self, count: int) -> bool:
        try:
            members = (await self.client.status()).members
        except (OSError, ChannelFault):  # the coordinator is starting
            return False
        return sum(member.state == "RUNNING" for member in members) == count

    async def serve_http(self) -> int:
        """The port of a front in a process of its own."""
        model = self._home / "model"
        model.mkdir()
        child = self._spawn("front", "front", str(write_text_files(model)))
        assert child.stdout is not None
        port = int(await asyncio.to_thread(child.stdout.readline))
        async with asyncio.timeout(READY_SECONDS):
            while True:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /health HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n")
                found = await reader.read()
                writer.close()
                if b" 200 " in found.split(b"\r\n")[0]:
                    return port
                await asyncio.sleep(0.02)

    def submit(self, prompt: list[int], sampling: Sampling = ONE, engine: str | None = None) -> Generation:
        self._asked += 1
        return self.dispatcher.submit(
            GenerationRequest(id=f"r{self._asked}", prompt=prompt, sampling=sampling, engine=engine)
        )

    async def ask(self, prompt: list[int]) -> None:
        async for _ in self.submit(prompt):
            pass

    async def close(self) -> None:
        await self.dispatcher.close()
        for child in self.children.values():
            assert child.stdin is not None
            child.stdin.close()
        for child in self.children.values():
            try:
                await asyncio.to_thread(child.wait, 10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


class Ours:
    """Fleets are started when they are first asked for."""

    def __init__(self, home: Path, engines: int) -> None:
        self._home, self._engines = home, engines
        self._fleets: dict[str, Fleet] = {}
        self._port: int | None = None
        self._connections: list[Any] = []

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        match question:
            case {"do": "pause", "busy": busy, "count": count}:
                return {"ms": await self._pause(await self._fleet("stepping", STEP_SECONDS), busy, count)}
            case {"do": "ranks", "ranks": ranks, "count": count}:
                return {"ms": await self._ranks(ranks, count)}
            case {"do": "requests", "prompt": tokens, "in_flight": in_flight, "seconds": seconds}:
                fleet = await self._fleet("instant", 0.0)
                return await drive(fleet.ask, prompts(tokens), in_flight, seconds, fleet.pids())
            case {"do": "http", "prompt": tokens, "in_flight": in_flight, "seconds": seconds}:
                return await self._http(tokens, in_flight, seconds)
            case {"do": "alone", "count": count, "prompt": tokens}:
                return await self._alone(tokens, count)
        raise ValueError(f"{question} is no question")

    async def _fleet(self, name: str, step_s: float) -> Fleet:
        if name not in self._fleets:
            home = self._home / name
            home.mkdir(mode=0o700)
            fleet = self._fleets[name] = Fleet(home, self._engines, step_s)
            await fleet.start()
        return self._fleets[name]

    async def _pause(self, fleet: Fleet, busy: bool, count: int) -> list[float]:
        """From the call to its return, which is when the coordinator has said that every member stands."""
        readers = []
        if busy:
            for number in range(self._engines):
                long = fleet.submit([1] * 16, Sampling(max_tokens=STREAM_TOKENS), f"engine-{number}")
                await anext(long)
                readers.append((asyncio.create_task(drain(long)), long))
        times = await pauses(fleet.client, count)
        for reader, long in readers:
            await long.abort()
            await reader
        return times

    async def _ranks(self, ranks: int, count: int) -> list[float]:
        home = self._home / "ranks"
        home.mkdir(mode=0o700)
        fleet = Fleet(home, 0, 0.0)
        fleet._spawn("coordinator", "coordinator")
        fleet._spawn("members", "members", str(ranks))
        try:
            async with asyncio.timeout(READY_SECONDS):
                while not await fleet.running(ranks):  # noqa: ASYNC110 - asked from outside
                    await asyncio.sleep(0.1)
            return await pauses(fleet.client, count)
        finally:
            await fleet.close()

    async def _http(self, tokens: int, in_flight: int, seconds: float) -> dict[str, Any]:
        fleet = await self._fleet("instant", 0.0)
        port = self._port = self._port or await fleet.serve_http()
        bodies = [completion(prompt) for prompt in prompts(tokens, HTTP_VOCABULARY)]

        async def ask(prompt: list[int]) -> None:
            await post(port, bodies[prompt[0]], self._connections)

        numbers = [[number] for number in range(len(bodies))]
        return await drive(ask, numbers, in_flight, seconds, fleet.pids())

    async def _alone(self, tokens: int, count: int) -> dict[str, list[float]]:
        """One request at a time, by turns: through the front's port, through a dispatcher, and as words on a channel to an engine
        process, whose first frame is the answer. The engine takes no time, so the last is what the others add to."""
        fleet = await self._fleet("instant", 0.0)
        port = self._port = self._port or await fleet.serve_http()
        body, prompt = completion(prompts(tokens, HTTP_VOCABULARY)[0]), prompts(tokens)[0]
        connections: list[Any] = []
        async with bare_engine(fleet, prompt) as bare:
            ways = {
                "http_ms": lambda: post(port, body, connections),
                "dispatched_ms": lambda: fleet.ask(prompt),
                "bare_ms": bare,
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(count):
                for name, ask in ways.items():
                    times[name] += await timed(ask, 1)
        connections[0][1].close()
        return times

    async def close(self) -> None:
        for _, writer in self._connections:
            writer.close()
        for fleet in self._fleets.values():
            await fleet.close()


@contextlib.asynccontextmanager
async def bare_engine(fleet: Fleet, prompt: list[int]) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Asks an engine process without a dispatcher: a dispatch on a channel, and its first frame back."""
    me = passing_identity(fleet.host, "probe")
    view = fleet.dispatcher.membership
    assert view is not None
    channel = await connect_channel(
        fleet.host, view.members[0].facts.address, me=me, role="front", accept=FromEngine, deadline_s=5.0
    )
    messages = channel.messages()
    await channel.send(Resume([]))
    packed, numbers = pack_ids(prompt), itertools.count(1)

    async def ask() -> None:
        await channel.send(Dispatch(f"p{next(numbers)}", 1, view.epoch, packed, ONE, "0::0"))
        await anext(messages)
        await channel.send(Resume([]))  # the engine forgets it

    try:
        yield ask
    finally:
        await channel.close()


def completion(prompt: list[int]) -> bytes:
    return json.dumps({"model": "m", "prompt": prompt, "max_tokens": 1}).encode()


async def pauses(client: FleetClient, count: int) -> list[float]:
    times = []
    for _ in range(count):
        await asyncio.sleep(random.uniform(0.02, 0.04))  # anywhere in a step
        begun = time.perf_counter()
        await client.pause(owner="bench")
        times.append(1e3 * (time.perf_counter() - begun))
        await client.unpause(owner="bench")
    return times


async def drain(generation: Generation) -> None:
    async for _ in generation:
        pass


async def timed(ask: Any, count: int) -> list[float]:
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        await ask()
        times.append(1e3 * (time.perf_counter() - begun))
    return times


def main(engines: int) -> None:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    with tempfile.TemporaryDirectory(prefix="fleet") as home:
        loop = LoopThread("fleet")  # between two questions heartbeats go on
        ours = Ours(Path(home), engines)
        try:
            answer(lambda: lambda question: loop.call(ours.answer(question), QUESTION_SECONDS))
        finally:
            loop.call(ours.close(), QUESTION_SECONDS)
            loop.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))

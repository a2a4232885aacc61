"""A runner in this process over real sockets, with an engine that steps by hand, a coordinator and a front that are lists."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from hand_engine import HandEngine

from interlock.core.identity import Epoch
from interlock.core.sampling import Sampling
from interlock.engines.runner import Runner, RunnerConfig
from interlock.host.real import RealHost
from interlock.wire.channel import Channel, connect_channel, serve_channels
from interlock.wire.engine_messages import (
    Abort,
    Acknowledge,
    Cursor,
    Delta,
    Dispatch,
    FromEngine,
    Refused,
    Resume,
    Tokens,
)
from interlock.wire.fleet_messages import MemberReport, Target, ToCoordinator
from interlock.wire.identity import Identity
from interlock.wire.token_ids import pack_ids

WAIT_SECONDS = 10.0


class FakeCoordinator:
    """Hears reports and says targets, as told by the test."""

    def __init__(self) -> None:
        self.reports: list[MemberReport] = []
        self.heard = asyncio.Condition()
        self.channels: list[Channel] = []
        self.told: Target | None = None

    async def serve(self, channel: Channel) -> None:
        self.channels.append(channel)
        if self.told is not None:
            await channel.send(self.told)
        async for received in channel.messages():
            async with self.heard:
                self.reports.append(received.body)
                self.heard.notify_all()

    async def tell(self, number: int, state: str, mode: str = "keep", version: str = "0") -> None:
        self.told = Target(Epoch(1, number), state, mode, version)
        for channel in self.channels:
            if channel.closed is None:
                await channel.send(self.told)

    async def until_standing(self, number: int) -> MemberReport:
        return await self.until(lambda report: report.standing == Epoch(1, number))

    async def until(self, wanted: Any) -> MemberReport:
        async with asyncio.timeout(WAIT_SECONDS), self.heard:
            await self.heard.wait_for(lambda: bool(self.reports) and wanted(self.reports[-1]))
            return self.reports[-1]


class FakeFront:
    """One connection of a front, and all it has heard on it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.frames: list[Tokens] = []
        self.refusals: list[Refused] = []
        self.heard = asyncio.Condition()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for received in self.channel.messages():
            async with self.heard:
                kept: list[Any] = self.frames if isinstance(received.body, Tokens) else self.refusals
                kept.append(received.body)
                self.heard.notify_all()

    async def close(self) -> None:
        await self.channel.close()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def dispatch(
        self, request: str, prompt: list[int], count: int, *, attempt: int = 1, epoch: int = 1
    ) -> None:
        sampling = Sampling(max_tokens=count)
        await self.channel.send(
            Dispatch(request, attempt, Epoch(1, epoch), pack_ids(prompt), sampling, "salt")
        )

    async def abort(self, request: str, attempt: int = 1) -> None:
        await self.channel.send(Abort(request, attempt))

    async def acknowledge(self, request: str, attempt: int = 1) -> None:
        await self.channel.send(Acknowledge(request, attempt))

    def deltas(self, request: str) -> list[Delta]:
        return [delta for frame in self.frames for delta in frame.deltas if delta.request == request]

    def tokens(self, request: str) -> list[int]:
        """What was heard of it on this connection, checked to have no gap and no repeat."""
        deltas = self.deltas(request)
        tokens: list[int] = []
        for delta in deltas:
            assert delta.start == deltas[0].start + len(tokens)
            tokens += delta.tokens
        return tokens

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(WAIT_SECONDS), self.heard:
            await self.heard.wait_for(condition)

    async def until_count(self, request: str, count: int) -> list[int]:
        await self.until(lambda: len(self.tokens(request)) >= count)
        return self.tokens(request)

    async def until_finish(self, request: str) -> Delta:
        await self.until(lambda: any(delta.finish for delta in self.deltas(request)))
        return self.deltas(request)[-1]


class Rig:
    """One runner, its engine and its coordinator."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.host = directory, RealHost()
        self.engine = HandEngine()
        self.coordinator = FakeCoordinator()
        self.address = f"unix:{directory}/engine.sock"
        self.stack = contextlib.AsyncExitStack()
        self.runner: Runner
        self.life: asyncio.Task[int]

    async def start(self) -> None:
        listener = await serve_channels(
            self.host,
            self.coordinator_address,
            me=Identity("coordinator", 1),
            accept=ToCoordinator,
            on_channel=self.coordinator.serve,
        )
        self.stack.push_async_callback(listener.close)
        config = RunnerConfig(
            name="engine-0",
            address=self.address,
            coordinator=self.coordinator_address,
            state_dir=self.directory / "state",
            version="0",
        )
        self.runner = Runner(self.host, self.engine, config)
        self.life = asyncio.create_task(self.runner.run())
        self.stack.push_async_callback(self._end)

    @property
    def coordinator_address(self) -> str:
        return f"unix:{self.directory}/coordinator.sock"

    async def _end(self) -> None:
        self.runner.stop("the test is over")
        async with asyncio.timeout(WAIT_SECONDS):
            await asyncio.gather(self.life, return_exceptions=True)

    async def running(self) -> None:
        """The engine RUNNING at epoch 1.1."""
        await self.coordinator.tell(1, "RUNNING")
        await self.coordinator.until_standing(1)

    async def front(
        self, name: str = "front", incarnation: int = 1, wanted: list[Cursor] | None = None
    ) -> FakeFront:
        channel = await connect_channel(
            self.host,
            self.address,
            me=Identity(name, incarnation),
            role="front",
            accept=FromEngine,
            deadline_s=WAIT_SECONDS,
        )
        front = FakeFront(channel)
        self.stack.push_async_callback(front.close)
        await channel.send(Resume(wanted or []))
        return front

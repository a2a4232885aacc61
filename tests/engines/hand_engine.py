"""An `Engine` whose tokens are a function of the prompt and whose steps are taken by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from interlock.core.targets import Mode
from interlock.engines.base import Capabilities, EngineGone, Progress, RequestRejected, Work
from interlock.wire.fleet_messages import Load


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    return [(sum(prompt) * 31 + n * 7) % 1000 for n in range(count)]


class HandEngine:
    """`step()` makes one token for every request that runs; a paused engine makes none."""

    def __init__(self) -> None:
        self.works: dict[str, Work] = {}
        self.aborted: list[str] = []
        self.left: list[str] = []
        self.pauses: list[Mode] = []
        self.paused: Mode | None = None
        self.stopped = False
        self.steps = 0
        self.changed = asyncio.Condition()
        self.finish_pause = asyncio.Event()
        self.finish_pause.set()
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.start_gate = asyncio.Event()
        self.start_gate.set()

    async def start(self) -> Capabilities:
        await self.start_gate.wait()
        return Capabilities(
            kind="hand", model="m", max_model_tokens=4096, pause_modes=frozenset(Mode), features=[]
        )

    async def step(self, count: int = 1) -> None:
        for _ in range(count):
            async with self.changed:
                self.steps += 1
                self.changed.notify_all()
            for _ in range(10):  # whoever was woken runs
                await asyncio.sleep(0)

    async def until_works(self, count: int) -> None:
        async with asyncio.timeout(10.0), self.changed:
            await self.changed.wait_for(lambda: len(self.works) >= count)

    async def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        if -1 in work.prompt:
            raise RequestRejected("token -1 is out of the vocabulary")
        made = 0
        tokens = expected_tokens(work.prompt, work.sampling.max_tokens)
        async with self.changed:
            self.works[work.key] = work
            seen = self.steps
            self.changed.notify_all()
        try:
            while made < len(tokens):
                async with self.changed:
                    await self.changed.wait_for(lambda seen=seen: self._may_go_on(work.key, seen))
                    seen = self.steps
                if self.stopped:
                    raise EngineGone("the engine was stopped")
                if work.key in self.aborted:
                    yield Progress([], [], "abort", 0)
                    return
                made += 1
                yield Progress([tokens[made - 1]], [], "length" if made == len(tokens) else "", 2)
        finally:
            self.left.append(work.key)

    def _may_go_on(self, key: str, seen: int) -> bool:
        return self.stopped or key in self.aborted or (self.steps > seen and self.paused is None)

    async def abort(self, key: str) -> None:
        if self.death.done():
            raise EngineGone("it is dead")
        async with self.changed:
            self.aborted.append(key)
            self.changed.notify_all()

    async def pause(self, mode: Mode) -> None:
        self.pauses.append(mode)
        await self.finish_pause.wait()
        async with self.changed:
            self.paused = mode
            if mode is Mode.ABORT:
                self.aborted += [key for key in self.works if key not in self.left]
            self.changed.notify_all()

    async def unpause(self) -> None:
        async with self.changed:
            self.paused = None
            self.changed.notify_all()

    async def stop(self) -> None:
        """Its requests end at once, itself takes a moment longer."""
        async with self.changed:
            self.stopped = True
            self.changed.notify_all()
        for _ in range(20):
            await asyncio.sleep(0)

    async def died(self) -> str:
        return await asyncio.shield(self.death)

    def load(self) -> Load:
        return Load(running=len(self.works) - len(self.left))

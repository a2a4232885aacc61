"""A scripted engine for the real runner: each token is a function of all before it, so a loss, a repeat or a mix shows.

It steps as vLLM does: one loop, all running requests at once, one token each. A pause stands only when no step is under way.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence

from interlock.core.targets import Mode
from interlock.engines.base import Capabilities, Engine, Progress, RequestRejected, Work
from interlock.testing.sim.host import SimHost
from interlock.wire.fleet_messages import Load

MODEL_TOKENS = 512
MODEL = "simulated"


def next_token(sequence: Sequence[int]) -> int:
    digest = hashlib.blake2b(array("I", sequence).tobytes(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 50_000


def answer_to(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that any number of engines, however disturbed, must deliver."""
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(next_token(sequence))
    return sequence[len(prompt) :]


class _Running:
    """One request in the engine."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.made: list[int] = []
        self.ready: list[int] = []
        self.finish = ""
        self.filled = asyncio.Event()

    def advance(self) -> None:
        token = next_token([*self.work.prompt, *self.made])
        self.made.append(token)
        self.ready.append(token)
        if len(self.made) >= self.work.sampling.max_tokens:
            self.finish = "length"
        self.filled.set()

    def end(self, finish: str) -> None:
        self.finish = self.finish or finish
        self.filled.set()


class SimEngine(Engine):
    """`Engine` of `engines/base.py`. `on_step(stage)` is told when a step begins and ends."""

    def __init__(self, host: SimHost, step_s: float, on_step: Callable[[str], None]) -> None:
        self._host, self._step_s, self._on_step = host, step_s, on_step
        self._mode: Mode | None = None
        self._running: dict[str, _Running] = {}
        self._waiting: dict[str, _Running] = {}
        self._changed = asyncio.Event()
        self._stepped = asyncio.Event()
        self._stepping = False
        self._loop: asyncio.Task[None] | None = None
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> Capabilities:
        await self._host.clock.sleep_s(self._host.process.kernel.rng.uniform(0.05, 0.5))
        self._loop = asyncio.create_task(self._run(), name="engine loop")
        return Capabilities(
            kind="simulated",
            model=MODEL,
            max_model_tokens=MODEL_TOKENS,
            pause_modes=frozenset(Mode),
            features=[],
        )

    async def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        if len(work.prompt) + work.sampling.max_tokens > MODEL_TOKENS:
            raise RequestRejected(f"{MODEL_TOKENS} tokens are all that this model takes")
        item = self._waiting[work.key] = _Running(work)
        self._changed.set()
        try:
            while True:
                await item.filled.wait()
                item.filled.clear()
                tokens, item.ready = item.ready, []
                yield Progress(tokens, [], item.finish, 0)
                if item.finish:
                    return
        finally:
            self._waiting.pop(work.key, None)
            self._running.pop(work.key, None)
            self._changed.set()

    async def abort(self, key: str) -> None:
        item = self._running.pop(key, None) or self._waiting.pop(key, None)
        if item is not None:
            item.end("abort")
        self._changed.set()

    async def pause(self, mode: Mode) -> None:
        self._mode = mode
        self._changed.set()
        if mode is Mode.ABORT:
            for item in [*self._running.values(), *self._waiting.values()]:
                item.end("abort")
            self._running.clear()
            self._waiting.clear()
        while self._stepping or (mode is Mode.WAIT and self._running):
            self._stepped.clear()
            await self._stepped.wait()

    async def unpause(self) -> None:
        self._mode = None
        self._changed.set()

    async def stop(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)

    async def died(self) -> str:
        return await self._death

    def break_down(self) -> None:
        """A worker of this engine dies; the process that speaks for it lives."""
        if not self._death.done():
            self._death.set_result("a simulated worker was killed")

    def load(self) -> Load:
        return Load(len(self._running), len(self._waiting))

    async def _run(self) -> None:
        while True:
            if self._mode is None:
                self._running.update(self._waiting)
                self._waiting.clear()
            if not self._running or self._mode in (Mode.KEEP, Mode.ABORT):
                self._stepped.set()
                self._changed.clear()
                await self._changed.wait()
                continue
            await self._step()

    async def _step(self) -> None:
        self._stepping = True
        self._on_step("begins")
        batch = list(self._running.items())
        await self._host.clock.sleep_s(self._step_s * self._host.process.kernel.rng.uniform(0.5, 2.0))
        for key, item in batch:
            if self._running.get(key) is item:
                item.advance()
                if item.finish:
                    del self._running[key]
        self._on_step("ends")
        self._stepping = False
        self._stepped.set()

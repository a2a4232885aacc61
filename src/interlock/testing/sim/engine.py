"""A scripted engine for the real runner: tokens as `tokens` has them, a prefix cache, weights that can be changed, memory that can be given up.

It steps as vLLM does: one loop, all running requests at once, one token each. A pause stands only when no step is under way.
It believes whoever calls it: that a step has whole weights and memory, and that weights change only while it stands, is looked at
from outside (`Watcher`), not refused.

Its prefix cache is the worst that the contract allows: blocks are named by the request's salt and tokens alone, and survive every
update, so that only salts keep versions apart. Requests that live through an update neither read nor save blocks any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Protocol

from interlock.core.targets import KeptCache, Mode
from interlock.engines.base import (
    Capabilities,
    Engine,
    EngineStartError,
    Progress,
    RequestRejected,
    Unable,
    UpdateFailed,
    Work,
)
from interlock.testing.sim.host import SimHost
from interlock.testing.sim.tokens import FIRST, next_token
from interlock.wire.fleet_messages import Load

MODEL_TOKENS = 512
MODEL = "simulated"
BLOCK_TOKENS = 4
UPDATE_SECONDS_MAX = 1.0
SUSPEND_SECONDS_MAX = 0.3


class Watcher(Protocol):
    """Who knows what must hold."""

    def stepped(self, stage: str, weights: str | None) -> None:
        """A step "begins" or "ends", with these weights; None: they are not whole, or not in memory."""
        ...

    def loaded(self, weights: str) -> None: ...

    def wrong(self, words: str) -> None: ...

    def trouble(self, what: str) -> bool:
        """Whether this call ("update", "suspend", "resume") shall fail."""
        ...


class _Running:
    """One request in the engine."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.made: list[int] = []
        self.ready: list[int] = []
        self.finish = ""
        self.filled = asyncio.Event()
        self.kv: list[str] | None = None
        """Which weights computed each full block of its KV; None: there is none of it yet."""
        self.cached_tokens = 0
        self.caches = True
        """Whether it reads and saves blocks: not after it has lived through an update."""

    @property
    def sequence(self) -> list[int]:
        return [*self.work.prompt, *self.made]

    def end(self, finish: str) -> None:
        self.finish = self.finish or finish
        self.filled.set()


class SimEngine(Engine):
    """`Engine` of `engines/base.py`."""

    def __init__(self, host: SimHost, step_s: float, watcher: Watcher, *, able: bool = False) -> None:
        """`able`: it can change its weights and be suspended."""
        self._host, self._step_s, self._watcher, self._able = host, step_s, watcher, able
        self._mode: Mode | None = None
        self._running: dict[str, _Running] = {}
        self._waiting: dict[str, _Running] = {}
        self._cache: dict[tuple[str, tuple[int, ...]], str] = {}
        self._content = FIRST
        """What was loaded last, or is taken again at a resume."""
        self._whole = self.memory = True
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
            updates=self._able,
            suspends=self._able,
        )

    @property
    def weights(self) -> str | None:
        """What a step would compute with now."""
        return self._content if self._whole and self.memory else None

    # --- requests --------------------------------------------------------------------------------------------------

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
                yield Progress(tokens, [], item.finish, item.cached_tokens)
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

    # --- the walk --------------------------------------------------------------------------------------------------

    async def pause(self, mode: Mode) -> None:
        self._mode = mode
        self._changed.set()
        if mode is Mode.ABORT:
            for item in self._requests():
                item.end("abort")
            self._running.clear()
            self._waiting.clear()
        while self._stepping or (mode is Mode.WAIT and self._running):
            self._stepped.clear()
            await self._stepped.wait()

    async def unpause(self) -> None:
        self._mode = None
        self._changed.set()

    async def update_weights(self, path: Path, version: str, kv: KeptCache = KeptCache.RECOMPUTE) -> None:
        del version  # the content is what the directory holds, whatever it is called
        self._must_stand("its weights change")
        if not self.memory:
            self._watcher.wrong("its weights change while it has no memory for them")
        self._whole = False
        await self._takes(UPDATE_SECONDS_MAX)
        if self._watcher.trouble("update"):
            raise UpdateFailed(f"{path} is torn")
        for item in self._requests():
            item.caches = False
            if kv is KeptCache.RECOMPUTE:
                item.kv = None
        self._content, self._whole = path.name, True
        self._watcher.loaded(path.name)
        self._must_stand("its weights have changed")

    async def suspend(self) -> None:
        self._must_stand("it is suspended")
        if self._watcher.trouble("suspend"):
            raise Unable("its memory cannot be given up just now")
        self.memory = False
        self._cache.clear()
        for item in self._requests():
            item.kv = None
        await self._takes(SUSPEND_SECONDS_MAX)

    async def resume(self) -> None:
        await self._takes(UPDATE_SECONDS_MAX)
        if self._watcher.trouble("resume"):
            raise EngineStartError("no memory is free just now")
        self.memory = True

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

    def _requests(self) -> list[_Running]:
        return [*self._running.values(), *self._waiting.values()]

    def _must_stand(self, why: str) -> None:
        if self._stepping or self._mode is None:
            self._watcher.wrong(f"{why} while it does not stand")

    async def _takes(self, seconds_max: float) -> None:
        await self._host.clock.sleep_s(self._host.process.kernel.rng.uniform(0.01, seconds_max))

    # --- steps -----------------------------------------------------------------------------------------------------

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
        self._watcher.stepped("begins", self.weights)
        batch = list(self._running.items())
        await self._host.clock.sleep_s(self._step_s * self._host.process.kernel.rng.uniform(0.5, 2.0))
        for key, item in batch:
            if self._running.get(key) is item:
                self._advance(item)
                if item.finish:
                    del self._running[key]
        self._watcher.stepped("ends", self.weights)
        self._stepping = False
        self._stepped.set()

    def _advance(self, item: _Running) -> None:
        sequence, weights = item.sequence, self.weights or "none"
        if item.kv is None:
            item.kv = self._found(item, sequence)
        known = len(item.kv)
        item.kv += [weights] * (len(sequence) // BLOCK_TOKENS - known)
        if item.caches:
            for n in range(known, len(item.kv)):
                self._cache.setdefault(_name(item, sequence, n + 1), weights)
        token = next_token(weights, sequence, mixed=any(block != weights for block in item.kv))
        item.made.append(token)
        item.ready.append(token)
        if len(item.made) >= item.work.sampling.max_tokens:
            item.finish = "length"
        item.filled.set()

    def _found(self, item: _Running, sequence: list[int]) -> list[str]:
        """The longest run of cached blocks, of which at least one token is left to compute."""
        found: list[str] = []
        while item.caches and (len(found) + 1) * BLOCK_TOKENS < len(sequence):
            block = self._cache.get(_name(item, sequence, len(found) + 1))
            if block is None:
                break
            found.append(block)
        if not item.made:
            item.cached_tokens = len(found) * BLOCK_TOKENS
        return found


def _name(item: _Running, sequence: list[int], blocks: int) -> tuple[str, tuple[int, ...]]:
    return item.work.cache_salt, tuple(sequence[: blocks * BLOCK_TOKENS])

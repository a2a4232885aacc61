"""A whole `Engine` in one file, for the conformance suite: right by construction, and easy to break in one place.

Each token is a function of the weights' number and of all tokens before it. It steps in a task of its own, computes
prompts in chunks, keeps "KV" by prefix, and does everything that an engine can.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from array import array
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec

from interlock.core.targets import Mode, stricter
from interlock.engines.base import (
    TAKEN,
    Capabilities,
    Engine,
    EngineGone,
    KeptCache,
    NotStanding,
    Progress,
    RequestRejected,
    RequestState,
    UpdateFailed,
    Work,
)
from interlock.wire.engine_messages import TokenLogprobs
from interlock.wire.fleet_messages import Load

VOCABULARY, MODEL_TOKENS, CHUNK, BLOCK = 500, 900, 32, 16
STEP_SECONDS = 0.0002


class Running:
    """One request. What was made and not yet yielded stands in `ready`."""

    def __init__(self, work: Work, made: list[int]) -> None:
        self.work, self.made = work, list(made)
        self.random = random.Random(work.sampling.seed)
        self.computed = 0
        self.cached = 0
        self.ready: list[Progress] = []
        self.finish = ""
        self.filled = asyncio.Event()

    @property
    def tokens(self) -> list[int]:
        return [*self.work.prompt, *self.made]

    def put(self, progress: Progress) -> None:
        self.finish = self.finish or progress.finish
        self.ready.append(progress)
        self.filled.set()


class PocketEngine(Engine):
    def __init__(self, weights: Path) -> None:
        self.weights = weights
        self.number = 0
        self.requests: dict[str, Running] = {}
        self.cache: set[bytes] = set()
        self.mode: Mode | None = None
        self.stands = False
        self.last: list[Running] = []
        """Requests that a pause which waits lets end."""
        self.suspended = False
        self.broken = False
        self.dead = ""
        self.death = asyncio.Event()
        self.turned = asyncio.Event()
        self.stepping = asyncio.Lock()
        self.loop: asyncio.Task[None] | None = None

    async def start(self) -> Capabilities:
        self.number = int((self.weights / "weights").read_text())
        self.loop = asyncio.create_task(self.run())
        return Capabilities(
            kind="pocket",
            model=f"pocket {self.number}",
            max_model_tokens=MODEL_TOKENS,
            pause_modes=frozenset(Mode),
            features=["logprobs", "seed"],
            updates=True,
            suspends=True,
            moves_requests=True,
        )

    # --- requests ------------------------------------------------------------------------------------------------

    def check(self, work: Work) -> None:
        asked = work.sampling
        if asked.max_tokens < 1 or not 0 < asked.top_p <= 1 or asked.temperature < 0:
            raise RequestRejected("a sampling parameter is impossible")
        if not 0 < len(work.prompt) < MODEL_TOKENS or not all(0 <= t < VOCABULARY for t in work.prompt):
            raise RequestRejected("the prompt is impossible")

    async def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        self.check(work)
        async for progress in self.follow(Running(work, [])):
            yield progress

    async def put(self, state: RequestState) -> AsyncGenerator[Progress, None]:
        if state.kind != "pocket":
            raise RequestRejected("a state of another kind")
        request = Running(state.work, state.tokens)
        version, internal, gauss = msgspec.msgpack.decode(state.payload)
        request.random.setstate((version, tuple(internal), gauss))
        async for progress in self.follow(request):
            yield progress

    async def follow(self, request: Running) -> AsyncGenerator[Progress, None]:
        self.requests[request.work.key] = request
        self.turned.set()
        try:
            while True:
                while request.ready:
                    progress = request.ready.pop(0)
                    yield progress
                    if progress.finish:
                        return
                if self.dead:
                    raise EngineGone(self.dead)
                request.filled.clear()
                await request.filled.wait()
        finally:
            self.requests.pop(request.work.key, None)

    async def abort(self, key: str) -> None:
        request = self.requests.get(key)
        if request is not None and not request.finish:
            request.put(Progress([], [], "abort", request.cached))

    async def take(self, key: str) -> RequestState:
        if not self.stands or self.suspended:
            raise NotStanding("pause it first")
        request = self.requests[key]
        payload = msgspec.msgpack.encode(request.random.getstate())
        state = RequestState(
            kind="pocket",
            model=f"pocket {self.number}",
            work=request.work,
            tokens=list(request.made),
            payload=payload,
        )
        request.put(Progress([], [], "abort", request.cached, TAKEN))
        return state

    # --- steps ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        while True:
            await self.turned.wait()
            self.turned.clear()
            while self.runs():
                async with self.stepping:
                    for request in list(self.requests.values()):
                        if not request.finish and not (self.mode is Mode.WAIT and request not in self.last):
                            self.step(request)
                await asyncio.sleep(STEP_SECONDS)
                self.turned.set()

    def runs(self) -> bool:
        frozen = self.mode is not None and (self.stands or self.mode is not Mode.WAIT)
        return not frozen and not self.suspended and any(not r.finish for r in self.requests.values())

    def key(self, request: Running, tokens: int) -> bytes:
        words = f"{self.number}/{request.work.cache_salt}/".encode()
        return hashlib.blake2b(words + array("I", request.tokens[:tokens]).tobytes()).digest()

    def step(self, request: Running) -> None:
        prompt = len(request.work.prompt)
        if request.computed == 0:
            while request.cached + BLOCK < prompt and self.key(request, request.cached + BLOCK) in self.cache:
                request.cached += BLOCK
            request.computed = request.cached
        if request.computed < prompt:
            request.computed = min(prompt, request.computed + CHUNK)
            for stop in range(BLOCK, request.computed + 1, BLOCK):
                self.cache.add(self.key(request, stop))
        if request.computed >= prompt:
            self.decode(request)

    def decode(self, request: Running) -> None:
        asked = request.work.sampling
        best = [self.choose(request, n) for n in range(max(2, (asked.logprobs or 0)))]
        rank = 0
        if asked.temperature > 0:
            rank = int(request.random.random() * len(best))
        token = best[rank]
        request.made.append(token)
        logprobs = []
        if asked.logprobs is not None:
            top = [(t, -1.0 - n) for n, t in enumerate(best[: asked.logprobs])]
            logprobs = [TokenLogprobs(-1.0 - rank, rank + 1, top)]
        finish, detail = "", ""
        if token in asked.stop_token_ids:
            finish, detail = "stop", str(token)
        elif len(request.made) >= asked.max_tokens or len(request.tokens) >= MODEL_TOKENS:
            finish = "length"
        request.put(Progress([token], logprobs, finish, request.cached, detail))

    def choose(self, request: Running, rank: int) -> int:
        words = f"{self.number}/{rank}/".encode() + array("I", request.tokens).tobytes()
        return int.from_bytes(hashlib.blake2b(words, digest_size=4).digest(), "big") % VOCABULARY

    # --- the walk ------------------------------------------------------------------------------------------------

    async def pause(self, mode: Mode) -> None:
        if self.dead:
            raise EngineGone(self.dead)
        if self.stands and not stricter(mode, self.mode):
            return
        self.mode = mode if stricter(mode, self.mode) else self.mode
        if mode is Mode.ABORT:
            for key in list(self.requests):
                await self.abort(key)
        if mode is Mode.WAIT and not self.suspended:
            self.last = [r for r in self.requests.values() if r.computed]
            while any(not r.finish for r in self.last) and self.mode is Mode.WAIT:
                await asyncio.sleep(0)
        async with self.stepping:
            self.stands = True

    async def unpause(self) -> None:
        if self.suspended:
            raise NotStanding("it is suspended")
        if self.broken:
            raise UpdateFailed("it has no weights")
        self.mode, self.stands = None, False
        self.turned.set()

    async def update_weights(self, path: Path, version: str, kv: KeptCache = KeptCache.RECOMPUTE) -> None:
        if not self.stands or self.suspended:
            raise NotStanding("pause it first")
        self.broken = True
        try:
            self.number = int((path / "weights").read_text())
        except OSError as error:
            raise UpdateFailed(str(error)) from error
        self.broken = False

    async def suspend(self) -> None:
        if not self.stands:
            raise NotStanding("pause it first")
        self.suspended = True
        self.cache.clear()

    async def resume(self) -> None:
        self.suspended = False

    async def stop(self) -> None:
        self.end("it was stopped")

    def end(self, why: str) -> None:
        self.dead = self.dead or why
        if self.loop is not None:
            self.loop.cancel()
        for request in self.requests.values():
            request.filled.set()

    def crash(self) -> None:
        self.end("it crashed")
        self.death.set()

    async def died(self) -> str:
        await self.death.wait()
        return self.dead

    def load(self) -> Load:
        count = len([r for r in self.requests.values() if not r.finish])
        return Load(waiting=count) if self.mode is not None else Load(running=count)

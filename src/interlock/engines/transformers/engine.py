"""Transformers as an engine: the runner's `Engine` over the library's models, computed by a thread of this process.

The asyncio half: it checks what is asked, hands it to the engine's thread (`loop`) and streams what that delivers. With
tensor parallelism it also starts the other ranks' processes and watches them: when one is gone, the engine is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from interlock.core.targets import KeptCache, Mode
from interlock.engines.base import (
    TAKEN,
    Capabilities,
    Engine,
    EngineGone,
    EngineStartError,
    Progress,
    RequestRejected,
    RequestState,
    Unable,
    Work,
)
from interlock.engines.transformers.plans import Moved, Take
from interlock.engines.transformers.setup import TransformersConfig, prepare_environment
from interlock.host.base import Host
from interlock.wire.fleet_messages import Load

KIND = "transformers"
STOP_SECONDS = 2.0
FEATURES = ["logprobs", "logit_bias", "penalties", "priority", "seed"]
T = TypeVar("T")
Told = list[tuple[str, Progress]]


class TransformersEngine(Engine):
    """`engines.base.Engine` over one model of the library."""

    def __init__(self, host: Host, config: TransformersConfig) -> None:
        self._host, self._config = host, config
        self._loop: Any = None
        self._streams: dict[str, asyncio.Queue[Progress | EngineGone]] = {}
        self._death: asyncio.Future[str] | None = None
        self._processes: Any = None
        self._stopping = False
        self._built: Any = None
        self._weights = config.model_id
        """Names the weights that a request's state was made by."""

    # --- start and end -------------------------------------------------------------------------------------------

    async def start(self) -> Capabilities:
        prepare_environment(self._config)
        asyncs = asyncio.get_running_loop()

        def deliver(told: Told) -> None:
            with contextlib.suppress(RuntimeError):  # nobody is left to hear it
                asyncs.call_soon_threadsafe(self._deliver, told)

        def die(why: str) -> None:
            with contextlib.suppress(RuntimeError):
                asyncs.call_soon_threadsafe(self._die, why)

        self._death = asyncs.create_future()
        await self._host.in_thread(_import_library)
        from interlock.engines.transformers.building import build
        from interlock.engines.transformers.rank_processes import RankProcesses

        self._processes = RankProcesses(self._host, self._config, self._die)
        pipes = await self._processes.start()
        self._loop = self._make_loop(deliver, die)
        started = asyncio.wrap_future(self._loop.begin(lambda: build(self._config, pipes)))
        ranks_gone = asyncio.ensure_future(asyncio.shield(self._death))
        try:
            await asyncio.wait({started, ranks_gone}, return_when=asyncio.FIRST_COMPLETED)
            if not started.done():
                raise EngineStartError(f"{ranks_gone.result()} while the model was loaded; its log says why")
            self._built = await started
        except EngineStartError:
            raise
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise EngineStartError(str(error) or type(error).__name__) from error
        finally:
            started.cancel()
            ranks_gone.cancel()
        return self._capabilities()

    def _make_loop(self, deliver: Callable[[Told], None], die: Callable[[str], None]) -> Any:
        from interlock.engines.transformers.loop import Loop

        return Loop(deliver, die)

    def _capabilities(self) -> Capabilities:
        built = self._built
        return Capabilities(
            kind=KIND,
            model=self._config.model_id,
            max_model_tokens=built.limits.model_tokens,
            pause_modes=frozenset(Mode),
            features=list(FEATURES),
            saves=built.hooks.scheduler is not None,
            block_tokens=self._config.block_tokens,
            updates=True,
            suspends=True,
            moves_requests=built.moves,
        )

    def _die(self, why: str) -> None:
        if self._stopping:
            return
        if self._death is not None and not self._death.done():
            self._death.set_result(why)
        for queue in self._streams.values():
            queue.put_nowait(EngineGone(why))
        if self._loop is not None:
            self._loop.end()

    async def stop(self) -> None:
        self._stopping = True
        for queue in self._streams.values():
            queue.put_nowait(EngineGone("the engine was stopped"))
        if self._loop is not None:
            self._loop.end()
            await self._host.in_thread(self._loop.join, STOP_SECONDS)
        if self._processes is not None:
            await self._processes.end(STOP_SECONDS)

    async def died(self) -> str:
        if self._death is None:
            raise EngineGone("the engine was not started")
        why = await asyncio.shield(self._death)
        if self._stopping:
            await asyncio.get_running_loop().create_future()
        return why

    # --- requests ------------------------------------------------------------------------------------------------

    async def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        self._check(work)
        async for progress in self._stream(work, lambda order: self._request(work, order)):
            yield progress

    def _check(self, work: Work) -> None:
        """Raises `RequestRejected` for what can never be computed."""
        from interlock.engines.transformers.sampling import check_sampling

        self._alive()
        longest, vocabulary = self._built.limits.model_tokens, self._built.vocabulary
        if not work.prompt:
            raise RequestRejected("the prompt is empty; at least one token is needed")
        if min(work.prompt) < 0 or max(work.prompt) >= vocabulary:
            raise RequestRejected(
                f"the prompt holds a token id outside [0, {vocabulary}), this model's vocabulary"
            )
        if len(work.prompt) >= longest:
            raise RequestRejected(
                f"the prompt has {len(work.prompt)} tokens; this model takes {longest}, answer included"
            )
        check_sampling(work.sampling, vocabulary)

    def _request(self, work: Work, order: int, output: list[int] | None = None) -> Any:
        from interlock.engines.transformers.sampling import Sampler
        from interlock.engines.transformers.scheduler import Request

        sampler = Sampler(work.sampling, work.prompt, self._built.end_tokens)
        return Request(work, sampler, order, output or [])

    async def _stream(self, work: Work, make: Callable[[int], Any]) -> AsyncGenerator[Progress, None]:
        """Adds the request in the engine's thread and yields what comes of it; leaving early ends it there."""
        key = work.key
        if key in self._streams:
            raise RequestRejected(f"a request named {key} is here already")
        queue = self._streams[key] = asyncio.Queue()
        ended = False
        try:
            await self._ask(lambda: self._loop.add(make))
            while True:
                told = await queue.get()
                if isinstance(told, EngineGone):
                    ended = True
                    raise told
                ended = bool(told.finish)
                yield told
                if ended:
                    return
        except RequestRejected:
            ended = True
            raise
        finally:
            del self._streams[key]
            if not ended and not self._stopping:
                self._loop.ask(lambda: self._loop.remove(key))

    def _deliver(self, told: Told) -> None:
        for key, progress in told:
            queue = self._streams.get(key)
            if queue is not None:
                queue.put_nowait(progress)

    async def abort(self, key: str) -> None:
        self._alive()

        def remove() -> None:
            if self._loop.remove(key):
                self._loop.tell(key, Progress([], [], "abort", 0))

        await self._ask(remove)

    async def states(self) -> list[RequestState]:
        def copied() -> list[RequestState]:
            self._loop.demand_standing("copying the requests' states")
            return [
                RequestState(
                    kind=KIND,
                    model=self._weights,
                    work=found.work,
                    tokens=list(found.output),
                    payload=msgspec.msgpack.encode(
                        Moved(0, found.cached_tokens, found.sampler.dump(), found.mixed, [])
                    ),
                )
                for found in self._loop.scheduler.requests
            ]

        return await self._ask(copied)

    async def take(self, key: str) -> RequestState:
        from interlock.engines.transformers.ranks import RankFailed

        def taken() -> RequestState:
            self._loop.demand_standing("taking a request out")
            found = next((r for r in self._loop.scheduler.requests if r.key == key), None)
            if found is None:
                raise KeyError(f"there is no request {key} here")
            computed, caches = found.parked or (0, [])
            if found.computed:
                try:
                    computed, caches = found.computed, self._loop.ranks.do_all(Take(key))
                except RankFailed as error:
                    raise Unable(f"this model's cache cannot be taken out: {error}") from error
                found.computed = 0
            moved = Moved(computed, found.cached_tokens, found.sampler.dump(), found.mixed, caches)
            state = RequestState(
                kind=KIND,
                model=self._weights,
                work=found.work,
                tokens=found.output,
                payload=msgspec.msgpack.encode(moved),
            )
            self._loop.remove(key)
            self._loop.tell(key, Progress([], [], "abort", found.cached_tokens, TAKEN))
            return state

        return await self._ask(taken)

    async def put(self, state: RequestState) -> AsyncGenerator[Progress, None]:
        async for progress in self._stream(state.work, self._put_back(state)):
            yield progress

    def _put_back(self, state: RequestState) -> Callable[[int], Any]:
        """What makes the request again. Raises `RequestRejected`."""
        self._check(state.work)
        moved = self._moved(state)

        def make(order: int) -> Any:
            request = self._request(state.work, order, state.tokens)
            request.sampler.restore(moved.generator)
            request.cached_tokens, request.mixed = moved.cached_tokens, moved.mixed
            request.parked = (moved.computed, moved.caches) if moved.caches else None
            return request

        return make

    def _moved(self, state: RequestState) -> Moved:
        """Raises `RequestRejected` for what another kind of engine, or another model, has made."""
        if state.kind != KIND or state.model != self._weights:
            raise RequestRejected(
                f"this state was made by {state.kind} with {state.model}; this is {KIND} with {self._weights}"
            )
        try:
            moved = msgspec.msgpack.decode(state.payload, type=Moved)
        except msgspec.DecodeError as error:
            raise RequestRejected(f"the state of {state.work.key} is damaged: {error}") from error
        whole = len(state.work.prompt) + len(state.tokens)
        if moved.caches and not 0 < moved.computed < whole:
            raise RequestRejected(
                f"the state of {state.work.key} claims {moved.computed} of {whole} tokens computed"
            )
        if moved.caches and len(moved.caches) != self._config.tensor_parallel:
            raise RequestRejected(
                f"this state has the caches of {len(moved.caches)} ranks; this engine has {self._config.tensor_parallel}"
            )
        return moved

    # --- the walk ------------------------------------------------------------------------------------------------

    async def pause(self, mode: Mode) -> None:
        from interlock.engines.transformers.asking import promised

        standing = promised()
        await self._ask(lambda: self._loop.pause(mode, standing))
        await asyncio.wrap_future(standing)

    async def unpause(self) -> None:
        await self._ask(self._loop.unpause)

    async def update_weights(
        self,
        path: Path,
        version: str,
        kv: KeptCache = KeptCache.RECOMPUTE,
    ) -> None:
        drop = kv is KeptCache.RECOMPUTE
        await self._ask(lambda: self._loop.update(str(path), drop_caches=drop))
        self._weights = f"{self._config.model_id} updated to {version}"

    async def suspend(self) -> None:
        await self._ask(self._loop.suspend)

    async def resume(self) -> None:
        from interlock.engines.transformers.ranks import RankFailed

        try:
            await self._ask(self._loop.resume)
        except RankFailed as error:
            raise EngineStartError(str(error)) from error

    def _alive(self) -> None:
        if self._loop is None or self._stopping:
            raise EngineGone("the engine was stopped")
        if self._death is not None and self._death.done():
            raise EngineGone(self._death.result())

    async def _ask(self, function: Callable[[], T]) -> T:
        self._alive()
        asked: Future[T] = self._loop.ask(function)
        return await asyncio.wrap_future(asked)

    # --- what it is ----------------------------------------------------------------------------------------------

    def load(self) -> Load:
        if self._loop is None:
            return Load()
        busy: Load = self._loop.busy
        if not self._loop.paused:
            return busy
        return Load(waiting=busy.running + busy.waiting, kv_used_share=busy.kv_used_share)

    def counts(self) -> Mapping[str, int]:
        if self._loop is None:
            return {}
        hook = self._built.hooks.scheduler if self._built else None
        return {**self._loop.counts, **(hook.counts() if hook is not None else {})}


def _import_library() -> None:
    """Seconds of imports, off the loop."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

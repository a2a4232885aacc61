"""vLLM as an engine: requests of ours over one `AsyncLLM` after another (`vllm_core`).

What can go wrong, and what is done about it (research: vLLM 0.32):

* `pause_generation` clears the prefix cache and calls the connector's `reset_cache` unless told otherwise, in every
  mode. It is always told otherwise: `clear_cache=False`. Weights versions are kept apart by the salt of each request.
* On CPU vLLM neither changes weights in place (they are packed at load) nor gives memory back (sleep is ignored). There an
  update and a suspension end the core, and a request goes on in the next one (`vllm_requests`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path

import msgspec

from interlock.core.targets import KeptCache, Mode, stricter
from interlock.engines.base import (
    Capabilities,
    Engine,
    EngineGone,
    EngineStartError,
    NotStanding,
    Progress,
    RequestRejected,
    Unable,
    UpdateFailed,
    Work,
)
from interlock.engines.vllm_core import VllmCore
from interlock.engines.vllm_failures import first_line
from interlock.engines.vllm_requests import CoreEnded, Kept
from interlock.engines.vllm_setup import BLOCK_TOKENS, VllmConfig, prepare_environment
from interlock.host.base import Host
from interlock.store.models import UnknownModelError, model_identity
from interlock.wire.fleet_messages import Load

_log = logging.getLogger(__name__)

DEATH_POLL_SECONDS = 0.2


class VllmEngine(Engine):
    """`engines.base.Engine` over vLLM."""

    def __init__(self, host: Host, config: VllmConfig) -> None:
        self._host, self._config = host, config
        self._core: VllmCore | None = None
        self._mode: Mode | None = None
        """Of the pause in force or under way; None: not paused."""
        self._stands = False
        self._suspended = False
        self._asleep = False
        self._broken = ""
        """Why there are no weights; empty: there are."""
        self._stopping = False
        self._max_model_tokens = 0
        self._kept: dict[str, Kept] = {}
        self._turned = asyncio.Condition()
        self._counts: Counter[str] = Counter()

    async def start(self) -> Capabilities:
        prepare_environment(self._config)
        self._core = await VllmCore.start(self._host, self._config)
        self._max_model_tokens = self._core.max_model_tokens
        return Capabilities(
            kind="vllm",
            model=self._config.model_id,
            max_model_tokens=self._max_model_tokens,
            pause_modes=frozenset(Mode),
            features=["logprobs", "logit_bias", "priority", "seed"],
            saves=self._config.store is not None,
            block_tokens=BLOCK_TOKENS,
            updates=True,
            suspends=True,
        )

    # --- requests ------------------------------------------------------------------------------------------------

    async def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        kept = self._kept[work.key] = Kept(work, self._counts)
        try:
            while True:
                core = await self._core_for(kept)
                if core is None:
                    yield Progress([], [], "abort", kept.cached_tokens or 0)
                    return
                prompt, sampling, end = kept.restated(self._max_model_tokens)
                if end is not None:
                    yield end
                    return
                with contextlib.suppress(CoreEnded):
                    async with contextlib.aclosing(kept.attempt(core, prompt, sampling)) as steps:
                        async for progress in steps:
                            yield progress
                            if progress.finish:
                                return
        except (EngineGone, RequestRejected):
            raise
        except Exception as error:
            _log.exception("vLLM failed at request %s", work.key)
            words = f"vLLM failed at it: {type(error).__name__}: {first_line(error)}"
            yield Progress([], [], "error", kept.cached_tokens or 0, words)
        finally:
            del self._kept[work.key]

    async def _core_for(self, kept: Kept) -> VllmCore | None:
        """Waits until there is a core to compute it, paused or not; None: it was aborted meanwhile."""
        async with self._turned:
            await self._turned.wait_for(lambda: kept.aborted or self._core is not None or self._stopping)
            if kept.aborted:
                return None
            return self._running

    async def abort(self, key: str) -> None:
        kept = self._kept.get(key)
        if kept is None:
            return
        async with self._turned:
            kept.aborted = True
            self._turned.notify_all()
        if self._core is not None and kept.queue is not None:
            with self._gone_if_dead():
                await self._core.llm.abort(kept.queue.request_id, internal=True)

    # --- standing still ------------------------------------------------------------------------------------------

    async def pause(self, mode: Mode) -> None:
        if self._stands and not stricter(mode, self._mode):
            return
        self._mode, self._stands = mode, False
        if mode is Mode.ABORT:
            for key in list(self._kept):
                await self.abort(key)
        core = self._core
        if core is not None and not self._asleep:
            with self._gone_if_dead():
                await core.llm.pause_generation(mode=mode.value, clear_cache=False)
        self._stands = True

    async def unpause(self) -> None:
        if self._suspended:
            raise NotStanding("the engine is suspended: resume it first")
        if self._broken:
            raise UpdateFailed(f"the engine has no weights: {self._broken}")
        if self._mode is None:
            return
        with self._gone_if_dead():
            if self._asleep:  # vLLM steps as soon as its last memory is back
                await self._running.llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            else:
                await self._running.llm.resume_generation()
        self._mode, self._stands = None, False

    async def update_weights(self, path: Path, version: str, kv: KeptCache = KeptCache.RECOMPUTE) -> None:
        if kv is KeptCache.KEEP:
            raise Unable("a vLLM engine changes weights by starting its core anew, which drops its KV cache")
        if self._suspended or not self._stands:
            raise NotStanding("weights change only while the engine is paused and not suspended")
        self._broken = f"the change to version {version} did not end"
        try:
            identity = await self._identity(path)
            await self._end_core()
            config = msgspec.structs.replace(self._config, model=str(path), model_id=identity)
            core = await self._start_core(config)
            if core.max_model_tokens != self._max_model_tokens:
                await core.end()
                raise EngineStartError(
                    f"it has room for {core.max_model_tokens} tokens, the engine promised {self._max_model_tokens}"
                )
        except (EngineStartError, UnknownModelError, OSError) as error:
            self._broken = f"version {version} from {path} could not be loaded: {error}"
            raise UpdateFailed(self._broken) from error
        self._config, self._broken = config, ""
        await self._turn(core)

    async def _identity(self, path: Path) -> str:
        cache = Path(self._config.state_dir) / "digests.json"
        return await self._host.in_thread(
            lambda: model_identity(str(path), None, files=self._host.files, cache=cache)
        )

    async def suspend(self) -> None:
        if self._suspended:
            return
        if not self._stands:
            raise NotStanding("the engine is suspended only while it is paused")
        core = self._core
        self._suspended = True
        if core is not None and core.sleeps:
            # Written against vLLM 0.32 for platforms that have it; not run on one in this project.
            with self._gone_if_dead():
                await core.llm.reset_prefix_cache(reset_running_requests=True, reset_connector=False)
                await core.llm.sleep(level=1, mode="keep")
            self._asleep = True
        else:
            await self._end_core()

    async def resume(self) -> None:
        if not self._suspended:
            return
        if self._asleep:
            with self._gone_if_dead():
                await self._running.llm.wake_up(tags=["weights"])
        elif not self._broken:
            await self._turn(await self._start_core(self._config))
        self._suspended = False

    # --- cores ---------------------------------------------------------------------------------------------------

    @property
    def _running(self) -> VllmCore:
        if self._core is None:
            raise EngineGone("the engine was stopped")
        return self._core

    async def _end_core(self) -> None:
        """Requests leave it first, with the tokens they have handed on; what was on its way is computed again."""
        core, self._core = self._core, None
        self._asleep = False
        if core is None:
            return
        self._empty(core)
        await core.end()

    def _empty(self, core: VllmCore) -> None:
        core.ending = True
        for kept in self._kept.values():
            if kept.queue is not None:
                kept.queue.put(CoreEnded())

    async def _start_core(self, config: VllmConfig) -> VllmCore:
        """A new core that stands before any request reaches it. Raises `EngineStartError`, `EngineGone`."""
        core = await VllmCore.start(self._host, config)
        if self._stopping:
            await core.end()
            raise EngineGone("the engine was stopped while a core started")
        with self._gone_if_dead():
            await core.llm.pause_generation(mode=Mode.KEEP.value, clear_cache=False)
        return core

    async def _turn(self, core: VllmCore | None) -> None:
        """Requests that wait for a core go on in this one."""
        async with self._turned:
            self._core = core
            self._turned.notify_all()

    async def stop(self) -> None:
        self._stopping = True
        core = self._core
        await self._turn(None)
        if core is not None:
            self._empty(core)
            await core.end()

    async def died(self) -> str:
        while self._stopping or self._core is None or not self._core.dead:
            await self._host.clock.sleep_s(DEATH_POLL_SECONDS)
        return "vLLM's core process or one of its workers has exited"

    def load(self) -> Load:
        if self._mode is not None or self._core is None:
            used = self._core.load.kv_used_share if self._core is not None else 0.0
            return Load(running=0, waiting=len(self._kept), kv_used_share=used)
        return self._core.load

    def counts(self) -> Mapping[str, int]:
        return dict(self._counts)

    @contextlib.contextmanager
    def _gone_if_dead(self) -> Iterator[None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise EngineGone("vLLM's core process is gone") from error

"""vLLM as an engine: `AsyncLLM` in this process, its core and its workers in processes of their own.

What can go wrong, and what is done about it (research: vLLM 0.32):

* `pause_generation` clears the prefix cache and calls the connector's `reset_cache` unless told otherwise, in every
  mode. It is always told otherwise: `clear_cache=False`. Weights versions are kept apart by the salt of each request.
* A dead core is noticed by a thread inside vLLM that tells nobody. `died` watches the core's process and asks.
* Building an `AsyncLLM` blocks for as long as a model takes to load. It is built in a thread, so that the runner can
  still hear its supervisor meanwhile.
* What went wrong in the core stands in its own output, above a `RuntimeError` that says only that something did.
  `explain_failure` finds the sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from interlock.core.targets import Mode
from interlock.engines.base import Capabilities, EngineGone, EngineStartError, Progress, RequestRejected, Work
from interlock.engines.vllm_failures import explain_failure, first_line
from interlock.engines.vllm_setup import VllmConfig, engine_arguments, prepare_environment
from interlock.host.base import Host, Watch
from interlock.wire.engine_messages import Sampling, TokenLogprobs
from interlock.wire.fleet_messages import Load

DEATH_POLL_SECONDS = 0.2
LOG_BYTES_MAX = 1 << 20
STOP_SECONDS = 2.0


class _LastStats:
    """vLLM's statistics of its last step, kept instead of logged (a `StatLoggerBase`, by shape)."""

    def __init__(self) -> None:
        self.load = Load()

    def __call__(self, *_: object) -> _LastStats:
        return self

    def record(self, scheduler_stats: Any = None, *_: object, **__: object) -> None:
        if scheduler_stats is not None:
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self.load = Load(
                running=scheduler_stats.num_running_reqs,
                waiting=waiting,
                kv_used_share=float(scheduler_stats.kv_cache_usage),
            )

    def log_engine_initialized(self) -> None: ...

    def log(self) -> None: ...

    def record_sleep_state(self, is_awake: int, level: int) -> None: ...


class VllmEngine:
    """`engines.base.Engine` over one `AsyncLLM`."""

    def __init__(self, host: Host, config: VllmConfig) -> None:
        self._host = host
        self._config = config
        self._llm: Any = None
        self._stats = _LastStats()
        self._paused = False
        self._stopping = False
        self._core: list[Watch] = []

    async def start(self) -> Capabilities:
        prepare_environment(self._config)
        try:
            self._llm = await self._host.in_thread(self._build)
        except EngineStartError:
            raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                raise
            raise EngineStartError(self._explain(error)) from error
        self._core = [self._host.watch(process.pid) for process in self._core_processes()]
        return Capabilities(
            kind="vllm",
            model=self._config.model_id,
            max_model_tokens=int(self._llm.model_config.max_model_len),
            pause_modes=frozenset(Mode),
            features=["logprobs", "logit_bias", "priority", "seed"],
        )

    def _build(self) -> Any:
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(engine_arguments(self._config), stat_loggers=[self._stats])

    def _core_processes(self) -> Sequence[Any]:
        manager = self._llm.engine_core.resources.engine_manager
        return list(manager.processes) if manager is not None else []

    @property
    def _running(self) -> Any:
        if self._llm is None:
            raise EngineGone("the engine was stopped")
        return self._llm

    def _explain(self, error: BaseException) -> str:
        log = ""
        if self._config.log:
            with contextlib.suppress(OSError):
                log = Path(self._config.log).read_bytes()[-LOG_BYTES_MAX:].decode(errors="replace")
        return explain_failure(error, log)

    # --- requests ------------------------------------------------------------------------------------------------

    async def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt = tokens_input(list(work.prompt), cache_salt=work.cache_salt)
        try:
            outputs = self._running.generate(prompt, to_vllm(work.sampling), work.key, priority=work.priority)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield _progress(output, work.sampling)
        except EngineDeadError as error:
            raise EngineGone("vLLM's core process is gone") from error
        except (VLLMClientError, ValueError, TypeError) as error:
            raise RequestRejected(first_line(error)) from error

    async def abort(self, key: str) -> None:
        with self._gone_if_dead():
            await self._running.abort(key)

    # --- standing still ------------------------------------------------------------------------------------------

    async def pause(self, mode: Mode) -> None:
        self._paused = True
        with self._gone_if_dead():
            await self._running.pause_generation(mode=mode.value, clear_cache=False)

    async def unpause(self) -> None:
        if not self._paused:
            return
        with self._gone_if_dead():
            await self._running.resume_generation()
        self._paused = False

    async def stop(self) -> None:
        self._stopping = True
        llm, self._llm = self._llm, None
        if llm is None:
            return
        await self._host.in_thread(lambda: llm.shutdown(timeout=STOP_SECONDS))
        for watch in self._core:
            watch.close()

    async def died(self) -> str:
        while self._llm is not None and not self._llm.errored:
            if any(watch.exited for watch in self._core):
                break
            await self._host.clock.sleep_s(DEATH_POLL_SECONDS)
        if self._stopping:
            await asyncio.get_running_loop().create_future()
        return "vLLM's core process or one of its workers has exited"

    def load(self) -> Load:
        if self._llm is None or not self._llm.output_processor.has_unfinished_requests():
            return Load()  # an idle engine makes no statistics: its last step's would stand for ever
        return self._stats.load

    @contextlib.contextmanager
    def _gone_if_dead(self) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise EngineGone("vLLM's core process is gone") from error


# --- translation -------------------------------------------------------------------------------------------------


def to_vllm(sampling: Sampling) -> Any:
    """vLLM's `SamplingParams`; no text, new tokens only. Raises `ValueError` (vLLM's) for impossible values."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        min_tokens=sampling.min_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logit_bias=dict(sampling.logit_bias) or None,
        logprobs=sampling.logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


FINISHES = {"stop": "stop", "length": "length", "abort": "abort", "error": "error", "repetition": "stop"}


def _progress(output: Any, sampling: Sampling) -> Progress:
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    finish = FINISHES[str(completion.finish_reason)] if completion.finish_reason is not None else ""
    detail = ""
    if finish == "stop" and completion.stop_reason is not None:
        detail = str(completion.stop_reason)
    if finish == "error":
        detail = "vLLM ended this request with an internal error"
    logprobs = []
    if sampling.logprobs is not None and completion.logprobs is not None:
        logprobs = [
            _token_logprobs(token, position, sampling.logprobs)
            for token, position in zip(tokens, completion.logprobs, strict=True)
        ]
    return Progress(tokens, logprobs, finish, int(output.num_cached_tokens or 0), detail)


def _token_logprobs(token: int, position: Any, count: int) -> TokenLogprobs:
    sampled = position[token]
    best = sorted(position.items(), key=lambda item: item[1].rank)
    top = [(int(t), float(p.logprob)) for t, p in best if p.rank <= count]
    return TokenLogprobs(float(sampled.logprob), int(sampled.rank), top)

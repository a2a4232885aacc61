"""One life of vLLM's core: an `AsyncLLM` in this process, the core and its workers in processes of their own.

An engine outlives its cores: it ends one and starts another where vLLM on this platform can neither change weights in
place nor give memory back (`engines.vllm`).

What can go wrong, and what is done about it (research: vLLM 0.32):

* A dead core is noticed by a thread inside vLLM that tells nobody. `dead` watches the core's process and asks.
* Building an `AsyncLLM` blocks for as long as a model takes to load. It is built in a thread, so that the runner can
  still hear its supervisor meanwhile.
* What went wrong in the core stands in its own output, above a `RuntimeError` that says only that something did.
  `explain_failure` finds the sentence.
* A core that is told to leave does not always. `end` waits for the exits of all its processes, then kills them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interlock.engines.base import EngineStartError
from interlock.engines.vllm_failures import explain_failure
from interlock.engines.vllm_setup import VllmConfig, engine_arguments
from interlock.host.base import Host, Watch
from interlock.host.sweep import descendants, remove_shared_memory, shared_memory_of
from interlock.wire.fleet_messages import Load

LOG_BYTES_MAX = 1 << 20
STOP_SECONDS = 2.0
END_SECONDS_MAX = 5.0


class LastStats:
    """vLLM's statistics of its last step, kept instead of logged (a `StatLoggerBase`, by shape)."""

    def __init__(self) -> None:
        self.load = Load()

    def __call__(self, *_: object) -> LastStats:
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


class VllmCore:
    """Made by `start`, ended by `end`."""

    def __init__(self, host: Host, llm: Any, stats: LastStats) -> None:
        self._host, self.llm, self._stats = host, llm, stats
        self.ending = False
        manager = llm.engine_core.resources.engine_manager
        self._processes: Sequence[Any] = list(manager.processes) if manager is not None else []
        self.watches: list[Watch] = [host.watch(process.pid) for process in self._processes]
        self._memory = self._mapped()
        """Noted while they live: what a dead process had mapped can no longer be seen."""

    def _mapped(self) -> set[str]:
        return {name for watch in self.watches for name in shared_memory_of(watch.pid)}

    @classmethod
    async def start(cls, host: Host, config: VllmConfig) -> VllmCore:
        """Loads the model. Raises `EngineStartError` with one sentence for the operator."""
        stats = LastStats()
        try:
            llm = await host.in_thread(_build, config, stats)
        except EngineStartError:
            raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                raise
            raise EngineStartError(_explain(error, config)) from error
        return cls(host, llm, stats)

    @property
    def max_model_tokens(self) -> int:
        return int(self.llm.model_config.max_model_len)

    @property
    def sleeps(self) -> bool:
        """Whether vLLM itself can give memory back here: not on CPU."""
        from vllm.platforms import current_platform

        return bool(
            current_platform.is_sleep_mode_available() and self.llm.vllm_config.model_config.enable_sleep_mode
        )

    @property
    def dead(self) -> bool:
        """It has exited, or says that it failed, without having been told to end."""
        if self.ending:
            return False
        return bool(self.llm.errored) or any(watch.exited for watch in self.watches)

    @property
    def load(self) -> Load:
        if not self.llm.output_processor.has_unfinished_requests():
            return Load()  # an idle core makes no statistics: its last step's would stand for ever
        return self._stats.load

    async def end(self) -> None:
        """Ends core and workers; on return none of them is left, nor their shared memory."""
        self.ending = True
        self._memory |= self._mapped()
        watches = list(self.watches)
        for pid in {pid for watch in self.watches for pid in descendants(watch.pid)}:
            with contextlib.suppress(ProcessLookupError):
                watches.append(self._host.watch(pid))
        with contextlib.suppress(Exception):
            await self._host.in_thread(lambda: self.llm.shutdown(timeout=STOP_SECONDS))
        try:
            async with asyncio.timeout(END_SECONDS_MAX):
                for watch in watches:
                    await watch.wait_exited()
        except TimeoutError:
            for watch in watches:
                watch.kill()
                await watch.wait_exited()
        for process in self._processes:
            process.join(0)  # ours to reap; its workers come to whoever reaps orphans, which a runner is
        for watch in watches:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(watch.pid, os.WNOHANG)  # noqa: ASYNC222 - it does not wait
            watch.close()
        remove_shared_memory(self._memory)


def _build(config: VllmConfig, stats: LastStats) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(engine_arguments(config), stat_loggers=[stats])


def _explain(error: BaseException, config: VllmConfig) -> str:
    log = ""
    if config.log:
        with contextlib.suppress(OSError):
            log = Path(config.log).read_bytes()[-LOG_BYTES_MAX:].decode(errors="replace")
    return explain_failure(error, log)

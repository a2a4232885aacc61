"""A vLLM `AsyncLLM` that a trainer runs in this very process, on this very loop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from interlock.engines.attached.calls import CallFailed, Described
from interlock.engines.base import EngineGone, Unable
from interlock.wire.fleet_messages import Load


class InProcess:
    """`Calls` on an `AsyncLLM` (vLLM 0.32)."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    @property
    def where(self) -> str:
        return f"the AsyncLLM of process {os.getpid()}"

    async def describe(self) -> Described:
        from vllm.platforms import current_platform

        model = self._llm.vllm_config.model_config
        return Described(
            model=str(model.model),
            max_model_tokens=int(model.max_model_len),
            sleeps=bool(current_platform.is_sleep_mode_available() and model.enable_sleep_mode),
            pid=os.getpid(),
        )

    async def pause(self, mode: str) -> None:
        with self._said():
            try:
                await self._llm.pause_generation(mode=mode, clear_cache=False)
            except ValueError as error:
                raise Unable(f"{self.where} cannot pause with mode {mode}: {error}") from error

    async def resume(self) -> None:
        with self._said():
            await self._llm.resume_generation()

    async def is_paused(self) -> bool:
        with self._said():
            return bool(await self._llm.is_paused())
        raise AssertionError("unreachable")

    async def reload(self, path: str) -> None:
        with self._said():
            await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})

    async def drop_caches(self) -> None:
        with self._said():
            if not await self._llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
                raise CallFailed("vLLM says that blocks are still held")
            await self._llm.reset_mm_cache()
            await self._llm.reset_encoder_cache()

    async def name_weights(self, version: str) -> None:
        with self._said():
            await self._llm.update_weight_version(version)

    async def weights_name(self) -> str:
        with self._said():
            return str(await self._llm.get_weight_version())
        raise AssertionError("unreachable")

    async def sleep(self) -> None:
        with self._said():
            await self._llm.sleep(level=1, mode="keep")

    async def wake(self, what: str) -> None:
        with self._said():
            await self._llm.wake_up(tags=[what])

    async def load(self) -> Load:
        if self._llm.errored:
            raise EngineGone(f"{self.where} has died")
        return Load(running=int(self._llm.output_processor.get_num_unfinished_requests()))

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """vLLM's core answers a failed call by a bare `Exception` with words."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise EngineGone(f"{self.where} has died") from error
        except (CallFailed, Unable):
            raise
        except Exception as error:
            raise CallFailed(f"{type(error).__name__}: {error}") from error

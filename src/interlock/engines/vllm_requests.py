"""One request of a vLLM engine, over however many cores it takes.

When its core is ended under it (an update, a suspension) it goes on in the next one: prompt and tokens are asked again,
parameters restated for the remainder (`core.continuation`). What cannot be restated ends with an error that names it.

`AsyncLLM.generate` turns every error of the engine into one type and loses an abort that comes before it has added the
request. So requests are added here: what `add_request` refuses is the client's fault, and nothing else is.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from interlock.core.continuation import Complete, Continue, Refuse, decide
from interlock.core.sampling import Sampling
from interlock.engines.base import EngineGone, Progress, RequestRejected, Work
from interlock.engines.vllm_core import VllmCore
from interlock.engines.vllm_failures import first_line
from interlock.engines.vllm_words import progress_of, to_vllm


class CoreEnded(Exception):  # noqa: N818 - says what is, as the others do
    """The core was ended under a request, which goes on in the next one."""


class Kept:
    """One request: what was asked, and the tokens handed on so far. Adds to the engine's `counts`."""

    def __init__(self, work: Work, counts: Counter[str]) -> None:
        self.work, self._counts = work, counts
        self.tokens: list[int] = []
        self.cached_tokens: int | None = None
        self.aborted = False
        self.queue: Any = None
        """vLLM's collector of its outputs, once it was added to a core."""

    def restated(self, max_model_tokens: int) -> tuple[list[int], Sampling, Progress | None]:
        """What to ask the next core for, or how the request ends without it."""
        work, cached = self.work, self.cached_tokens or 0
        match decide(work.prompt, work.sampling, self.tokens, max_model_tokens):
            case Continue(prompt, sampling):
                return prompt, sampling, None
            case Complete(finish, detail):
                return [], work.sampling, Progress([], [], finish, cached, detail)
            case Refuse(parameter, reason):
                words = f"the engine's weights or memory changed under a request with {parameter}: {reason}"
                return [], work.sampling, Progress([], [], "error", cached, words)
        return work.prompt, work.sampling, None

    async def attempt(
        self, core: VllmCore, prompt: list[int], sampling: Sampling
    ) -> AsyncGenerator[Progress, None]:
        """One core's part of it. Raises `CoreEnded`, `EngineGone`, `RequestRejected`, and vLLM's own errors."""
        from vllm.v1.engine.exceptions import EngineDeadError

        queue = await self._add(core, prompt, sampling)
        finished = False
        try:
            if self.aborted:  # while it was being added
                await core.llm.abort(queue.request_id, internal=True)
            while not finished:
                output = queue.get_nowait() or await queue.get()
                finished = bool(output.finished)
                yield self._made(progress_of(output, sampling))
        except EngineDeadError as error:
            finished = True
            raise _gone(core) from error
        except CoreEnded:
            finished = True
            raise
        finally:
            self.queue = None
            if not finished:
                await core.llm.abort(queue.request_id, internal=True)

    async def _add(self, core: VllmCore, prompt: list[int], sampling: Sampling) -> Any:
        """vLLM's collector of the request's outputs."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        work = self.work
        try:
            asked = to_vllm(sampling)
        except (VLLMClientError, ValueError, TypeError) as error:
            raise RequestRejected(first_line(error)) from error
        given = tokens_input(list(prompt), cache_salt=work.cache_salt)
        try:
            self.queue = await core.llm.add_request(work.key, given, asked, priority=work.priority)
        except EngineDeadError as error:
            raise _gone(core) from error
        except VLLMClientError as error:
            raise RequestRejected(first_line(error)) from error
        except (asyncio.CancelledError, GeneratorExit):  # it may be in the core already
            await core.llm.abort(work.key)
            raise
        if core.ending:
            raise CoreEnded
        if not self.tokens:
            self._counts["prompt_tokens"] += len(prompt)
        return self.queue

    def _made(self, progress: Progress) -> Progress:
        self.tokens += progress.tokens
        self._counts["generated_tokens"] += len(progress.tokens)
        if self.cached_tokens is None:
            self.cached_tokens = progress.cached_tokens
            self._counts["cached_tokens"] += progress.cached_tokens
        if progress.cached_tokens == self.cached_tokens:
            return progress
        return msgspec.structs.replace(progress, cached_tokens=self.cached_tokens)


def _gone(core: VllmCore) -> Exception:
    return CoreEnded() if core.ending else EngineGone("vLLM's core process is gone")

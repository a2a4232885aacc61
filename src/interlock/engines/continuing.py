"""How the engine goes on with a stream: from its beginning, or after what an earlier life of the engine had made of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator

import msgspec

from interlock.core.continuation import Complete, Continue, Refuse, decide
from interlock.engines.base import Engine, Progress, RequestRejected, Unable, Work
from interlock.engines.streams import Stream

_log = logging.getLogger(__name__)


def steps_of(engine: Engine, stream: Stream, max_model_tokens: int | None) -> AsyncGenerator[Progress, None]:
    """What the engine makes of it from here on. Raises as `Engine.generate`."""
    if stream.state is None and not stream.tokens:
        return engine.generate(_work(stream))
    return _going_on(engine, stream, max_model_tokens)


def _work(stream: Stream) -> Work:
    asked = stream.dispatch
    return Work(
        key=stream.key,
        packed_prompt=asked.prompt,
        sampling=asked.sampling,
        cache_salt=asked.cache_salt,
        priority=asked.priority,
    )


async def _going_on(
    engine: Engine, stream: Stream, max_model_tokens: int | None
) -> AsyncGenerator[Progress, None]:
    state, stream.state = stream.state, None
    if state is not None:
        work = msgspec.structs.replace(state.work, key=stream.key)
        try:
            async with contextlib.aclosing(engine.put(msgspec.structs.replace(state, work=work))) as steps:
                async for progress in steps:
                    yield progress
            return
        except (RequestRejected, Unable) as error:  # other weights: its tokens are what is left
            _log.info("request %s goes on by its tokens alone: %s", stream.key, error)
    async with contextlib.aclosing(_from_tokens(engine, stream, max_model_tokens)) as steps:
        async for progress in steps:
            yield progress


async def _from_tokens(
    engine: Engine, stream: Stream, max_model_tokens: int | None
) -> AsyncGenerator[Progress, None]:
    asked, cached = stream.dispatch, stream.cached_tokens
    work, goes_on = _work(stream), bool(stream.tokens)
    match decide(work.prompt if goes_on else [], asked.sampling, stream.tokens, max_model_tokens):
        case Continue(longer, remainder):
            work = Work.of(stream.key, longer, remainder, asked.cache_salt, asked.priority)
        case Complete(finish, detail):
            yield Progress([], [], finish, cached, detail)
            return
        case Refuse(parameter, reason):
            words = f"the engine was ended under a request with {parameter}: {reason}"
            yield Progress([], [], "error", cached, words)
            return
    async with contextlib.aclosing(engine.generate(work)) as steps:
        async for progress in steps:
            yield msgspec.structs.replace(progress, cached_tokens=cached) if goes_on else progress

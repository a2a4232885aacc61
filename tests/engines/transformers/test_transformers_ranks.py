"""Tensor parallelism over gloo: the same tokens as one rank, and one dead rank is a dead engine."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import msgspec
import pytest
from tiny_models import Heard, Library, prompts, work

from interlock.core.targets import Mode
from interlock.engines.base import EngineGone, EngineStartError

LONG = prompts((90,))[0]

pytestmark = pytest.mark.fleet


async def test_two_ranks_make_the_tokens_of_one_move_requests_and_die_together(
    bench: Any, library: Library
) -> None:
    """One start of two ranks costs seconds, so all that needs them is asked here."""
    made = await bench("llama", tensor_parallel=2, collective_seconds=20.0)
    assert made.loop.ranks.computer.nature.token_bytes == 2 * 2 * 1 * 8 * 4, (
        "each rank holds one of two heads"
    )
    heard = await made.run(*(work(str(n), prompt) for n, prompt in enumerate(prompts())))
    assert [h.tokens for h in heard] == [library.greedy("llama", prompt) for prompt in prompts()]

    # A request is taken out with both ranks' shards and put back.
    listening = asyncio.create_task(Heard().listen(made.engine.generate(work("moved", LONG, max_tokens=60))))
    async with asyncio.timeout(20):
        while made.engine.counts()["steps"] < 45 and not listening.done():
            await made.engine._ask(lambda: None)
    await made.engine.pause(Mode.KEEP)
    state = await made.engine.take("moved")
    first = (await listening).tokens
    await made.engine.unpause()
    payload = msgspec.msgpack.decode(state.payload)
    assert len(payload["caches"]) == 2
    assert all(payload["caches"])
    rest = (await Heard().listen(made.engine.put(state))).tokens
    assert first + rest == library.greedy("llama", LONG, 60)

    # New weights reach both.
    library.model("llama", seed=1)
    await made.engine.pause(Mode.KEEP)
    await made.engine.update_weights(library.path("llama", 1), "v2")
    await made.engine.unpause()
    assert (await made.run(work("new", LONG)))[0].tokens == library.greedy("llama", LONG, seed=1)

    # One rank is killed while both compute.
    listening = asyncio.create_task(Heard().listen(made.engine.generate(work("lost", LONG, max_tokens=400))))
    death = asyncio.create_task(made.engine.died())
    await made.engine._ask(lambda: None)
    os.kill(made.engine._processes.children[0].pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        with pytest.raises(EngineGone):
            await listening
        assert await death
        with pytest.raises(EngineGone):
            await made.engine.pause(Mode.KEEP)


async def test_a_family_without_a_plan_is_refused_in_a_sentence_on_two_ranks(bench: Any) -> None:
    with pytest.raises(EngineStartError, match=r"no tensor-parallel plan|has exited"):
        await bench("mamba2", tensor_parallel=2)

"""Tokens equal to the library's own `generate`, whatever runs beside a request and however its prompt is cut."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from tiny_models import Heard, Library, prompts, work

from interlock.engines.base import EngineStartError

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mixtral",
    "gemma2",
    "gemma3",
    "mamba2",
    "falcon_h1",
    "jamba",
    "qwen3_next",
    "deepseek_v3",
]


@pytest.mark.parametrize("family", FAMILIES)
async def test_many_at_once_get_the_tokens_that_generate_makes_one_by_one(
    family: str, bench: Any, library: Library
) -> None:
    engine = await bench(family)
    heard = await engine.run(*(work(str(n), prompt) for n, prompt in enumerate(prompts())))
    expected = [library.greedy(family, prompt) for prompt in prompts()]
    assert [h.tokens for h in heard] == expected
    assert all(h.finish == "length" for h in heard)
    assert all(len(set(tokens)) > 3 for tokens in expected), "a model that repeats itself would show nothing"
    engine.loop.scheduler.check_integrity()


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon_h1"])
async def test_the_comparison_fails_when_one_block_of_one_cache_is_wrong(
    family: str, bench: Any, library: Library
) -> None:
    engine = await bench(family, gated=True)
    prompt = prompts((40,))[0]
    listening = asyncio.create_task(Heard().listen(engine.engine.generate(work("a", prompt))))
    await engine.step(4)

    def flip() -> None:
        for layer in engine.loop.ranks.computer._batch.cache.layers:
            layer.store_k[0, :, layer.begin : layer.begin + 4] *= -1.0

    await engine.engine._ask(flip)
    await engine.step(40)
    assert (await listening).tokens != library.greedy(family, prompt)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next"])
async def test_neighbours_that_come_and_go_change_no_token(family: str, bench: Any, library: Library) -> None:
    engine = await bench(family, gated=True)
    kept, *others = prompts((37, 50, 9, 21))
    staying = asyncio.create_task(Heard().listen(engine.engine.generate(work("stays", kept, max_tokens=30))))
    await engine.step(3)
    for number, other in enumerate(others):
        leaving = asyncio.create_task(Heard().listen(engine.engine.generate(work(f"leaves-{number}", other))))
        await asyncio.sleep(0)
        await engine.step(3 + number)
        await engine.engine.abort(f"leaves-{number}")
        assert (await leaving).finish == "abort"
        await engine.step(2)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(20):
            while not staying.done():
                await engine.step()
    assert (await staying).tokens == library.greedy(family, kept, 30)


async def test_memory_too_small_for_all_makes_them_wait_or_begin_anew_and_changes_no_token(
    bench: Any, library: Library
) -> None:
    token_bytes = 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, size, float32
    engine = await bench("llama", kv_bytes=150 * token_bytes)
    heard = await engine.run(*(work(str(n), prompt) for n, prompt in enumerate(prompts())))
    assert [h.tokens for h in heard] == [library.greedy("llama", prompt) for prompt in prompts()]
    assert engine.loop.scheduler.preempted > 0, "nothing was short of memory: the test shows nothing"


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma"])
async def test_a_model_whose_state_cannot_be_kept_apart_is_refused_in_a_sentence(
    family: str, bench: Any
) -> None:
    with pytest.raises(EngineStartError, match="serve it with another engine"):
        await bench(family)


async def test_a_model_computes_in_the_dtype_it_is_told(bench: Any, library: Library) -> None:
    import torch

    engine = await bench("llama", dtype="bfloat16")
    computer = engine.loop.ranks.computer
    assert {p.dtype for p in computer.model.model.parameters()} == {torch.bfloat16}
    assert computer.nature.batches
    assert computer.nature.continues
    (heard,) = await engine.run(work("a", prompts((40,))[0]))
    assert heard.finish == "length"
    with pytest.raises(EngineStartError, match="dtype 'int3'"):
        await bench("llama", dtype="int3")

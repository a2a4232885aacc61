"""Tokens per second of the transformers engine against the library's own `generate`, one by one and as one batch.

    python benchmarks/transformers_engine.py [--rounds N] [--requests N] [--tokens N] [--model DIRECTORY]

The three take turns in each round, on the same prompts (of different lengths), one thread, greedy, in one process. Printed
are medians over the rounds, and the median of each round's ratio with its range. `generate` knows all prompts beforehand,
pads them to one length and ends when the longest ends; the engine gets them all at once through its own door, streamed.
CPU seconds are those of the whole process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from interlock.core.sampling import Sampling
from interlock.engines.base import Work
from interlock.engines.demo_model import build_demo_model
from interlock.engines.transformers.engine import TransformersEngine
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.real import RealHost


def make_prompts(count: int, vocabulary: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    lengths = [32 + (97 * n) % 224 for n in range(count)]
    return [torch.randint(5, vocabulary, (length,), generator=generator).tolist() for length in lengths]


class Generate:
    """The library by itself."""

    def __init__(self, model: Any, tokens: int) -> None:
        self._model, self._tokens = model, tokens

    def _call(self, prompts: list[list[int]]) -> list[list[int]]:
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            made = self._model.generate(
                ids, attention_mask=mask, max_new_tokens=self._tokens, min_new_tokens=self._tokens,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return [list(row) for row in made[:, longest:].tolist()]

    async def one_by_one(self, prompts: list[list[int]]) -> list[list[int]]:
        return [self._call([prompt])[0] for prompt in prompts]

    async def batched(self, prompts: list[list[int]]) -> list[list[int]]:
        return self._call(prompts)


class Ours:
    """The engine, by its interface."""

    def __init__(self, engine: TransformersEngine, tokens: int) -> None:
        self._engine, self._tokens, self._count = engine, tokens, 0

    async def _one(self, prompt: list[int]) -> list[int]:
        self._count += 1
        sampling = Sampling(max_tokens=self._tokens, temperature=0.0, ignore_eos=True)
        made: list[int] = []
        async for progress in self._engine.generate(Work.of(str(self._count), prompt, sampling, "")):
            made += progress.tokens
        return made

    async def together(self, prompts: list[list[int]]) -> list[list[int]]:
        return list(await asyncio.gather(*map(self._one, prompts)))

    async def one_by_one(self, prompts: list[list[int]]) -> list[list[int]]:
        return [await self._one(prompt) for prompt in prompts]


async def measure(call: Callable[[Any], Awaitable[Any]], prompts: Any) -> tuple[float, Any]:
    """(CPU seconds, answer)."""
    begun = time.process_time()
    answer = await call(prompts)
    return time.process_time() - begun, answer


async def run(rounds: int, requests: int, tokens: int, model: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        engine = TransformersEngine(
            RealHost(),
            TransformersConfig(
                model=str(model), model_id="bench", name="bench", state_dir=scratch, scratch_dir=scratch
            ),
        )
        begun = time.perf_counter()
        await engine.start()
        print(f"ready after {time.perf_counter() - begun:.1f} s (imports, loading, probe)")
        import torch
        import transformers

        torch.set_num_threads(1)
        library = Generate(
            transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval(), tokens
        )
        ours = Ours(engine, tokens)
        prompts = make_prompts(requests, library._model.config.vocab_size)
        ways = {
            "generate, one by one": library.one_by_one,
            "generate, one batch": library.batched,
            "engine, one by one": ours.one_by_one,
            "engine, all at once": ours.together,
        }
        for way in ways.values():
            await measure(way, prompts[:2])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            answers = {}
            for name, way in ways.items():
                spent, answers[name] = await measure(way, prompts)
                seconds[name].append(spent)
            if any(answer != answers["generate, one by one"] for answer in answers.values()):
                print("some tokens differ (ties within float error, or a defect)")
        report(seconds, requests * tokens)
        await engine.stop()


def report(seconds: dict[str, list[float]], tokens: int) -> None:
    for name, spent in seconds.items():
        print(f"{name:<24} {tokens / statistics.median(spent):8.1f} tokens/CPU s")
    for ours, theirs in (
        ("engine, one by one", "generate, one by one"),
        ("engine, all at once", "generate, one by one"),
        ("engine, all at once", "generate, one batch"),
    ):
        ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
        print(f"{ours} / {theirs}: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--model", type=Path)
    chosen = parser.parse_args()
    asyncio.run(run(chosen.rounds, chosen.requests, chosen.tokens, chosen.model or build_demo_model()))

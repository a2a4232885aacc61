"""A plain vLLM run, without anything of ours: the reference that the demo and the tests compare with.

Reads one JSON question on standard input, answers with one JSON line as the last line of standard output.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import msgspec


class Question(msgspec.Struct):
    """`prompts` are token ids; each is continued greedily by `tokens` tokens."""

    model: str
    prompts: list[list[int]]
    tokens: int


class PlainCompletion(msgspec.Struct):
    """As `cli.equality.Completion`: tokens, their logprobs, and how far the second best was behind each."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]


def complete(question: Question) -> list[PlainCompletion]:
    """One prompt after the other, so that no batch changes the order of additions."""
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    # OpenMP's threads wait for each other by spinning: with a busy neighbour, two on two cores are 20 times slower than one.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", TQDM_DISABLE="1")
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=question.model,
        dtype="float32",
        block_size=32,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 29,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=question.tokens, logprobs=2, ignore_eos=True, detokenize=False
    )
    answers = [
        engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0].outputs[0]
        for prompt in question.prompts
    ]
    return [_as_completion(answer) for answer in answers]


def _as_completion(answer: Any) -> PlainCompletion:
    made = PlainCompletion(list(answer.token_ids), [], [])
    for token, alternatives in zip(answer.token_ids, answer.logprobs, strict=True):
        chosen = alternatives[token].logprob
        made.logprobs.append(chosen)
        made.margins.append(
            min((chosen - other.logprob for t, other in alternatives.items() if t != token), default=0.0)
        )
    return made


if __name__ == "__main__":
    answer = complete(msgspec.json.decode(sys.stdin.buffer.read(), type=Question))
    print()
    print(msgspec.json.encode(answer).decode(), flush=True)

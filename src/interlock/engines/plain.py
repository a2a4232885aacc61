"""A plain run of vLLM, or of the Transformers library, without anything of ours: what the demo and the tests compare with.

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
    engine: str = "vllm"


class PlainCompletion(msgspec.Struct):
    """As `testing.equality.Completion`: tokens, their logprobs, and how far the second best was behind each."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]


def complete(question: Question) -> list[PlainCompletion]:
    """One prompt after the other, so that no batch changes the order of additions."""
    if question.engine == "transformers":
        return _complete_by_the_library(question)
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


def _complete_by_the_library(question: Question) -> list[PlainCompletion]:
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        question.model, dtype=torch.float32, local_files_only=True
    ).eval()
    answers = []
    for prompt in question.prompts:
        made = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            min_new_tokens=question.tokens,
            max_new_tokens=question.tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answer = PlainCompletion(made.sequences[0, len(prompt) :].tolist(), [], [])
        for token, logits in zip(answer.tokens, made.logits, strict=True):
            logprobs = torch.log_softmax(logits[0].float(), dim=-1)
            best = torch.topk(logprobs, 2)
            answer.logprobs.append(float(logprobs[token]))
            # 0 where another was better: `generate` does not take the end token before its minimum.
            other = best.values[1] if int(best.indices[0]) == token else best.values[0]
            answer.margins.append(max(0.0, float(logprobs[token] - other)))
        answers.append(answer)
    return answers


if __name__ == "__main__":
    answer = complete(msgspec.json.decode(sys.stdin.buffer.read(), type=Question))
    print()
    print(msgspec.json.encode(answer).decode(), flush=True)

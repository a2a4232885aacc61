"""Requests and tokens in vLLM's words: sampling parameters in, progress and logprobs out. vLLM is imported when called."""

from __future__ import annotations

from typing import Any

from interlock.core.sampling import Sampling
from interlock.engines.base import Progress
from interlock.wire.engine_messages import TokenLogprobs


def to_vllm(sampling: Sampling) -> Any:
    """vLLM's `SamplingParams`; no text, new tokens only. Raises `ValueError` or vLLM's `VLLMClientError` for impossible values."""
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


def progress_of(output: Any, sampling: Sampling) -> Progress:
    """From vLLM's `RequestOutput` of one step (output kind DELTA)."""
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

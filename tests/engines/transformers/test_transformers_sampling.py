"""Sampling parameters mean what vLLM says they mean: against the analytic distribution and the library's own warpers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Library, prompts, work
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from interlock.core.sampling import Sampling
from interlock.engines.base import RequestRejected
from interlock.engines.transformers.sampling import NoToken, Sampler, check_sampling, truncated

END = 9


def sampler(prompt: list[int] | None = None, **sampling: Any) -> Sampler:
    chosen = {"max_tokens": 8, **sampling}
    return Sampler(Sampling(**chosen), prompt or [1, 2, 3], [END, 11])


def logits_of(size: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def z_of(counts: Counter[int], expected: torch.Tensor, draws: int) -> float:
    """Largest deviation over all tokens, in standard deviations."""
    deviations = [
        abs(counts[t] - draws * float(p)) / math.sqrt(draws * float(p) * (1 - float(p)))
        for t, p in enumerate(expected)
        if 1e-3 < p < 1 - 1e-3
    ]
    assert all(counts[t] == 0 for t, p in enumerate(expected) if p == 0), "what is left out was drawn"
    return max(deviations)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.4, "top_k": 9, "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_follow_the_distribution_that_the_parameters_describe(sampling: dict[str, Any]) -> None:
    chosen, draws = sampler(seed=3, **sampling), 4000
    logits = logits_of()
    expected = logits[None] / sampling.get("temperature", 1.0)
    if "min_p" in sampling:
        expected = MinPLogitsWarper(sampling["min_p"])(None, expected)
    if "top_k" in sampling:
        expected = TopKLogitsWarper(sampling["top_k"])(None, expected)
    if "top_p" in sampling:
        expected = TopPLogitsWarper(sampling["top_p"])(None, expected)
    counts = Counter(chosen.choose(logits.clone(), [])[0] for _ in range(draws))
    assert z_of(counts, expected.softmax(-1)[0], draws) < 4.5
    assert (
        z_of(counts, torch.full((20,), 1 / 20), draws) > 8
        if not sampling.keys() & {"top_k", "top_p", "min_p"}
        else True
    )


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True),
    st.integers(0, 12),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.9),
)
@settings(max_examples=150, deadline=None)
def test_truncation_leaves_what_the_librarys_warpers_leave(
    values: list[float], k: int, p: float, m: float
) -> None:
    logits = torch.tensor(values)
    ours = truncated(logits.clone(), Sampling(max_tokens=1, top_k=k, top_p=p, min_p=m))
    theirs = logits[None]
    if m > 0:
        theirs = MinPLogitsWarper(m)(None, theirs)
    if k:
        theirs = TopKLogitsWarper(k)(None, theirs)
    if p < 1.0:
        theirs = TopPLogitsWarper(p)(None, theirs)
    # Where the cumulated probability meets 1 - p within float error either answer is right.
    cumulated = theirs[0].sort().values.softmax(-1).cumsum(-1)
    if not bool(((cumulated - (1 - p)).abs() < 1e-5).any()):
        assert torch.equal(ours == -math.inf, theirs[0] == -math.inf)
    assert bool((ours > -math.inf).any()), "nothing is left to draw"


def test_a_saved_generator_goes_on_where_it_was() -> None:
    logits = torch.zeros(50)  # flat: two generators agree forty times in a row as good as never
    undisturbed = sampler(seed=5)
    expected = [undisturbed.choose(logits.clone(), [])[0] for _ in range(40)]
    for cut in (0, 1, 17):
        first = sampler(seed=5)
        tokens = [first.choose(logits.clone(), [])[0] for _ in range(cut)]
        second = sampler(seed=None)
        second.restore(first.dump())
        tokens += [second.choose(logits.clone(), [])[0] for _ in range(40 - cut)]
        assert tokens == expected
    without = sampler(seed=None)
    assert [without.choose(logits.clone(), [])[0] for _ in range(40)] != expected


def test_penalties_count_as_openai_and_the_library_define_them() -> None:
    logits, output = logits_of(), [4, 4, 4, 7]
    chosen = sampler([5], temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.clone()
    expected[4] -= 0.5 + 3 * 0.25
    expected[7] -= 0.5 + 0.25
    assert torch.allclose(chosen._constrained(logits.clone(), output), expected)
    repeated = sampler([5, 6], temperature=0.0, repetition_penalty=1.7)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[5, 6, *output]]), logits[None].clone())[0]
    assert torch.allclose(repeated._constrained(logits.clone(), output), theirs)


def test_end_tokens_are_barred_until_min_tokens_and_end_afterwards() -> None:
    logits = torch.zeros(20)
    logits[END], logits[13] = 10.0, 9.0
    chosen = sampler(temperature=0.0, min_tokens=2, stop_token_ids=[13])
    assert chosen.choose(logits.clone(), [])[0] not in (END, 11, 13)
    assert chosen.choose(logits.clone(), [1])[0] not in (END, 11, 13)
    assert chosen.choose(logits.clone(), [1, 1])[0] == END


@pytest.mark.parametrize(
    ("sampling", "output", "finish"),
    [
        ({}, [END], ("stop", "")),
        ({}, [11], ("stop", "11")),
        ({}, [13], ("", "")),
        ({"stop_token_ids": [13]}, [13], ("stop", "13")),
        ({"ignore_eos": True}, [END], ("", "")),
        ({"ignore_eos": True}, [11], ("", "")),
        ({"ignore_eos": True, "stop_token_ids": [END]}, [END], ("stop", str(END))),
        ({}, [1] * 8, ("length", "")),
        ({}, [1] * 7 + [END], ("stop", "")),
        ({"max_tokens": 100}, [1] * 12, ("length", "")),
    ],
)
def test_a_request_ends_as_vllm_ends_it(
    sampling: dict[str, Any], output: list[int], finish: tuple[str, str]
) -> None:
    assert sampler(**sampling).ended_by(output, 12) == finish


def test_a_bias_moves_a_greedy_choice_and_logprobs_stay_those_of_the_model() -> None:
    logits = logits_of()
    chosen = sampler(temperature=0.0, logit_bias={2: 50.0}, logprobs=3)
    token, told = chosen.choose(logits.clone(), [])
    assert token == 2
    assert told is not None
    expected = torch.log_softmax(logits, -1)
    assert told.logprob == pytest.approx(float(expected[2]), abs=1e-5)
    assert told.rank == int((expected >= expected[2]).sum())
    best = torch.topk(expected, 3)
    assert [t for t, _ in told.top] == best.indices.tolist()
    assert [v for _, v in told.top] == pytest.approx(best.values.tolist(), abs=1e-5)


async def test_a_seed_gives_the_same_tokens_whatever_runs_beside_and_other_seeds_give_others(
    bench: Any,
) -> None:
    made = await bench("llama")
    prompt, other = prompts((40, 23))
    sampled = {"temperature": 1.0, "max_tokens": 16}
    alone = (await made.run(work("1", prompt, seed=11, **sampled)))[0].tokens
    beside = await made.run(
        work("2", other, **sampled), work("3", prompt, seed=11, **sampled), work("4", other, **sampled)
    )
    assert beside[1].tokens == alone
    assert (await made.run(work("5", prompt, seed=12, **sampled)))[0].tokens != alone


async def test_sampled_first_tokens_follow_the_models_own_softmax(bench: Any, library: Library) -> None:
    made = await bench("qwen2", running_max=64, step_tokens=512)
    prompt, draws = prompts((6,))[0], 600
    heard = await made.run(
        *(work(str(n), prompt, temperature=1.0, max_tokens=1, seed=n) for n in range(draws))
    )
    counts = Counter(h.tokens[0] for h in heard)
    assert z_of(counts, library.logits("qwen2", prompt).softmax(-1), draws) < 5


async def test_logprobs_are_those_of_the_model_and_one_stands_beside_each_token(
    bench: Any, library: Library
) -> None:
    made = await bench("llama")
    prompt = prompts((19,))[0]
    heard = (await made.run(work("a", prompt, temperature=0.7, seed=1, logprobs=2, max_tokens=6)))[0]
    assert len(heard.logprobs) == len(heard.tokens) == 6
    for index, (token, told) in enumerate(zip(heard.tokens, heard.logprobs, strict=True)):
        expected = torch.log_softmax(library.logits("llama", [*prompt, *heard.tokens[:index]]), -1)
        assert told.logprob == pytest.approx(float(expected[token]), abs=1e-4)


# --- at the limits -----------------------------------------------------------------------------------------------

NUMBERS = [
    0.0,
    -0.0,
    1e-45,
    1e-30,
    1e-9,
    0.5,
    1.0,
    2.0,
    100.0,
    -100.0,
    1e30,
    1e38,
    1e308,
    -2.0,
    math.inf,
    math.nan,
]


@settings(max_examples=600)
@given(st.data())
def test_whatever_is_accepted_draws_a_token_and_what_could_not_is_refused(data: st.DataObject) -> None:
    """At and beyond each limit, all together: a parameter that made a step fail would end every request of the engine."""
    number = st.sampled_from(NUMBERS)
    biases = st.dictionaries(st.sampled_from([0, 3, 19]), number, max_size=3)
    asked = Sampling(
        max_tokens=data.draw(st.sampled_from([1, 10**9])),
        temperature=data.draw(number),
        top_p=data.draw(number),
        min_p=data.draw(number),
        top_k=data.draw(st.sampled_from([0, -1, 1, 19, 20, 10**9])),
        seed=data.draw(st.sampled_from([None, -1, -(1 << 63), (1 << 63) - 1, 1 << 63])),
        presence_penalty=data.draw(st.sampled_from([0.0, 2.0, -2.0])),
        repetition_penalty=data.draw(number),
        logit_bias=data.draw(biases),
        logprobs=data.draw(st.sampled_from([None, 0, 20])),
    )
    try:
        check_sampling(asked, 20)
    except RequestRejected:
        return
    logits = logits_of(seed=data.draw(st.integers(0, 9))) * data.draw(st.sampled_from([1.0, 100.0]))
    token, logprobs = Sampler(asked, [1, 2], [END]).choose(logits.clone(), [3])
    assert 0 <= token < 20
    assert logprobs is None or math.isfinite(logprobs.logprob)


@pytest.mark.parametrize(
    "beyond",
    [{"repetition_penalty": 1e-45}, {"repetition_penalty": 1e308}, {"logit_bias": {3: 101.0}}, {"logit_bias": {3: math.nan}}],
    ids=str,
)  # fmt: skip
def test_numbers_that_no_logit_bears_are_refused(beyond: dict[str, Any]) -> None:
    with pytest.raises(RequestRejected, match="must be in"):
        check_sampling(Sampling(max_tokens=1, **beyond), 20)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_choose_no_token(temperature: float) -> None:
    logits = logits_of()
    logits[7] = math.nan
    with pytest.raises(NoToken):
        sampler(temperature=temperature).choose(logits, [])

"""A continuation is the same request for the remainder, or it is refused by name."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.continuation import ROWS, Complete, Continue, Refuse, Restart, decide, refusal
from interlock.core.sampling import Sampling

PROMPT = [1, 2, 3]


def test_what_nobody_saw_restarts_whatever_its_parameters() -> None:
    assert decide(PROMPT, Sampling(max_tokens=5, seed=7, presence_penalty=1.0), []) == Restart()


def test_delivered_tokens_become_prompt_and_the_remainder_is_restated() -> None:
    decision = decide(PROMPT, Sampling(max_tokens=10, min_tokens=4, temperature=0.0), [7, 8, 9])
    assert decision == Continue([1, 2, 3, 7, 8, 9], Sampling(max_tokens=7, min_tokens=1, temperature=0.0))


def test_min_tokens_never_falls_below_zero() -> None:
    decision = decide(PROMPT, Sampling(max_tokens=10, min_tokens=1), [7, 8])
    assert isinstance(decision, Continue)
    assert decision.sampling.min_tokens == 0


def test_a_request_that_reached_its_length_is_complete_and_generates_no_more() -> None:
    assert decide(PROMPT, Sampling(max_tokens=2), [7, 8]) == Complete("length")


def test_a_request_that_filled_the_model_is_complete() -> None:
    assert decide(PROMPT, Sampling(max_tokens=99), [7, 8], max_model_tokens=5) == Complete("length")
    assert isinstance(decide(PROMPT, Sampling(max_tokens=99), [7, 8], max_model_tokens=6), Continue)


def test_a_delivered_stop_token_ended_the_request_also_at_its_length() -> None:
    assert decide(PROMPT, Sampling(max_tokens=2, stop_token_ids=[8]), [7, 8]) == Complete("stop", "8")


def test_completeness_is_judged_before_what_can_be_carried() -> None:
    assert decide(PROMPT, Sampling(max_tokens=1, seed=1), [7]) == Complete("length")


@pytest.mark.parametrize(
    ("sampling", "parameter"),
    [
        (Sampling(max_tokens=9, seed=7), "seed"),
        (Sampling(max_tokens=9, presence_penalty=0.1), "presence_penalty"),
        (Sampling(max_tokens=9, presence_penalty=-0.1, temperature=0.0), "presence_penalty"),
        (Sampling(max_tokens=9, frequency_penalty=0.1), "frequency_penalty"),
    ],
)
def test_what_prompt_and_tokens_cannot_carry_is_refused_by_name(sampling: Sampling, parameter: str) -> None:
    decision = decide(PROMPT, sampling, [7])
    assert isinstance(decision, Refuse)
    assert decision.parameter == parameter
    assert decision.reason == ROWS[parameter].why


def test_a_seed_that_draws_nothing_is_carried() -> None:
    assert isinstance(decide(PROMPT, Sampling(max_tokens=9, seed=7, temperature=0.0), [7]), Continue)


def test_every_field_of_sampling_has_its_row_and_no_row_is_left_over() -> None:
    assert set(ROWS) == set(Sampling.__struct_fields__)


def test_a_parameter_that_nobody_judged_is_refused_even_at_its_default() -> None:
    class Tomorrow(Sampling, frozen=True, kw_only=True):
        grammar: str | None = None

    refused = refusal(Tomorrow(max_tokens=9))
    assert refused is not None
    assert refused.parameter == "grammar"
    assert isinstance(decide(PROMPT, Tomorrow(max_tokens=9), [7]), Refuse)


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    max_tokens=st.integers(1, 12),
    min_tokens=st.integers(0, 12),
    cuts=st.lists(st.integers(1, 12), max_size=4),
)
def test_any_chain_of_continuations_asks_for_the_same_whole(
    prompt: list[int], max_tokens: int, min_tokens: int, cuts: list[int]
) -> None:
    whole = Sampling(max_tokens=max_tokens, min_tokens=min_tokens)
    delivered: list[int] = []
    for cut in cuts:
        delivered += [5] * min(cut, max_tokens - len(delivered))
        decision = decide(prompt, whole, delivered)
        if len(delivered) == max_tokens:
            assert decision == Complete("length")
            return
        assert isinstance(decision, Continue)
        assert decision.prompt == [*prompt, *delivered]
        assert len(delivered) + decision.sampling.max_tokens == max_tokens
        restated = msgspec.structs.replace(decision.sampling, max_tokens=max_tokens, min_tokens=min_tokens)
        assert restated == whole

"""The comparison behind every claim of equal tokens must be able to fail."""

import pytest

from interlock.testing.equality import Completion, compare

REFERENCE = Completion(tokens=[5, 6, 7], logprobs=[-0.1, -0.2, -0.3], margins=[1.0, 5e-5, 1.0])


def test_the_same_tokens_are_equal_and_a_prefix_of_them_is_too() -> None:
    assert compare("same", REFERENCE, REFERENCE).equal
    assert compare("prefix", REFERENCE, Completion(tokens=[5, 6], logprobs=[-0.1, -0.2])).equal


def test_another_token_differs_and_the_place_is_named() -> None:
    found = compare("other", REFERENCE, Completion(tokens=[5, 6, 8], logprobs=[-0.1, -0.2, -0.3]))
    assert not found.equal
    assert found.differs_at == 2


def test_another_token_at_a_tie_is_equal_and_counted() -> None:
    found = compare("tie", REFERENCE, Completion(tokens=[5, 9, 1], logprobs=[-0.1, -0.2, -0.3]))
    assert found.equal
    assert found.tie_at == 1


def test_the_same_tokens_with_other_logprobs_differ() -> None:
    assert not compare("drift", REFERENCE, Completion(tokens=[5, 6], logprobs=[-0.1, -0.21])).equal


@pytest.mark.parametrize("tokens", [[], [5, 6, 7, 8]])
def test_nothing_or_too_much_to_compare_is_an_error_not_a_success(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare("empty", REFERENCE, Completion(tokens=tokens, logprobs=[0.0] * len(tokens)))

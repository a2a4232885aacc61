"""What "equal tokens" means (DESIGN §9), as code: for the demo and for tests.

Two greedy runs are equal when the same tokens came with log-probabilities within 1e-4 (float32), or when at the first
difference the two best tokens lie within 1e-4 of each other: batch sizes and chunking change the order of additions.
"""

from __future__ import annotations

import msgspec

LOGPROB_TOLERANCE = 1e-4


class Completion(msgspec.Struct):
    """Token ids with the log-probability of each, and (for a reference) how far the second best token was behind."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float] = []


class Comparison(msgspec.Struct):
    name: str
    tokens: int
    equal: bool
    tie_at: int | None = None
    worst_logprob: float = 0.0
    differs_at: int | None = None

    def __str__(self) -> str:
        if not self.equal:
            return (
                f"{self.name}: DIFFERS at token {self.differs_at} (logprob off by {self.worst_logprob:.1e})"
            )
        tie = f", tie at token {self.tie_at}" if self.tie_at is not None else ""
        return f"{self.name}: {self.tokens} tokens equal{tie} (logprobs within {self.worst_logprob:.1e})"


def compare(name: str, reference: Completion, other: Completion) -> Comparison:
    """Whether `other` is a prefix of the undisturbed `reference`, or parts from it at a tie.

    Raises `ValueError` when there is nothing to compare or the reference is too short: a comparison that cannot fail
    proves nothing.
    """
    if not other.tokens or len(other.tokens) > len(reference.tokens):
        raise ValueError(
            f"{name}: {len(other.tokens)} tokens cannot be compared with a reference of {len(reference.tokens)}"
        )
    worst = 0.0
    for index, token in enumerate(other.tokens):
        if token != reference.tokens[index]:
            tie = reference.margins[index] <= LOGPROB_TOLERANCE
            return Comparison(
                name, index, tie, tie_at=index if tie else None, worst_logprob=worst, differs_at=index
            )
        if other.logprobs:
            worst = max(worst, abs(other.logprobs[index] - reference.logprobs[index]))
            if worst > LOGPROB_TOLERANCE:
                return Comparison(name, index, False, worst_logprob=worst, differs_at=index)
    return Comparison(name, len(other.tokens), True, worst_logprob=worst)

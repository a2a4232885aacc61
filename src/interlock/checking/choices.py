"""One way to write a scenario, three ways to run it: exhaustively, by seed, or under Hypothesis, which shrinks what fails.

A scenario is ordinary code that takes a `Choices` and asks it whenever something could go one way or another:

>>> def coins(choices):
...     return [choices.pick(["heads", "tails"]) for _ in range(1 + choices.below(2))]
>>> [result for _, result in every_way(coins)]
[['heads'], ['tails'], ['heads', 'heads'], ['heads', 'tails'], ['tails', 'heads'], ['tails', 'tails']]

Exhaustively: each run's choices are the digits of a number; the next run adds one to the rightmost digit that can grow and
drops what stood behind it. No state is kept but that number, and the code under test need not be pure, only repeatable: asked
for the same choices it must ask the same questions (`Unrepeatable` says when it does not). The idea is that of TigerBeetle's
exhaustigen. A run is named by its digits, so `Replay(digits)` runs it again.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Scenario = Callable[["Choices"], T]


class Unrepeatable(Exception):  # noqa: N818
    """A scenario asked a different question after the same answers, so it cannot be enumerated."""


class Choices(ABC):
    """What a scenario asks. `digits` is what it was answered so far."""

    def __init__(self) -> None:
        self.digits: list[int] = []

    @abstractmethod
    def _decide(self, count: int) -> int:
        """A number below `count`, which is positive."""

    def below(self, count: int) -> int:
        """One of 0 … count-1; raises `ValueError` for a count below 1."""
        if count < 1:
            raise ValueError(f"there is nothing to choose below {count}")
        digit = self._decide(count)
        self.digits.append(digit)
        return digit

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`, in their order; raises `ValueError` when there are none."""
        return options[self.below(len(options))]

    def flip(self) -> bool:
        """False, then True."""
        return bool(self.below(2))

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in some order; as they are comes first."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(len(left))]

    def some_of(self, items: Sequence[T]) -> list[T]:
        """Any of the items, in their order; none of them comes first."""
        return [item for item in items if self.flip()]


class Replay(Choices):
    """Answers with given digits, then with zeros: the way a run is named and run again."""

    def __init__(self, digits: Sequence[int] = ()) -> None:
        super().__init__()
        self._given = list(digits)
        self.counts: list[int] = []

    def _decide(self, count: int) -> int:
        at = len(self.digits)
        digit = self._given[at] if at < len(self._given) else 0
        if digit >= count:
            raise Unrepeatable(f"question {at} was answered {digit} before and now has {count} answers")
        self.counts.append(count)
        return digit


class Seeded(Choices):
    """Answers at random; the same seed, the same answers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def _decide(self, count: int) -> int:
        return self._random.randrange(count)


class Drawn(Choices):
    """Answers from Hypothesis: `Drawn(data)` with `data` from `strategies.data()`. Zeros are what it shrinks towards."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        self._data = data

    def _decide(self, count: int) -> int:
        from hypothesis import strategies

        number: int = self._data.draw(strategies.integers(0, count - 1))
        return number


def every_way(scenario: Scenario[T], *, runs_max: int = 1_000_000) -> Iterator[tuple[tuple[int, ...], T]]:
    """Runs `scenario` once for every combination of answers; yields the digits and the result of each run.

    What the scenario raises comes through with a note naming its digits. Raises `OverflowError` beyond `runs_max` runs: what
    is not exhausted must not pass for it.
    """
    digits: list[int] = []
    for _ in range(runs_max):
        choices = Replay(digits)
        try:
            result = scenario(choices)
        except Exception as error:
            error.add_note(f"with choices {choices.digits}")
            raise
        if len(choices.digits) < len(digits):
            raise Unrepeatable(f"after {choices.digits} it asked {len(digits)} questions before, now fewer")
        yield tuple(choices.digits), result
        digits = choices.digits
        while digits and digits[-1] + 1 >= choices.counts[len(digits) - 1]:
            digits.pop()
        if not digits:
            return
        digits[-1] += 1
    raise OverflowError(f"{runs_max} runs did not exhaust the scenario")


def by_seed(scenario: Scenario[T], seeds: Sequence[int]) -> Iterator[tuple[int, T]]:
    """Runs `scenario` once a seed; what it raises comes through with a note naming seed and digits."""
    for seed in seeds:
        choices = Seeded(seed)
        try:
            result = scenario(choices)
        except Exception as error:
            error.add_note(f"with seed {seed}, choices {choices.digits}")
            raise
        yield seed, result

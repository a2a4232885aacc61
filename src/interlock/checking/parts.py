"""What worlds are built from: cores and messages turned into small ints, so that states hash fast and nothing is copied.

`Machine` interns the states of one kind of core and remembers every transition it made: a core is pure, so a world of
millions of states needs only the few thousand transitions that differ. `Mail` is the set of all messages ever sent, as the
bits of one int.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

C = TypeVar("C", bound=Hashable)
E = TypeVar("E", bound=Hashable)
F = TypeVar("F")
M = TypeVar("M", bound=Hashable)


class Machine(Generic[C, E, F]):
    """One kind of core: `number(core)` and `machine[number]` go between cores and ints, `step` is its `transition`."""

    def __init__(self, transition: Callable[[C, E], tuple[C, tuple[F, ...]]]) -> None:
        self._transition = transition
        self._cores: list[C] = []
        self._numbers: dict[C, int] = {}
        self._made: dict[tuple[int, E], tuple[int, tuple[F, ...]]] = {}

    def number(self, core: C) -> int:
        known = self._numbers.setdefault(core, len(self._cores))
        if known == len(self._cores):
            self._cores.append(core)
        return known

    def __getitem__(self, number: int) -> C:
        return self._cores[number]

    def step(self, number: int, event: E) -> tuple[int, tuple[F, ...]]:
        """The core after `event`, and its effects. Raises what the transition raises."""
        key = (number, event)
        made = self._made.get(key)
        if made is None:
            core, effects = self._transition(self._cores[number], event)
            made = self._made[key] = (self.number(core), effects)
        return made


class Mail(Generic[M]):
    """The set of all messages ever sent, as an int: `sent | mail.bit(message)` sends, `mail.read(sent)` lists."""

    def __init__(self) -> None:
        self._messages: list[M] = []
        self._bits: dict[M, int] = {}

    def bit(self, message: M) -> int:
        bit = self._bits.get(message)
        if bit is None:
            bit = self._bits[message] = 1 << len(self._messages)
            self._messages.append(message)
        return bit

    def read(self, sent: int) -> Iterator[M]:
        """Each message of the set; any of them may be delivered now."""
        messages = self._messages
        while sent:
            low = sent & -sent
            yield messages[low.bit_length() - 1]
            sent ^= low


def count_of(number: int, what: str) -> str:
    """ "1 rank", "3 ranks": for the names of worlds."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

"""The scheduler's draws: one for each step that had a choice. Recorded, they are a schedule that can be cut down and run again.

Draw 0 of a choice is the default: whoever became ready first. So a schedule is what differs from that, number of the draw →
which callback was taken, and the empty one is the order of a plain event loop.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

WORDS_MAX = 40


class Schedule:
    """Draws from `rng`, or takes what `fixed` says and the default elsewhere."""

    def __init__(self, rng: random.Random, fixed: Mapping[int, int] | None = None) -> None:
        self._rng, self._fixed = rng, fixed
        self.draws = 0
        self.taken: dict[int, int] = {}
        """Draws that did not take the default."""
        self.words: list[str] = []
        """What those of a fixed schedule were about."""

    def draw(self, count: int) -> int:
        """Which of `count` callbacks is looked at; `take` says what became of it."""
        self.draws += 1
        if self._fixed is None:
            return int(self._rng.random() * count)
        return min(self._fixed.get(self.draws - 1, 0), count - 1)

    def take(self, chosen: int, words: Callable[[], str]) -> None:
        """`chosen` is run: it may be an earlier one than was drawn, where the drawn one had to come after it."""
        if chosen:
            self.taken[self.draws - 1] = chosen
            if self._fixed is not None and len(self.words) < WORDS_MAX:
                self.words.append(words())


def shrink_schedule(
    taken: Mapping[int, int],
    fails: Callable[[dict[int, int]], bool],
    is_time_left: Callable[[], bool],
) -> dict[int, int]:
    """The smallest part of a schedule found that still fails, for as long as there is time.

    First none of it, then the shortest beginning (what comes after the failure cannot matter), then ever smaller pieces left
    out (ddmin, Zeller 1999). Each try is a whole run.
    """
    if not is_time_left():
        return dict(taken)
    if fails({}):
        return {}
    items = sorted(taken.items())
    short, enough = 0, len(items)
    while enough - short > 1 and is_time_left():
        middle = (short + enough) // 2
        if fails(dict(items[:middle])):
            enough = middle
        else:
            short = middle
    items = items[:enough]
    size = max(1, len(items) // 2)
    while is_time_left():
        start, left = 0, len(items)
        while start < len(items) and is_time_left():
            fewer = items[:start] + items[start + size :]
            if fails(dict(fewer)):
                items = fewer
            else:
                start += size
        if size == 1 and len(items) == left:
            break
        size = max(1, min(size // 2, len(items) // 2))
    return dict(items)

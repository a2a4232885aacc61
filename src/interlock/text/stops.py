"""Finding stop strings in text that arrives in pieces, and holding back no more than could still become one.

The result is a function of the characters alone: however the text is cut into pieces, the same match is found (the one
that ends first; of several that end there, the first listed), as vLLM's check_stop_strings does for one token at a time.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """`feed` returns text that is safe to hand on; after a match `matched` is set and nothing more may be fed.

    What is held back is the longest end of the text that begins a stop string, thus shorter than the longest of them.
    With `include` the matched string stays in the text.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._include = include
        self._recent = ""  # the last characters seen, handed on or not: a match may begin in them
        self._held = 0  # how many of them were not handed on
        self.matched: str | None = None

    @property
    def held_chars(self) -> int:
        """How many characters wait, for they may be the beginning of a stop string."""
        return self._held

    def feed(self, text: str, armed: bool = True) -> str:
        """New text to hand on. Not `armed`: a stop string that ends in this piece is ordinary text (`min_tokens`)."""
        assert self.matched is None, "text after the stop string"
        if not self._stops or not text:
            return text
        before = len(self._recent)
        window = self._recent + text
        if armed and (match := self._first(window, before)) is not None:
            start, end, self.matched = match
            cut = end if self._include else start
            released = window[before - self._held : cut]
            self._held, self._recent = 0, ""
            return released
        held = self._hold(window)
        released = window[before - self._held : len(window) - held]
        self._recent = window[-(self._longest - 1) :] if self._longest > 1 else ""
        self._held = held
        return released

    def finish(self) -> str:
        """The text ends here without a match: what was held back is text after all."""
        rest = self._recent[len(self._recent) - self._held :]
        self._recent, self._held = "", 0
        return rest

    def _first(self, window: str, before: int) -> tuple[int, int, str] | None:
        """(start, end, stop) of the match that ends first, after `before`."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = window.find(stop, max(0, before - len(stop) + 1))
            if start >= 0 and (best is None or start + len(stop) < best[1]):
                best = (start, start + len(stop), stop)
        return best

    def _hold(self, window: str) -> int:
        """Length of the longest end of `window` that a stop string begins with, and that is not all of it."""
        longest = 0
        for stop in self._stops:
            at = window.find(stop[0], max(0, len(window) - len(stop) + 1))
            while at >= 0 and len(window) - at > longest:
                if stop.startswith(window[at:]):
                    longest = len(window) - at
                at = window.find(stop[0], at + 1)
        return longest

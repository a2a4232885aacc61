"""Requests of an earlier life of this front, until their clients take them up again.

They run on meanwhile, unread. One that ends is kept whole, so that it can still be read. What nobody takes up within
TAKE_UP_SECONDS_MAX of a running fleet is given up: a fleet that stands still stops that clock, for its clients wait as well.
"""

from __future__ import annotations

import msgspec

from interlock.core.errors import InterlockError
from interlock.core.limits import TAKE_UP_SECONDS_MAX
from interlock.fleet.generation import Generation
from interlock.fleet.ledger import Entry


class Ended(msgspec.Struct, frozen=True):
    """How a parked request ended: by `finish`, or by an error."""

    entry: Entry
    finish: str = ""
    detail: str = ""
    error: InterlockError | None = None


class Parked:
    """Mutable, one a front."""

    def __init__(self) -> None:
        self._until_s: dict[str, float] = {}
        self._ended: dict[str, Ended] = {}
        self._ran_s = 0.0

    def __contains__(self, request: str) -> bool:
        return request in self._until_s

    def __len__(self) -> int:
        return len(self._until_s)

    def names(self) -> list[str]:
        """Of all that wait for their clients, ended or not."""
        return list(self._until_s)

    def add(self, request: str) -> None:
        """Nobody reads it from now on."""
        self._until_s[request] = self._ran_s + TAKE_UP_SECONDS_MAX

    def end(self, ended: Ended) -> None:
        """It is kept whole, so that it can still be read."""
        self._ended[ended.entry.request.id] = ended

    def ended(self, request: str) -> Ended | None:
        """How it ended; None while it goes on, or once it was given up."""
        return self._ended.get(request)

    def take(self, request: str) -> None:
        """Somebody reads it from now on. One that has ended stays for its time, to be read once more."""
        if request not in self._ended:
            self._until_s.pop(request, None)

    def ran(self, seconds: float) -> list[str]:
        """The fleet ran so long. Returns what nobody took up in time; it is forgotten here."""
        self._ran_s += seconds
        late = [request for request, until_s in self._until_s.items() if until_s <= self._ran_s]
        for request in late:
            del self._until_s[request]
            self._ended.pop(request, None)
        return late


def replayed(generation: Generation, entry: Entry, ended: Ended | None) -> Generation:
    """A reader's view of a request from its first token on."""
    generation.attempts = entry.attempt
    generation.engine = entry.life.name if entry.life is not None else entry.home
    generation.replay(entry.delivered, entry.logprobs, entry.made, entry.cached_tokens or 0)
    if ended is not None and ended.error is not None:
        generation.fail(ended.error)
    elif ended is not None:
        generation.push([], [], ended.finish, entry.cached_tokens or 0, ended.detail)
    return generation

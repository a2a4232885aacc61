"""Answers that have ended and whose readers have not come to their end.

Their engines keep all of them until then: a front that dies while an answer waits for a slow reader leaves it with its engine, where
the front's next life finds it and whoever was reading takes it up. So an end is acknowledged when it is read, or when nobody will read
it. (One that nobody reads yet, of an earlier life, is the front's own from its end on: `parked`.)
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from interlock.fleet.ledger import Life
from interlock.wire.engine_messages import Cursor, End


class _Kept(msgspec.Struct, frozen=True, gc=False):
    """Where an answer lies, and how many tokens of its last attempt are here."""

    life: Life
    attempt: int
    tokens: int


class UnreadEnds:
    """Mutable, one a front. `on_read` is called when there is something to acknowledge."""

    def __init__(self, on_read: Callable[[], None]) -> None:
        self._on_read = on_read
        self._kept: dict[str, _Kept] = {}
        self._read: dict[Life, list[End]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, request: str) -> bool:
        return request in self._kept

    def keep(self, request: str, life: Life, attempt: int, tokens: int) -> None:
        """Its reader was given the end, and has not come to it."""
        self._kept[request] = _Kept(life, attempt, tokens)

    def holds(self, request: str, attempt: int) -> bool:
        """Whether that attempt's end is here, and not to be acknowledged yet."""
        kept = self._kept.get(request)
        return kept is not None and kept.attempt == attempt

    def read(self, request: str) -> None:
        """Its reader has come to the end, or nobody will. Idempotent."""
        kept = self._kept.pop(request, None)
        if kept is not None:
            self._read.setdefault(kept.life, []).append(End(request, kept.attempt))
            self._on_read()

    def wanted(self, life: Life) -> list[Cursor]:
        """What that engine is to keep."""
        return [
            Cursor(request, kept.attempt, kept.tokens)
            for request, kept in self._kept.items()
            if kept.life == life
        ]

    def lost(self, life: Life) -> None:
        """That engine is no more: what is here is all that is left, and enough for its reader."""
        self._kept = {request: kept for request, kept in self._kept.items() if kept.life != life}
        self._read.pop(life, None)

    def take_read(self) -> dict[Life, list[End]]:
        """By engine, the ends that were read since the last time, to be acknowledged."""
        read, self._read = self._read, {}
        return read

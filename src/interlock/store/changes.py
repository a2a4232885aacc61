"""What was published and what left, numbered: whoever follows by number knows the index, or knows that he missed something.

A bounded ring. A follower asks for what came after the last number he knows; when that has been overwritten he is told
of the gap instead, lists the blocks again page by page, and follows from the number that stood there when he began:
what is repeated then changes nothing, for of each key only its last change counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec

from interlock.core.limits import CHANGES_KEPT_MAX

Medium = str
RAM: Medium = "CPU"
"""vLLM's word, in its KV events, for memory that is no GPU's."""
DISK: Medium = "STORAGE"
"""Its word for a disk."""


class ChangeKind(StrEnum):
    """What became of a block."""

    STORED = "stored"
    REMOVED = "removed"


class Change(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One block came to a medium or left it. `parent` and `block_tokens` as when it came."""

    kind: ChangeKind
    key: bytes
    parent: bytes
    block_tokens: int
    tenant: str = ""
    medium: Medium = RAM


class ChangeLog:
    """The last changes of one life of a node. The first has number 1."""

    def __init__(self, *, kept_max: int = CHANGES_KEPT_MAX) -> None:
        self._ring: list[Change | None] = [None] * kept_max
        self.last = 0
        """The number of the newest change; 0 before the first."""
        self.listeners: list[Callable[[], None]] = []
        """Called after changes, at once and briefly."""
        self._cut = 0

    @property
    def oldest(self) -> int:
        """The number of the oldest change that is still kept."""
        return max(self._cut + 1, self.last - len(self._ring) + 1)

    def cut(self) -> None:
        """More changed than is told one by one: whoever follows has a gap."""
        self.last += 1
        self._cut = self.last
        self._ring = [None] * len(self._ring)
        for listener in self.listeners:
            listener()

    def append(self, change: Change) -> None:
        """One change, which gets the next number."""
        self.extend([change])

    def extend(self, changes: Sequence[Change]) -> None:
        """Changes that happened together; listeners hear of them once."""
        for change in changes:
            self.last += 1
            self._ring[self.last % len(self._ring)] = change
        for listener in self.listeners:
            listener()

    def since(self, after: int, limit: int) -> list[Change] | None:
        """Changes number `after + 1` on, at most `limit`; None when some of them are forgotten or were never."""
        if not self.oldest - 1 <= after <= self.last:
            return None
        changes = []
        for number in range(after + 1, min(self.last, after + limit) + 1):
            change = self._ring[number % len(self._ring)]
            assert change is not None
            changes.append(change)
        return changes

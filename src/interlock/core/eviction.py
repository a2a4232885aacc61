"""Which block leaves first: the least recently used of those that no other block needs.

What can go wrong. A block is of use only together with all blocks before it, so an LRU over single blocks throws away
the first block of a long conversation and keeps its tail, which nothing can reach any more. And an exact order that is
kept in a sorted list makes every look-up cost as much as there are blocks.

Here a block that something *holds* is not a candidate. Its published children hold it, and so do children that are being
written: evicting the parent under them would publish a block that nothing reaches. Holds are counted by key, whether the
block is there or not: a parent that was withdrawn and comes back finds its children again.

Order is by *use*: a number that grows. Touching a prefix gives its blocks falling numbers, so that of one chain the last
block is the oldest. Candidates stand in a heap of (use, key); a touch writes a new number and leaves the old entry, which
is thrown away when it surfaces (the usual lazy deletion; the heap is rebuilt when more than half of it is stale). So a
touch is O(1), and finding the oldest O(log n) amortised. A plain mutable structure, tested against a slow model.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

_STALE_ENTRIES_MIN = 64
"""Below so many entries a heap is not worth rebuilding."""


class LeafLRU:
    """Least recently used order over the blocks that nothing holds."""

    def __init__(self) -> None:
        self._use: dict[bytes, int] = {}
        self._holds: dict[bytes, int] = {}
        self._heap: list[tuple[int, bytes]] = []
        self._now = 0

    def __len__(self) -> int:
        return len(self._use)

    def __contains__(self, key: object) -> bool:
        return key in self._use

    def holds(self, key: bytes) -> int:
        return self._holds.get(key, 0)

    def add(self, key: bytes) -> None:
        """A block that is now used for the first time. Raises `KeyError` when it is there already."""
        if key in self._use:
            raise KeyError(f"block {key.hex()[:12]} is in the order already")
        self._now += 1
        self._use[key] = self._now
        self._offer(key)

    def remove(self, key: bytes) -> None:
        """Raises `KeyError` when it is not there. Holds on its key stay."""
        del self._use[key]
        self._tidy()

    def touch(self, keys: Sequence[bytes]) -> None:
        """These blocks, a prefix from its first block on, are used now. Keys that are not here are passed over."""
        use = self._use
        self._now += len(keys)
        number = self._now
        for key in keys:
            if key in use:
                use[key] = number
                if key not in self._holds:
                    heapq.heappush(self._heap, (number, key))
            number -= 1
        self._tidy()

    def hold(self, key: bytes) -> None:
        """One more needs this block (or will, when it is there): it does not leave."""
        self._holds[key] = self._holds.get(key, 0) + 1

    def release(self, key: bytes) -> None:
        """One fewer needs it. Raises `KeyError` when nothing held it."""
        left = self._holds[key] - 1
        if left:
            self._holds[key] = left
        else:
            del self._holds[key]
            self._offer(key)

    def oldest(self) -> bytes | None:
        """The key to evict next, which stays in the order until `remove`; None when every block is held."""
        heap = self._heap
        while heap:
            number, key = heap[0]
            if self._use.get(key) == number and key not in self._holds:
                return key
            heapq.heappop(heap)
        return None

    def check_integrity(self) -> None:
        """Raises `AssertionError` when a candidate is missing from the heap or the heap outgrew its bound."""
        entries = set(self._heap)
        assert all((use, key) in entries for key, use in self._use.items() if key not in self._holds)
        assert all(count > 0 for count in self._holds.values())
        assert len(self._heap) <= self._bound()

    def _offer(self, key: bytes) -> None:
        use = self._use.get(key)
        if use is not None and key not in self._holds:
            heapq.heappush(self._heap, (use, key))
            self._tidy()

    def _bound(self) -> int:
        return 2 * len(self._use) + _STALE_ENTRIES_MIN

    def _tidy(self) -> None:
        if len(self._heap) > self._bound():
            self._heap = [(use, key) for key, use in self._use.items() if key not in self._holds]
            heapq.heapify(self._heap)

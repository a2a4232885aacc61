"""Which block leaves first: of those that no other block needs, one that was of little use, by an adaptive rule.

What can go wrong. A block is of use only together with all blocks before it, so an order over single blocks throws away
the first block of a long conversation and keeps its tail, which nothing can reach any more. Least-recently-used alone lets
one pass over documents that nobody asks for again push out the system prompts that everybody shares; a queue that asks for
two uses before it keeps anything (S3-FIFO, SIEVE) loses the conversation that comes back after a while. And an exact order
that is kept in a sorted list makes every look-up cost as much as there are blocks.

Here a block that something *holds* is not a candidate. Its published children hold it, and so do children that are being
written and pins: evicting the parent under them would publish a block that nothing reaches. Holds are counted by key,
whether the block is there or not: a parent that was withdrawn and comes back finds its children again.

Among the candidates the rule is ARC's (Megiddo and Modha, FAST 2003), over leaves. A block is *once* (saved, not used
since) or *again* (used since it was saved, or saved a second time soon after it was evicted). The one that was used least
recently leaves, of the *once* blocks while they have their share of all, else of the others. The share learns from
*ghosts*, the keys of what left lately, as many as there are blocks: a key that comes back was evicted too early, and its
side is given more. docs/decisions/011 has the policies that were compared, `benchmarks/eviction.py` compares them.

Order is by *use*: a number that grows. A look-up of a thousand keys must not write a thousand numbers, so touching a
prefix marks its last block alone: the others are held by it, and inherit the number, and that they were used *again*, when
it goes, before they are candidates themselves. Candidates stand in heaps of (use, key); a touch writes a new number and leaves the old entry,
which is thrown away when it surfaces (the usual lazy deletion; a heap is rebuilt when more than half of it is stale). So a
touch is O(1) amortised, and finding a victim O(log n). A plain mutable structure, tested against a slow model.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict

_STALE_ENTRIES_MIN = 64
"""Below so many entries a heap is not worth rebuilding, and so many ghosts are kept however few blocks there are."""
_SHARE_AT_FIRST = 0.5
_ONCE, _AGAIN = 0, 1


class UseClock:
    """Numbers for uses. Orders that share one can be compared: which of their victims was used longer ago."""

    def __init__(self) -> None:
        self.now = 0


class LeafARC:
    """Adaptive replacement order over the blocks that nothing holds."""

    def __init__(self, clock: UseClock | None = None) -> None:
        self._clock = clock or UseClock()
        self._use: dict[bytes, int] = {}
        """Twice the number of the last use, and one more when it is *again*: one table, and the order within a heap."""
        self._holds: dict[bytes, int] = {}
        self._heaps: tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]] = ([], [])
        self._count = [0, 0]
        self._ghosts: tuple[OrderedDict[bytes, None], OrderedDict[bytes, None]] = (
            OrderedDict(),
            OrderedDict(),
        )
        self.once_share = _SHARE_AT_FIRST
        """Which part of all blocks may be *once* before one of those leaves; 0 to 1, learnt."""

    def __len__(self) -> int:
        return len(self._use)

    def __contains__(self, key: object) -> bool:
        return key in self._use

    @property
    def idle(self) -> bool:
        """Whether it knows of no block and no hold: nothing but its experience would be lost with it."""
        return not self._use and not self._holds

    def holds(self, key: bytes) -> int:
        """How many times `hold` counts for this key; a block that is held at least once is no candidate."""
        return self._holds.get(key, 0)

    def age(self, key: bytes) -> int:
        """How many uses of anything lie after the last use of this block. Raises `KeyError` when it is not there."""
        return self._clock.now - (self._use[key] >> 1)

    def add(self, key: bytes) -> None:
        """A block that is now used for the first time. Raises `KeyError` when it is there already."""
        if key in self._use:
            raise KeyError(f"block {key.hex()[:12]} is in the order already")
        side = self._learn(key)
        self._clock.now += 1
        self._use[key] = self._clock.now << 1 | side
        self._count[side] += 1
        self._offer(key)

    def remove(self, key: bytes) -> int:
        """It left for a reason of its own. Raises `KeyError` when it is not there. Holds on its key stay.

        What is returned goes to `release` of its parent: using the child was using the parent.
        """
        use = self._use.pop(key)
        self._count[use & 1] -= 1
        self._tidy(use & 1)
        return use

    def evict(self, key: bytes) -> int:
        """It left to make room: should its key come back soon, that was too early. As `remove` otherwise."""
        use = self.remove(key)
        self._ghosts[use & 1][key] = None
        while len(self._ghosts[0]) + len(self._ghosts[1]) > len(self._use) + _STALE_ENTRIES_MIN:
            longer = _ONCE if len(self._ghosts[_ONCE]) >= len(self._ghosts[_AGAIN]) else _AGAIN
            self._ghosts[longer].popitem(last=False)
        return use

    def touch(self, last: bytes) -> None:
        """The prefix that ends with this block is used now. Raises `KeyError` when the block is not there."""
        known = self._use[last]
        self._clock.now += 1
        self._set(last, known, self._clock.now << 1 | _AGAIN)
        self._tidy(_ONCE)
        self._tidy(_AGAIN)

    def hold(self, key: bytes) -> None:
        """One more needs this block (or will, when it is there): it does not leave."""
        self._holds[key] = self._holds.get(key, 0) + 1

    def release(self, key: bytes, inherited: int = 0) -> None:
        """One fewer needs it; `inherited` is what `evict` or `remove` said of a child. Raises `KeyError` when nothing held it."""
        left = self._holds[key] - 1
        known = self._use.get(key)
        if known is not None:
            use = (max(known, inherited) | 1) ^ 1 | (known | inherited) & 1
            if use != known:
                self._set(key, known, use)
        if left:
            self._holds[key] = left
        else:
            del self._holds[key]
            self._offer(key)

    def victim(self, coming: int = 0) -> bytes | None:
        """The key to evict next, which stays in the order until `evict`; None when every block is held.

        `coming`: blocks that are being written and will be added as *once*; room for many is made before the first comes.
        """
        once, again = self._oldest(_ONCE), self._oldest(_AGAIN)
        if once is None or again is None:
            return once or again
        share = self.once_share * (len(self._use) + coming)
        return once if self._count[_ONCE] + coming >= share else again

    def check_integrity(self) -> None:
        """Raises `AssertionError` when a candidate is missing from its heap or something outgrew its bound."""
        entries = [set(heap) for heap in self._heaps]
        assert all((use, key) in entries[use & 1] for key, use in self._use.items() if key not in self._holds)
        assert all(use & 1 == side for side, heap in enumerate(entries) for use, _ in heap)
        assert all(count > 0 for count in self._holds.values())
        assert self._count == [sum(use & 1 == side for use in self._use.values()) for side in (_ONCE, _AGAIN)]
        assert all(len(heap) <= self._bound(side) for side, heap in enumerate(self._heaps))
        assert not any(key in self._use for ghosts in self._ghosts for key in ghosts)
        assert 0.0 <= self.once_share <= 1.0

    def _learn(self, key: bytes) -> int:
        """On which side a block enters. A ghost's return moves the share towards the side that it left."""
        for side, other, sign in ((_ONCE, _AGAIN, 1), (_AGAIN, _ONCE, -1)):
            ghosts = self._ghosts[side]
            if key in ghosts:
                step = max(1.0, len(self._ghosts[other]) / len(ghosts)) / (len(self._use) + 1)
                self.once_share = min(1.0, max(0.0, self.once_share + sign * step))
                del ghosts[key]
                return _AGAIN
        return _ONCE

    def _oldest(self, side: int) -> bytes | None:
        heap = self._heaps[side]
        while heap:
            use, key = heap[0]
            if self._use.get(key) == use and key not in self._holds:
                return key
            heapq.heappop(heap)
        return None

    def _set(self, key: bytes, known: int, use: int) -> None:
        self._use[key] = use
        self._count[known & 1] -= 1
        self._count[use & 1] += 1
        if key not in self._holds:
            heapq.heappush(self._heaps[use & 1], (use, key))

    def _offer(self, key: bytes) -> None:
        use = self._use.get(key)
        if use is not None and key not in self._holds:
            heapq.heappush(self._heaps[use & 1], (use, key))
            self._tidy(use & 1)

    def _bound(self, side: int) -> int:
        return 2 * self._count[side] + _STALE_ENTRIES_MIN

    def _tidy(self, side: int) -> None:
        heap = self._heaps[side]
        if len(heap) > self._bound(side):
            heap[:] = [
                (use, key) for key, use in self._use.items() if use & 1 == side and key not in self._holds
            ]
            heapq.heapify(heap)

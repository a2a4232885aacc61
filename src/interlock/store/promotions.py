"""Promotions: the node itself as a writer, of blocks that come up from its disk or from a peer.

A slot is WRITING, given to nobody, while verified bytes are copied into it, and is published or free again at the end. What a
removal concerns that is not done yet (core/removals) is not published: it was swept, or is about to be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from interlock.core.packed_sums import pack_sums
from interlock.core.prefixes import Block
from interlock.store.refusal import Refusal
from interlock.store.shelf import Shelf


class Promotions:
    """Those of one slab. `is_written`: whether a session is writing that block."""

    def __init__(self, shelf: Shelf, counters: Counter[str], is_written: Callable[[bytes], bool]) -> None:
        self._shelf, self._counters, self._is_written = shelf, counters, is_written
        self._coming: dict[bytes, tuple[bytes, int, int, str]] = {}
        """Parent, layout, slot and tenant of each."""
        self.holds: Callable[[bytes, str], bool] = lambda *_: False
        """Whether a block of that key and tenant must not come up now."""

    def __contains__(self, key: object) -> bool:
        return key in self._coming

    @property
    def held_slots(self) -> list[int]:
        """Slots that are being filled."""
        return [slot for _, _, slot, _ in self._coming.values()]

    def begin(self, layout: int, keys: Sequence[bytes], parents: Sequence[bytes], tenant: str) -> list[int]:
        """A slot for each of the first keys, as far as there is room, written by nobody but the caller.

        They count for `tenant`, who stored them; none when a write of his would be refused. Every slot is given back by
        `end`. Keys that are here or under way are the caller's defect.
        """
        assert not any(self._is_written(key) or key in self._coming or key in self._shelf for key in keys)
        try:
            self._shelf.orders.check(tenant)
        except Refusal:
            return []
        slots = self._shelf.take_slots(layout, parents, tenant)
        for key, parent, slot in zip(keys, parents, slots, strict=False):
            self._coming[key] = (parent, layout, slot, tenant)
        return slots

    def end(self, key: bytes, checksums: Sequence[int] | None) -> bool:
        """The block stands in its slot, verified; None: it does not. Whether it is published; else the slot is free again."""
        parent, layout, slot, tenant = self._coming.pop(key)
        if checksums is None or self.holds(key, tenant):
            self._shelf.free(slot)
            self._shelf.release(layout, parent, tenant)
            return False
        self._shelf.publish([Block(key, parent, layout, slot, pack_sums(checksums), tenant)])
        self._counters["promoted"] += 1
        return True

"""Where published blocks stand, and how room is made for new ones: index, eviction order and slots put together.

Everything a message asks for costs as much as it has keys. Exceptions, both rare: `clear`, and taking an extent from
another layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from interlock.core.eviction import LeafLRU
from interlock.core.layouts import KVLayout
from interlock.core.limits import LAYOUTS_PER_SLAB_MAX
from interlock.core.prefixes import Block, PrefixIndex
from interlock.store.refusal import Refusal
from interlock.store.slots import FREE, PUBLISHED, SlotTable


class Shelf:
    """The published blocks of one slab, and its slots."""

    def __init__(self, slab_bytes: int, counters: Counter[str]) -> None:
        self.slots = SlotTable(slab_bytes)
        self._counters = counters
        self._index = PrefixIndex()
        self._layouts: dict[KVLayout, int] = {}
        self._orders: list[LeafLRU] = []
        self._at: dict[int, bytes] = {}
        """Which key is published at a slot."""

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._index)

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def layout(self, layout: KVLayout) -> int:
        """The number of that layout here. Raises `Refusal` when the slab cannot hold its blocks."""
        number = self._layouts.get(layout)
        if number is not None:
            return number
        if len(self._layouts) >= LAYOUTS_PER_SLAB_MAX:
            raise Refusal(
                "too_many_layouts",
                f"{LAYOUTS_PER_SLAB_MAX} KV layouts share this slab already; restart the node",
            )
        try:
            number = self.slots.add_layout(layout.block_bytes)
        except ValueError as error:
            raise Refusal("slab_too_small", str(error)) from error
        self._layouts[layout] = number
        self._orders.append(LeafLRU())
        return number

    # --- published blocks ----------------------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes]) -> list[Block]:
        """The blocks of the first keys, up to the first that is not here; they are used now."""
        found = self._index.longest_prefix(keys)
        if found:
            self._orders[found[0].layout].touch([block.key for block in found])
        return found

    def publish(self, block: Block) -> None:
        """The block stands in its slot from now on, and holds its parent."""
        self._index.add(block)
        self._at[block.slot] = block.key
        self._orders[block.layout].add(block.key)
        self.hold(block.layout, block.parent)
        self.slots.move(block.slot, PUBLISHED)

    def withdraw(self, key: bytes, slot: int) -> bool:
        """Forgets the block if it still stands at that slot."""
        block = self._index.get(key)
        if block is None or block.slot != slot:
            return False
        self._drop(block)
        return True

    def clear(self) -> int:
        """Forgets every block; how many. Costs as much as there are."""
        blocks = list(self._index)
        for block in blocks:
            self._drop(block)
        return len(blocks)

    # --- room for new ones ---------------------------------------------------------------------------------------

    def hold(self, layout: int, parent: bytes) -> None:
        """A child of `parent` is here or on its way: it does not leave."""
        if parent:
            self._orders[layout].hold(parent)

    def release(self, layout: int, parent: bytes) -> None:
        if parent:
            self._orders[layout].release(parent)

    def take_slots(self, layout: int, parents: Sequence[bytes]) -> list[int]:
        """A slot for a child of each of `parents`, as far as there is room; each of those parents is held from now on.

        All parents are held before any room is made: what the new blocks hang on must not be what leaves.
        """
        for parent in parents:
            self.hold(layout, parent)
        slots: list[int] = []
        while len(slots) < len(parents) and (slot := self._take_slot(layout)) is not None:
            slots.append(slot)
        for parent in parents[len(slots) :]:
            self.release(layout, parent)
        return slots

    def _take_slot(self, layout: int) -> int | None:
        slot = self.slots.take(layout)
        while slot is None and self._make_room(layout):
            slot = self.slots.take(layout)
        return slot

    def _make_room(self, layout: int) -> bool:
        """Evicts the oldest leaf of this layout; if it has no memory at all, takes an extent from the layout with most."""
        key = self._orders[layout].oldest()
        if key is not None:
            self._evict(key)
            return True
        if self.slots.extents_of(layout):
            return False
        return any(self._take_extent(extent) for extent in self.slots.richest(but=layout))

    def _take_extent(self, extent: int) -> bool:
        states = [(slot, self.slots.state(slot)) for slot in self.slots.slots_of_extent(extent)]
        if any(state not in (FREE, PUBLISHED) for _, state in states):
            return False
        for slot, state in states:
            if state is PUBLISHED:
                self._evict(self._at[slot])
        return self.slots.give_back(extent)

    def _evict(self, key: bytes) -> None:
        block = self._index.get(key)
        assert block is not None
        self._drop(block)
        self._counters["evictions"] += 1

    def _drop(self, block: Block) -> None:
        """A published block leaves. Who is copying it right now finds out by its checksum."""
        self._index.remove(block.key)
        self._orders[block.layout].remove(block.key)
        self.release(block.layout, block.parent)
        del self._at[block.slot]
        self.slots.move(block.slot, FREE)

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the books do not balance. Looks at everything."""
        self.slots.check_integrity()
        for order in self._orders:
            order.check_integrity()
        assert {block.slot: block.key for block in self._index} == self._at
        assert len(self._index) == self.slots.count[PUBLISHED] == sum(map(len, self._orders))

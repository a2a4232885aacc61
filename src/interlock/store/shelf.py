"""Where published blocks stand, and how room is made for new ones: index, eviction order and slots put together.

Everything a message asks for costs as much as it has keys, and what an administrator asks for is done in slices. One
exception, and rare: taking an extent from another layout costs as much as it has slots.

Room is made like this. A tenant at his quota evicts his own. A layout with memory evicts what was used longest ago in it;
but when another layout's victim is twice as old, it takes the extent in which that one stands, so that memory follows use
and no layout keeps what it happened to get first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from interlock.core.layouts import KVLayout
from interlock.core.limits import EXTENT_BYTES_MAX, EXTENTS_MAX, LAYOUTS_PER_SLAB_MAX
from interlock.core.prefixes import Block, PrefixIndex
from interlock.store.changes import Change, ChangeKind, ChangeLog
from interlock.store.orders import Orders, Victim
from interlock.store.pins import Pins
from interlock.store.refusal import Refusal
from interlock.store.slots import FREE, PUBLISHED, WRITING, SlotTable

EXTENTS_MIN = 16
LOOK_AT_OTHERS_EVERY = 64
"""Evictions between two looks at the other layouts' victims."""


class Shelf:
    """The published blocks of one slab, and its slots."""

    def __init__(
        self, slab_bytes: int, counters: Counter[str], *, quotas: Mapping[str, int] | None = None
    ) -> None:
        extents = min(EXTENTS_MAX, max(EXTENTS_MIN, slab_bytes // EXTENT_BYTES_MAX))
        self.slots = SlotTable(slab_bytes, extents=extents)
        self.orders = Orders(quotas)
        self.changes = ChangeLog()
        self.pins = Pins(slab_bytes, self.slots.slot_bytes, self._hold_block, self._release_block)
        self._counters = counters
        self._index = PrefixIndex()
        self._layouts: dict[KVLayout, int] = {}
        self._names: list[KVLayout] = []
        self._at: dict[int, bytes] = {}
        """Which key is published at a slot."""
        self._evictions = 0

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._index)

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def get(self, key: bytes) -> Block | None:
        """The published block of that key, or None."""
        return self._index.get(key)

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
        self._names.append(layout)
        return number

    @property
    def layouts(self) -> Sequence[KVLayout]:
        """All layouts, by number."""
        return self._names

    def layout_of(self, number: int) -> KVLayout:
        """The layout that has that number here."""
        return self._names[number]

    # --- published blocks ----------------------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes]) -> list[Block]:
        """The blocks of the first keys, up to the first that is not here; they are used now."""
        found = self._index.longest_prefix(keys)
        if found:
            order = self.orders.of(found[0].layout, found[0].tenant)
            last = next((block.key for block in reversed(found) if block.key in order), None)
            if last is not None:
                order.touch(last)
        return found

    def publish(self, blocks: Sequence[Block]) -> None:
        """The blocks, of one layout and tenant, stand in their slots from now on.

        Each keeps the hold on its parent that `take_slots` gave to whoever wrote it: that is not released any more.
        """
        layout, tenant = blocks[0].layout, blocks[0].tenant
        order, tokens = self.orders.of(layout, tenant), self._names[layout].block_tokens
        self.slots.publish(layout, [block.slot for block in blocks])
        changes = []
        for block in blocks:
            assert block.layout == layout and block.tenant == tenant, "these are not of one order"  # noqa: PT018
            self._index.add(block)
            self._at[block.slot] = block.key
            order.add(block.key)
            changes.append(Change(ChangeKind.STORED, block.key, block.parent, tokens, tenant))
        self.changes.extend(changes)

    def withdraw(self, key: bytes, slot: int) -> bool:
        """Forgets the block if it still stands at that slot."""
        block = self._index.get(key)
        if block is None or block.slot != slot:
            return False
        self._drop(block)
        return True

    def page(self, cursor: int, limit: int) -> tuple[list[Block], int | None]:
        """The blocks that stand in at most `limit` slots from `cursor` (0 at first) on, and where to go on."""
        slots, following = self.slots.walk(cursor, limit)
        found = (self._index.get(self._at[slot]) for slot in slots if slot in self._at)
        return [block for block in found if block is not None], following

    # --- room for new ones ---------------------------------------------------------------------------------------

    def hold(self, layout: int, parent: bytes, tenant: str = "") -> None:
        """A child of `parent`, of the same tenant, is here or on its way: it does not leave."""
        if parent:
            self.orders.of(layout, tenant).hold(parent)

    def release(self, layout: int, parent: bytes, tenant: str = "") -> None:
        """That child is gone, or never came."""
        if parent:
            self.orders.of(layout, tenant).release(parent)

    def take_slots(self, layout: int, parents: Sequence[bytes], tenant: str = "") -> list[int]:
        """A slot for a child of each of `parents`, as far as there is room, in ascending order.

        Each of those parents is held from now on, until `release`, or as long as the child that `publish` puts there. All
        are held before any room is made: what the new blocks hang on must not be what leaves.
        """
        order = self.orders.of(layout, tenant)
        for parent in parents:
            if parent:
                order.hold(parent)
        slots: list[int] = []
        if self.orders.quota(tenant) is None:
            slots = self.slots.take_many(layout, len(parents))
            for each in slots if tenant else ():
                self.orders.take(each, tenant, self.slots.slot_bytes(layout))
        while len(slots) < len(parents) and (slot := self._take_slot(layout, tenant)) is not None:
            slots.append(slot)
        for parent in parents[len(slots) :]:
            self.release(layout, parent, tenant)
        return sorted(slots)

    def free(self, slot: int) -> None:
        """Nobody can touch what stands there, and nobody is to read it."""
        self.orders.give_back(slot, self.slots.bytes_of(slot))
        self.slots.move(slot, FREE)

    def _take_slot(self, layout: int, tenant: str) -> int | None:
        if not self._make_room_in_quota(layout, tenant):
            return None
        slot = self.slots.take(layout)
        while slot is None and self._make_room(layout):
            slot = self.slots.take(layout)
        if slot is not None:
            self.orders.take(slot, tenant, self.slots.slot_bytes(layout))
        return slot

    def _make_room_in_quota(self, layout: int, tenant: str) -> bool:
        """A tenant at his quota evicts his own blocks, of this layout first."""
        quota = self.orders.quota(tenant)
        if quota is None:
            return True
        while self.orders.used_bytes(tenant) + self.slots.slot_bytes(layout) > quota:
            own = self.orders.victim(layout=layout, tenant=tenant) or self.orders.victim(tenant=tenant)
            if own is None:
                return False
            self._evict(own.key)
            self._counters["evictions_over_quota"] += 1
        return True

    def _make_room(self, layout: int) -> bool:
        """Evicts a block of this layout, or takes an extent from a layout whose blocks were used much longer ago."""
        own = self.orders.victim(layout=layout, coming=self.slots.count[WRITING])
        self._evictions += 1
        if own is None or self._evictions % LOOK_AT_OTHERS_EVERY == 0:
            other = self.orders.victim(but=layout)
            if other is not None and other.age > 2 * (own.age if own else 0) and self._take_from(other):
                return True
        if own is not None:
            self._evict(own.key)
            return True
        if self.slots.extents_of(layout):
            return False
        return any(self._take_extent(extent) for extent in self.slots.richest(but=layout))

    def _take_from(self, victim: Victim) -> bool:
        block = self._index.get(victim.key)
        assert block is not None
        return self._take_extent(self.slots.extent_of(block.slot))

    def _take_extent(self, extent: int) -> bool:
        states = [(slot, self.slots.state(slot)) for slot in self.slots.slots_of_extent(extent)]
        if any(state not in (FREE, PUBLISHED) for _, state in states):
            return False
        published = [self._at[slot] for slot, state in states if state is PUBLISHED]
        if any(key in self.pins for key in published):
            return False
        for key in published:
            self._evict(key)
        return self.slots.give_back(extent)

    def _evict(self, key: bytes) -> None:
        block = self._index.get(key)
        assert block is not None
        self._drop(block, evicted=True)
        self._counters["evictions"] += 1

    def _drop(self, block: Block, *, evicted: bool = False) -> None:
        """A published block leaves. Who is copying it right now finds out by its checksum."""
        self._index.remove(block.key)
        order = self.orders.of(block.layout, block.tenant)
        use = order.evict(block.key) if evicted else order.remove(block.key)
        if block.parent:
            order.release(block.parent, use)
        del self._at[block.slot]
        self.free(block.slot)
        self._tell(ChangeKind.REMOVED, block)

    def _tell(self, kind: ChangeKind, block: Block) -> None:
        tokens = self._names[block.layout].block_tokens
        self.changes.append(Change(kind, block.key, block.parent, tokens, block.tenant))

    def _hold_block(self, block: Block) -> None:
        self.hold(block.layout, block.key, block.tenant)

    def _release_block(self, block: Block) -> None:
        self.release(block.layout, block.key, block.tenant)

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the books do not balance. Looks at everything."""
        self.slots.check_integrity()
        self.orders.check_integrity(self.slots.sizes())
        self.pins.check_integrity()
        assert {block.slot: block.key for block in self._index} == self._at
        assert len(self._index) == self.slots.count[PUBLISHED] == sum(map(len, self.orders))

"""Who has which part of the slab: extents given to layouts, slots of one size in them, a state for every slot.

Blocks of several layouts (two models, two block sizes) live side by side. The slab is cut into extents of equal size; a
layout is given one when it needs a slot and has none, and all slots of an extent have that layout's size. An extent whose
slots are all free goes back when another layout needs it. A slot's *number* is its offset in pages
(`limits.SLOT_GRAIN_BYTES`), so numbers of different layouts never meet and a reader needs no table.

A slot is FREE, WRITING (given to the ranks of an engine), PUBLISHED (readers are told of it) or QUARANTINED (its session
is over, but a process that got it has neither reported nor is proven gone). `MOVES` is the whole rule of what may follow
what; who has the right to ask for a move stands in core/sessions and store/node.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from enum import StrEnum

from interlock.core.errors import LocalProtocolError
from interlock.core.limits import SLOT_GRAIN_BYTES


class SlotState(StrEnum):
    """What a slot is used for."""

    FREE = "free"
    WRITING = "writing"
    PUBLISHED = "published"
    QUARANTINED = "quarantined"


FREE, WRITING, PUBLISHED, QUARANTINED = SlotState
MOVES: frozenset[tuple[SlotState, SlotState]] = frozenset({
    (WRITING, PUBLISHED),  # every shard was written and reported, and nobody else can touch it
    (WRITING, FREE),  # the session failed, and everyone who had the slot promised or is gone
    (WRITING, QUARANTINED),  # the session failed, and someone may still write
    (PUBLISHED, FREE),  # evicted, withdrawn, cleared
    (QUARANTINED, FREE),  # the last process that may write promised or is proven gone
})  # fmt: skip
"""What may be asked for by `move`. FREE becomes WRITING by `take` alone."""


class _Class:
    """The slots of one layout."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.free: list[int] = []
        self.extents: list[int] = []


class SlotTable:
    """States of all slots of one slab. `layout` arguments are the small numbers that `add_layout` returned."""

    def __init__(self, slab_bytes: int, *, extents: int = 16) -> None:
        """Raises `ValueError` when the slab has not at least one page an extent."""
        self.total_pages = slab_bytes // SLOT_GRAIN_BYTES
        self.extent_pages = self.total_pages // extents
        if self.extent_pages < 1:
            raise ValueError(
                f"a slab of {slab_bytes} bytes cannot be cut into {extents} extents; give it at least "
                f"{extents * SLOT_GRAIN_BYTES} bytes"
            )
        self._unassigned = list(range(extents - 1, -1, -1))
        self._used = [0] * extents
        self._owner: list[int | None] = [None] * extents
        self._classes: list[_Class] = []
        self._states: dict[int, SlotState] = {}
        self.count: dict[SlotState, int] = dict.fromkeys(SlotState, 0)
        self.bytes: dict[SlotState, int] = dict.fromkeys(SlotState, 0)

    # --- layouts -------------------------------------------------------------------------------------------------

    def add_layout(self, block_bytes: int) -> int:
        """A number for a layout whose blocks have that size. Raises `ValueError` when one does not fit an extent."""
        pages = -(-block_bytes // SLOT_GRAIN_BYTES)
        if pages > self.extent_pages:
            raise ValueError(
                f"a block of {block_bytes} bytes does not fit the slab's extents of "
                f"{self.extent_pages * SLOT_GRAIN_BYTES} bytes; give the store more memory"
            )
        self._classes.append(_Class(pages))
        return len(self._classes) - 1

    def slot_bytes(self, layout: int) -> int:
        """Of one slot of that layout: its block, in whole pages."""
        return self._classes[layout].pages * SLOT_GRAIN_BYTES

    def bytes_of(self, slot: int) -> int:
        """The size of that slot. Raises `KeyError` for a number that is no slot now."""
        self._states[slot]
        owner = self._owner[slot // self.extent_pages]
        assert owner is not None
        return self.slot_bytes(owner)

    @staticmethod
    def offset_bytes(slot: int) -> int:
        """Where that slot begins in the slab."""
        return slot * SLOT_GRAIN_BYTES

    def sizes(self) -> dict[int, int]:
        """The size of every slot that is not free. For checks: it looks at everything."""
        return {slot: self.bytes_of(slot) for slot, state in self._states.items() if state is not FREE}

    def capacity(self, layout: int) -> int:
        """How many blocks the slab could hold if this layout had all of it."""
        return len(self._owner) * (self.extent_pages // self._classes[layout].pages)

    def extents_of(self, layout: int) -> int:
        """How many extents that layout has."""
        return len(self._classes[layout].extents)

    # --- slots ---------------------------------------------------------------------------------------------------

    def state(self, slot: int) -> SlotState:
        """Raises `KeyError` for a number that is no slot now."""
        return self._states[slot]

    def take(self, layout: int) -> int | None:
        """A free slot, now WRITING; takes a free extent if need be. None: the layout's memory is full."""
        cls = self._classes[layout]
        if not cls.free and not self._grow(layout):
            return None
        slot = cls.free.pop()
        self._used[slot // self.extent_pages] += 1
        self._set(slot, layout, WRITING)
        return slot

    def take_many(self, layout: int, count: int) -> list[int]:
        """At most `count` free slots, now WRITING, in ascending order: neighbours are written by one copy."""
        cls = self._classes[layout]
        taken: list[int] = []
        while len(taken) < count and (cls.free or self._grow(layout)):
            some = cls.free[-(count - len(taken)) :]
            del cls.free[-len(some) :]
            taken += some
        for slot in taken:
            self._used[slot // self.extent_pages] += 1
            self._states[slot] = WRITING
        self._account(FREE, -len(taken), self.slot_bytes(layout))
        self._account(WRITING, len(taken), self.slot_bytes(layout))
        return sorted(taken)

    def publish(self, layout: int, slots: Sequence[int]) -> None:
        """Slots of that layout that are WRITING become PUBLISHED. As `move` of each, for all at once."""
        for slot in slots:
            if self._states.get(slot) is not WRITING or self._owner[slot // self.extent_pages] != layout:
                raise LocalProtocolError(
                    f"slot {slot} is {self._states.get(slot)} and cannot become {PUBLISHED} for layout {layout}",
                    slot=slot,
                )
        self._states.update(dict.fromkeys(slots, PUBLISHED))
        self._account(WRITING, -len(slots), self.slot_bytes(layout))
        self._account(PUBLISHED, len(slots), self.slot_bytes(layout))

    def move(self, slot: int, to: SlotState) -> None:
        """Raises `LocalProtocolError`, changing nothing, for a move that is not in `MOVES`."""
        now = self._states.get(slot)
        if now is None or (now, to) not in MOVES:
            raise LocalProtocolError(
                f"slot {slot} is {now or 'no slot'} and cannot become {to}", slot=slot, state=str(now)
            )
        owner = self._owner[slot // self.extent_pages]
        assert owner is not None
        self._set(slot, owner, to)
        if to is FREE:
            self._used[slot // self.extent_pages] -= 1
            self._classes[owner].free.append(slot)

    # --- extents -------------------------------------------------------------------------------------------------

    def slots_of_extent(self, extent: int) -> list[int]:
        """All slots in that extent."""
        owner = self._owner[extent]
        if owner is None:
            return []
        pages = self._classes[owner].pages
        start = extent * self.extent_pages
        return list(range(start, start + self.extent_pages // pages * pages, pages))

    def walk(self, slot: int, limit: int) -> tuple[list[int], int | None]:
        """At most `limit` slots from number `slot` on, in whatever state, and where to go on; None at the end.

        A block that stands at one slot during a whole walk is seen once; extents that change hands may hide or repeat others.
        """
        found: list[int] = []
        for extent in range(max(0, slot) // self.extent_pages, len(self._owner)):
            slots = self.slots_of_extent(extent)
            for each in slots[bisect_left(slots, slot) :]:
                if len(found) == limit:
                    return found, each
                found.append(each)
        return found, None

    def extent_of(self, slot: int) -> int:
        """The extent in which that slot lies."""
        return slot // self.extent_pages

    def richest(self, *, but: int) -> list[int]:
        """The extents of the layout that has most, for another that has none to take one from."""
        owned = [(len(cls.extents), number) for number, cls in enumerate(self._classes) if number != but]
        most, number = max(owned, default=(0, 0))
        return list(self._classes[number].extents) if most else []

    def give_back(self, extent: int) -> bool:
        """Takes an extent from its layout; False when a slot of it is not free. Costs as much as the layout has free slots."""
        owner = self._owner[extent]
        if owner is None or self._used[extent]:
            return owner is None
        cls = self._classes[owner]
        slots = set(self.slots_of_extent(extent))
        cls.free = [slot for slot in cls.free if slot not in slots]
        cls.extents.remove(extent)
        for slot in slots:
            del self._states[slot]
        self._account(FREE, -len(slots), self.slot_bytes(owner))
        self._owner[extent] = None
        self._unassigned.append(extent)
        return True

    def check_integrity(self) -> None:
        """Raises `AssertionError` unless free + writing + published + quarantined == total, in slots and in bytes."""
        counted = dict.fromkeys(SlotState, 0)
        sizes = dict.fromkeys(SlotState, 0)
        for slot, state in self._states.items():
            owner = self._owner[slot // self.extent_pages]
            assert owner is not None
            counted[state] += 1
            sizes[state] += self.slot_bytes(owner)
        assert counted == self.count, (counted, self.count)
        assert sizes == self.bytes
        total = sum(len(self.slots_of_extent(extent)) for extent in range(len(self._owner)))
        assert sum(counted.values()) == total
        free = [slot for cls in self._classes for slot in cls.free]
        assert len(free) == len(set(free)) == counted[FREE]
        assert all(self._states[slot] is FREE for slot in free)
        assert sorted(self._unassigned) == [e for e, owner in enumerate(self._owner) if owner is None]

    def _grow(self, layout: int) -> bool:
        if not self._unassigned:
            return False
        extent = self._unassigned.pop()
        cls = self._classes[layout]
        self._owner[extent] = layout
        cls.extents.append(extent)
        slots = self.slots_of_extent(extent)
        for slot in slots:
            self._states[slot] = FREE
        cls.free.extend(reversed(slots))
        self._account(FREE, len(slots), self.slot_bytes(layout))
        return True

    def _set(self, slot: int, layout: int, to: SlotState) -> None:
        size = self.slot_bytes(layout)
        self._account(self._states[slot], -1, size)
        self._account(to, +1, size)
        self._states[slot] = to

    def _account(self, state: SlotState, slots: int, slot_bytes: int) -> None:
        self.count[state] += slots
        self.bytes[state] += slots * slot_bytes

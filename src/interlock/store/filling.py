"""Verified blocks on their way from staging into slots: the last step of every promotion, from the disk or from a peer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from interlock.core.layouts import KVLayout
from interlock.core.limits import SLOT_GRAIN_BYTES
from interlock.host.base import Host, SharedMemory
from interlock.store.blocks import BlockStore
from interlock.store.checksums import Binding, block_checksums


class Arrived(Protocol):
    """As much of a block, of a pack or of a peer, as its promotion asks for."""

    @property
    def key(self) -> bytes: ...

    @property
    def parent(self) -> bytes: ...


async def fill_slots(
    host: Host,
    store: BlockStore,
    memory: SharedMemory,
    layout: KVLayout,
    arrived: Sequence[tuple[Arrived, memoryview]],
    tenant: str,
    admits: Callable[[bytes], bool],
) -> int:
    """Blocks of one tenant into slots of `store`, in the order of their chain, as far as there is room; how many are published.

    `admits(key)` is asked before a slot is taken and, in the same moment in which the block would be published, again. Raises
    `Refusal` when the slab cannot hold blocks of that layout.
    """
    slab, number = store.slab, store.layout(layout)
    chosen = [
        (block, data)
        for block, data in arrived
        if not store.under_way(block.key) and block.key not in store.shelf and admits(block.key)
    ]
    keys = [block.key for block, _ in chosen]
    slots = store.begin_promotion(number, keys, [block.parent for block, _ in chosen], tenant)
    bindings = [
        Binding(key, slot, slab.node_incarnation, slab.slab) for key, slot in zip(keys, slots, strict=False)
    ]
    sums: list[list[int]] = []
    published = 0
    try:
        sums = await host.in_thread(_rebind_all, layout, [data for _, data in chosen], bindings, memory)
    finally:
        for i, binding in enumerate(bindings):
            good = sums and admits(binding.key)
            published += store.end_promotion(binding.key, sums[i] if good else None)
    return published


def _rebind_all(
    layout: KVLayout, datas: list[memoryview], bindings: list[Binding], slab: SharedMemory
) -> list[list[int]]:
    return [rebind(layout, data, binding, slab) for data, binding in zip(datas, bindings, strict=False)]


def rebind(layout: KVLayout, data: memoryview, binding: Binding, slab: SharedMemory) -> list[int]:
    """Copies a verified block from staging into its new slot; the checksums that bind it there, of the staging's bytes.

    Not of the slot's: whatever else might write there must fail the check, not be blessed by it.
    """
    sums = block_checksums(binding, layout, data)
    slab.write_at(binding.slot * SLOT_GRAIN_BYTES, data)
    return sums

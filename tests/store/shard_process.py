"""A rank that holds a rectangle of layers and heads, in a process of its own; and copies that stop in the middle.

Obeys like `rank_process`, with verbs besides: a copy is begun, its process killed or frozen, and finished or not, as the
test says. Between two answers it stands still: what a test sees then is the middle of the copy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from rank_process import ARGUMENTS, Rank, main

from interlock.store.checksums import verify_block
from interlock.store.client import MatchResult, WriteGrant
from interlock.store.rank_slots import RankSlots


def content(fill: int, head: int, layer: int) -> int:
    """What every byte of that layer of that head is."""
    return (fill + 16 * head + 5 * layer) % 251


class ShardRank(Rank):
    def __init__(self, address: str, attach: Any) -> None:
        super().__init__(address, attach)
        shard = attach.shard
        layout = attach.layout
        self.layers = (shard.layer_start, shard.layer_stop) if shard.area else (0, layout.layers)
        heads = self.heads if shard.area else (0, layout.heads)
        self.slots = RankSlots(layout, *heads, layers=self.layers)
        self._staging = b""

    def write_shard(self, grant: WriteGrant, keys: list[bytes], fill: int) -> list[list[int]]:
        """Fills this rank's rectangle of every granted slot; the checksums."""
        slab = self.client.slab_of(grant.slab)
        assert slab is not None
        staged = self.slots.staging()[: len(grant.grants)]
        for n, item in enumerate(grant.grants):
            for h, head in enumerate(range(self.slots.head_start, self.slots.head_stop)):
                for number, layer in enumerate(range(*self.layers)):
                    staged[n, h, number] = content(fill + item.index, head, layer)
        chosen = [keys[item.index] for item in grant.grants]
        return self.slots.put(slab, chosen, [item.slot for item in grant.grants], staged)

    def read_shard(self, match: MatchResult, keys: list[bytes], fill: int) -> list[bool]:
        """Whether each block is, byte for byte, what `write_shard` of that fill wrote; false for a miss as well."""
        slab = self.client.slab_of(match.slab)
        if slab is None:
            return [False] * len(keys)
        count = len(match.locations)
        part, good = self.slots.fetch(slab, keys, match.locations, self.slots.arrivals(), range(count))
        right = []
        for n in range(count):
            wanted = [
                [content(fill + n, head, layer) for layer in range(*self.layers)]
                for head in range(self.slots.head_start, self.slots.head_stop)
            ]
            right.append(n in good and bool((part[n] == np.array(wanted, dtype=np.uint8)[..., None]).all()))
        return right

    def begin_copy(self, grant: WriteGrant, value: int) -> int:
        """Writes the first half of the first granted slot; how many bytes."""
        slab = self.client.slab_of(grant.slab)
        assert slab is not None
        block = slab.block(grant.grants[0].slot)
        half = len(block) // 2
        block[:half] = bytes([value]) * half
        return half

    def finish_copy(self, grant: WriteGrant, value: int) -> bool:
        """Writes the second half, wherever that is by now."""
        slab = self.client.slab_of(grant.slab)
        if slab is None:
            return False
        block = slab.block(grant.grants[0].slot)
        half = len(block) // 2
        block[half:] = bytes([value]) * (len(block) - half)
        return True

    def begin_read(self, match: MatchResult) -> int:
        """Copies the first half of the first block out of its slot."""
        slab = self.client.slab_of(match.slab)
        assert slab is not None
        block = slab.block(match.locations[0].slot)
        self._staging = bytes(block[: len(block) // 2])
        return len(self._staging)

    def finish_read(self, match: MatchResult, keys: list[bytes]) -> bool:
        """Copies the second half and checks the whole: whether it can be believed."""
        slab = self.client.slab_of(match.slab)
        if slab is None:
            return False
        where = match.locations[0]
        block = slab.block(where.slot)
        whole = self._staging + bytes(block[len(self._staging) :])
        binding = slab.binding(keys[0], where.slot)
        return verify_block(binding, self.attach.layout, whole, where.checksums, cuts=where.cuts)

    def slot_holds(self, slab: int, slot: int, value: int) -> bool:
        memory = self.client.slab_of(slab)
        assert memory is not None
        return value in bytes(memory.block(slot))


ARGUMENTS |= {
    "write_shard": tuple[WriteGrant, list[bytes], int],
    "read_shard": tuple[MatchResult, list[bytes], int],
    "begin_copy": tuple[WriteGrant, int],
    "finish_copy": tuple[WriteGrant, int],
    "begin_read": tuple[MatchResult],
    "finish_read": tuple[MatchResult, list[bytes]],
    "slot_holds": tuple[int, int, int],
}

if __name__ == "__main__":
    main(ShardRank)

"""Blocks that wait to be written: in the order they were published, within exact bounds, in batches of one layout.

The queue holds no bytes, only names: the bytes stay in the slab, and what leaves it before its turn is simply not written. So
offering a block costs a dictionary entry, and refusing one is known at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from interlock.core import limits
from interlock.core.prefixes import Block


class _Waiting(msgspec.Struct):
    block: Block
    bytes: int
    since_s: float


class WriteQueue:
    """Of at most `blocks_max` blocks and `bytes_max` bytes."""

    def __init__(self, bytes_max: int, blocks_max: int = limits.DISK_QUEUE_BLOCKS_MAX) -> None:
        self._bytes_max, self._blocks_max = bytes_max, blocks_max
        self._waiting: OrderedDict[bytes, _Waiting] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: object) -> bool:
        return key in self._waiting

    def offer(self, block: Block, size: int, now_s: float) -> bool:
        """False: there is no room for it. A block that waits already is taken at its newer place in the slab."""
        known = self._waiting.get(block.key)
        if known is not None:
            known.block = block
            return True
        if len(self._waiting) >= self._blocks_max or self.bytes + size > self._bytes_max:
            return False
        self._waiting[block.key] = _Waiting(block, size, now_s)
        self.bytes += size
        return True

    def due_s(self) -> float | None:
        """When the oldest has waited long enough; None when nothing waits."""
        first = next(iter(self._waiting.values()), None)
        return None if first is None else first.since_s + limits.DISK_FLUSH_SECONDS

    def full_batch(self) -> bool:
        """Enough waits for a whole pack."""
        return self.bytes >= limits.DISK_PACK_BYTES

    def take(self, still_there: Callable[[Block], bool]) -> tuple[list[Block], int]:
        """The oldest block and those of its layout that fit into a pack with it; how many had left RAM before."""
        batch: list[Block] = []
        lost = size = 0
        layout: int | None = None
        for key, waiting in list(self._waiting.items()):
            block = waiting.block
            if not still_there(block):
                self.drop(key)
                lost += 1
                continue
            if layout is None:
                layout = block.layout
            if block.layout != layout:
                continue
            if batch and (
                size + waiting.bytes > limits.DISK_PACK_BYTES or len(batch) >= limits.DISK_PACK_BLOCKS_MAX
            ):
                break
            self.drop(key)
            batch.append(block)
            size += waiting.bytes
        return batch, lost

    def drop(self, key: bytes) -> None:
        """That block waits no more; nothing if it did not."""
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
            self.bytes -= waiting.bytes

    def drop_all(self, wanted: Callable[[Block], bool]) -> None:
        """Those that are `wanted` wait no more."""
        for key in [key for key, waiting in self._waiting.items() if wanted(waiting.block)]:
            self.drop(key)

    def clear(self) -> None:
        """Nothing waits any more."""
        self._waiting.clear()
        self.bytes = 0

    def check_integrity(self) -> None:
        assert self.bytes == sum(waiting.bytes for waiting in self._waiting.values()) <= self._bytes_max

"""Which blocks leave the disk first: a hand goes round the packs, oldest first, and spares what is used or still needed.

What can go wrong. Blocks are of use only together with all before them, so a block whose child stays must stay. And a pack is a
file: throwing away the oldest *file* throws away the system prompt that everybody uses, because it was written first.

CLOCK (Corbató 1968; FIFO with reinsertion) over packs: each visit evicts the blocks that were not used since the last one and on
which nothing hangs, and the pack goes to the end of the queue with what is left. A pack is gone when nothing is. No order over
blocks is kept: at 10⁶ blocks that would be the index over again. Within a pack what hangs on what stands in its table of
contents; between packs it is counted (`holds`), by the first words of the parent's key, so a count too many spares a block
one round longer and nothing else. When a whole round gives nothing, everything may leave.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence

import msgspec

from interlock.store.packs.format import PackBlock, Toc

_HOLD_BYTES = 8


class Pack(msgspec.Struct):
    """What the books say of one pack. `bytes` is what it takes on the disk."""

    number: int
    size_bytes: int
    bytes: int
    visited: int
    """The clock at the hand's last visit, in pack numbers: what was used later is spared."""
    live: int = 0
    scanned: bool = False
    """Its table of contents was read in this life: `live` and `bytes` are exact, its holds are counted."""
    bad: int = 0
    """Blocks of it that failed their check."""


class PackClock:
    """All packs, in the order of the hand, and what they take."""

    def __init__(self) -> None:
        self._packs: OrderedDict[int, Pack] = OrderedDict()
        self._holds: Counter[bytes] = Counter()
        self._fruitless = 0
        """Visits in a row that gave nothing."""
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._packs)

    def __contains__(self, number: object) -> bool:
        return number in self._packs

    def numbers(self) -> list[int]:
        """All packs, the one that is visited next first."""
        return list(self._packs)

    def get(self, number: int) -> Pack | None:
        """The pack of that number, or None."""
        return self._packs.get(number)

    def add(self, pack: Pack) -> None:
        """A pack is there, at the end of the queue."""
        assert pack.number not in self._packs
        self._packs[pack.number] = pack
        self.bytes += pack.bytes

    def remove(self, number: int) -> None:
        """A pack is gone."""
        self.bytes -= self._packs.pop(number).bytes

    def resize(self, pack: Pack, size: int) -> None:
        """It takes that many bytes on the disk from now on. Nothing when it left while its file was being changed."""
        if self._packs.get(pack.number) is pack:
            self.bytes += size - pack.bytes
            pack.bytes = size

    # --- what hangs on what ----------------------------------------------------------------------------------------

    def hold_parents(self, toc: Toc, ordinals: Collection[int]) -> None:
        """These blocks of the pack are there: their parents in other packs should stay."""
        for parent in _parents_elsewhere(toc, ordinals):
            self._holds[parent] += 1

    def release_parents(self, toc: Toc, ordinals: Collection[int]) -> None:
        """These blocks of the pack have left: they hold their parents no more."""
        for parent in _parents_elsewhere(toc, ordinals):
            if self._holds[parent] > 1:
                self._holds[parent] -= 1
            else:
                del self._holds[parent]

    # --- the hand --------------------------------------------------------------------------------------------------

    def next(self) -> Pack | None:
        """The pack that is visited next."""
        return next(iter(self._packs.values()), None)

    def victims(self, toc: Toc, live: Sequence[int], used: dict[int, int]) -> list[int]:
        """The ordinals that leave, last first. `used`: when each block was last used, those that are in the index."""
        pack = self._packs[toc.number]
        force = self._fruitless > len(self._packs)
        blocks = {block.ordinal: block for block in toc.blocks}
        needed: set[bytes] = set()
        leaving = []
        for ordinal in reversed(live):
            block = blocks[ordinal]
            if ordinal not in used:  # the index has it elsewhere: dead weight
                leaving.append(ordinal)
                continue
            wanted = used[ordinal] > pack.visited or _short(block.key) in self._holds
            if not force and (wanted or block.key in needed):
                needed.add(block.parent)
            else:
                leaving.append(ordinal)
        return leaving

    def visited(self, number: int, clock: int, gave: bool) -> None:
        """The hand goes on."""
        self._fruitless = 0 if gave else self._fruitless + 1
        pack = self._packs.get(number)
        if pack is not None:
            pack.visited = clock
            self._packs.move_to_end(number)


def _short(key: bytes) -> bytes:
    return key[:_HOLD_BYTES]


def _parents_elsewhere(toc: Toc, ordinals: Collection[int]) -> list[bytes]:
    chosen: list[PackBlock] = [block for block in toc.blocks if block.ordinal in ordinals]
    inside = {block.key for block in toc.blocks}
    return [_short(block.parent) for block in chosen if block.parent and block.parent not in inside]

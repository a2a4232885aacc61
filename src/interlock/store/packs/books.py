"""What the node knows of its packs: the mapped index, the clock, tables of contents. No I/O; the loop's alone.

The truth about a block is in its pack's table of contents and sidecar. Here every change of it is written down *before* the
file is changed where the block leaves, and *after* where it comes: who looks in between finds less than there is, never more.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from weakref import WeakValueDictionary

import msgspec

from interlock.core.limits import DISK_TOCS_KEPT_MAX
from interlock.store.changes import DISK, Change, ChangeKind, ChangeLog
from interlock.store.packs.clock import Pack, PackClock
from interlock.store.packs.files import PackFile
from interlock.store.packs.format import PackBlock, Toc
from interlock.store.packs.index import Numbers, PackIndex


class Contents(msgspec.Struct, eq=False, weakref=True):
    """A table of contents with what has left since. `gone` only grows. There is one of each pack at a time."""

    toc: Toc
    gone: set[int]
    by_key: dict[bytes, PackBlock]
    unrecorded: set[int] = msgspec.field(default_factory=set)
    """Of `gone` those that the disk does not know of yet: the next life would find them."""
    changing: asyncio.Lock = msgspec.field(default_factory=asyncio.Lock)
    """Held while the pack's file is being changed."""

    @classmethod
    def of(cls, toc: Toc, gone: Iterable[int]) -> Contents:
        """From what was read of the pack's file."""
        return cls(toc, set(gone), {block.key: block for block in toc.blocks})

    def live(self) -> list[int]:
        """Ordinals of the blocks that have not left."""
        return [block.ordinal for block in self.toc.blocks if block.ordinal not in self.gone]


class Books:
    """Packs by number, blocks by key."""

    def __init__(self, index: PackIndex, changes: ChangeLog | None = None) -> None:
        """`changes`: told which blocks came to the disk in this life, and which left it. What was there before is no change."""
        self.index = index
        self._changes = changes
        self.packs = PackClock()
        self.counters: Counter[str] = Counter()
        self._contents: OrderedDict[int, Contents] = OrderedDict()
        self._in_hand: WeakValueDictionary[int, Contents] = WeakValueDictionary()
        """Also those that were forgotten while somebody works with them: a second one would not know what left the first."""
        self._log: list[tuple[list[bytes], int, list[int]]] | None = None
        """Changes of the index while another is built in a thread; no ordinals: removed."""
        self._next = 1

    # --- packs -----------------------------------------------------------------------------------------------------

    @property
    def now(self) -> int:
        """The clock of use: it stands above every pack, so that what is asked for once is used after it was written."""
        return self._next

    def adopt(self, files: Sequence[PackFile]) -> None:
        """Packs found at start, by name and size alone."""
        for file in files:
            self.packs.add(Pack(file.number, file.size_bytes, file.allocated_bytes, visited=file.number))
            self._next = max(self._next, file.number + 1)

    def take_number(self) -> int:
        """The next pack's number; none is used twice in a directory."""
        self._next += 1
        return self._next - 1

    def added(self, toc: Toc) -> None:
        """A pack was published."""
        everything = [block.ordinal for block in toc.blocks]
        pack = Pack(toc.number, toc.size_bytes, toc.size_bytes, visited=toc.number, live=len(everything))
        pack.scanned = True
        self.packs.add(pack)
        self.keep(Contents.of(toc, ()))
        self._add_keys([block.key for block in toc.blocks], toc.number, everything)
        self.packs.hold_parents(toc, everything)
        self._tell_stored(toc.blocks, toc)

    def scanned(self, contents: Contents) -> None:
        """A pack's contents were read for the first time in this life: what the index lacks is put back.

        A block that stands in another pack as well stays where the index has it; this one is dead weight and leaves first.
        """
        toc = contents.toc
        pack = self.packs.get(toc.number)
        if pack is None or pack.scanned:
            return
        pack.scanned = True
        live = contents.live()
        pack.live = len(live)
        blocks = {block.ordinal: block.key for block in toc.blocks}
        keys = [blocks[ordinal] for ordinal in live]
        _, where = self.index.find(keys)
        absent = [i for i, number in enumerate(where) if int(number) not in self.packs]
        if absent:
            self._add_keys([keys[i] for i in absent], toc.number, [live[i] for i in absent])
            self.counters["repaired"] += len(absent)
            chosen = {live[i] for i in absent}
            self._tell_stored([block for block in toc.blocks if block.ordinal in chosen], toc)
        mine = self.used_of(toc, live)
        self.packs.hold_parents(toc, mine.keys())

    def forget_pack(self, number: int) -> None:
        """It is gone, or no pack. Its records in the index name a pack that is not here, so nobody finds them."""
        pack = self.packs.get(number)
        if self._changes is not None and pack is not None and (pack.live or not pack.scanned):
            self._tell_removed(self.index.keys_in(number))
        self.packs.remove(number)
        self._contents.pop(number, None)
        self._in_hand.pop(number, None)

    # --- contents --------------------------------------------------------------------------------------------------

    def keep(self, contents: Contents) -> None:
        """Keeps the contents in memory; those used longest ago are let go of."""
        self._in_hand[contents.toc.number] = self._contents[contents.toc.number] = contents
        self._contents.move_to_end(contents.toc.number)
        if len(self._contents) > DISK_TOCS_KEPT_MAX:
            self._contents.popitem(last=False)

    def contents(self, number: int) -> Contents | None:
        """The pack's contents, if somebody has them in memory."""
        known = self._in_hand.get(number)
        if known is not None:
            self.keep(known)
        return known

    # --- blocks ----------------------------------------------------------------------------------------------------

    def where(self, keys: Sequence[bytes]) -> tuple[Numbers, list[int]]:
        """(row of each key in the index, its pack or 0)."""
        rows, numbers = self.index.find(keys)
        return rows, [int(number) if int(number) in self.packs else 0 for number in numbers]

    def __contains__(self, key: bytes) -> bool:
        return self.where([key])[1] != [0]

    def touch(self, rows: Numbers) -> None:
        """The blocks at these rows of the index are used now."""
        self.index.touch(rows, self.now)

    def used_of(self, toc: Toc, ordinals: Collection[int]) -> dict[int, int]:
        """Of these blocks those that the index has in this pack, and when each was last used."""
        blocks = [block for block in toc.blocks if block.ordinal in ordinals]
        rows, numbers = self.index.find([block.key for block in blocks])
        here = [i for i, number in enumerate(numbers) if number == toc.number]
        places, used = self.index.ordinals_of(rows[here]), self.index.used_of(rows[here])
        return {
            place: int(when)
            for i, place, when in zip(here, places, used, strict=True)
            if place == blocks[i].ordinal
        }

    def leave(self, contents: Contents, ordinals: Collection[int]) -> None:
        """These blocks are not to be found any more."""
        toc = contents.toc
        mine = self.used_of(toc, ordinals)
        self._remove_keys([block.key for block in toc.blocks if block.ordinal in mine], toc.number)
        fresh = set(ordinals) - contents.gone
        contents.gone |= fresh
        pack = self.packs.get(toc.number)
        if pack is not None and pack.scanned:
            self.packs.release_parents(toc, mine.keys())
            pack.live -= len(fresh)

    def forget(self, key: bytes) -> None:
        """The index was wrong about it."""
        rows, numbers = self.index.find([key])
        if rows[0] >= 0:
            self._remove_keys([key], int(numbers[0]))

    def clear(self) -> list[int]:
        """Everything leaves; the packs that there were."""
        numbers = self.packs.numbers()
        self.index.clear()
        if self._changes is not None:
            self._changes.cut()
        if self._log is not None:
            self._log = []
        self.packs = PackClock()
        self._contents.clear()
        self._in_hand.clear()
        return numbers

    # --- growth of the index ---------------------------------------------------------------------------------------

    def begin_rebuild(self) -> PackIndex:
        """The index that is to be copied; from here on its changes are noted for `end_rebuild`."""
        self._log = []
        return self.index

    def end_rebuild(self, index: PackIndex) -> None:
        """The new index takes over, with what changed meanwhile."""
        log, self._log = self._log or [], None
        self.index.release()
        self.index = index
        for keys, number, ordinals in log:
            if ordinals:
                index.add(keys, number, ordinals, number)
            else:
                index.remove_keys(keys, number)

    def _add_keys(self, keys: list[bytes], number: int, ordinals: list[int]) -> None:
        self.index.add(keys, number, ordinals, number)
        if self._log is not None:
            self._log.append((keys, number, ordinals))

    def _remove_keys(self, keys: list[bytes], number: int) -> None:
        gone = self.index.remove_keys(keys, number)
        if number in self.packs:
            self._tell_removed(gone)
        if self._log is not None and keys:
            self._log.append((keys, number, []))

    # --- what followers are told -----------------------------------------------------------------------------------

    def listed(self, contents: Contents) -> list[Change]:
        """Its blocks that are to be found, as changes: for who has not followed so far."""
        mine = self.used_of(contents.toc, contents.live())
        return _stored([block for block in contents.toc.blocks if block.ordinal in mine], contents.toc)

    def _tell_stored(self, blocks: Sequence[PackBlock], toc: Toc) -> None:
        if self._changes is not None:
            self._changes.extend(_stored(blocks, toc))

    def _tell_removed(self, keys: Sequence[bytes]) -> None:
        if self._changes is not None:
            self._changes.extend([Change(ChangeKind.REMOVED, key, b"", 0, medium=DISK) for key in keys])

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the books do not balance. Looks at everything."""
        packs = [self.packs.get(number) for number in self.packs.numbers()]
        assert self.packs.bytes == sum(pack.bytes for pack in packs if pack is not None)
        for contents in list(self._in_hand.values()):
            pack = self.packs.get(contents.toc.number)
            if pack is not None and pack.scanned:
                assert pack.live == len(contents.live()), contents.toc.number


def _stored(blocks: Sequence[PackBlock], toc: Toc) -> list[Change]:
    tokens = toc.layout.block_tokens
    return [
        Change(ChangeKind.STORED, block.key, block.parent, tokens, block.tenant, DISK) for block in blocks
    ]

"""Which key lies in which pack: a table of 64-byte records in a mapped file, asked without being loaded.

What can go wrong. An index that is loaded at start makes a restart as slow as it is large: headers of 10⁶ blocks take
seconds (hazards x9). An index that is mapped can be torn by a power cut, be older than the packs, or name packs that are
gone. So a record is a *hint*, never the truth: it carries a check over its words, a torn or stale one is as if it were
not there, and who follows it asks the pack's own table of contents whether that block is there still and the checksums
whether its bytes are. A lost record costs a hit until the scan behind the start has put it back (`packs/scan`). Nothing here
is ever synced.

Open addressing, linear probing, a power of two of records, at most `LOAD` of them used. All questions take many keys and are
answered by numpy: a thousand keys among a million take a few hundred microseconds, most of it cache misses. Not thread-safe:
the node's loop owns it, but `rebuilt` works on a copy and may run in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from interlock.core.prefixes import KEY_BYTES

RECORD = np.dtype([("key", "<u8", 4), ("pack", "<u4"), ("ordinal", "<u4"), ("used", "<u4"), ("pad", "<u4"), ("check", "<u8"),
                   ("more", "<u8")])  # fmt: skip
"""`used` is when it was last asked for (a pack's number); it may change any time and is outside the check."""
RECORD_BYTES = RECORD.itemsize
LOAD = 0.7
EMPTY, DELETED = 0, 0xFFFF_FFFF
"""Instead of a pack number."""
_FIRST_KEYS = 64
_MULTIPLIER = np.uint64(0x9E37_79B9_7F4A_7C15)
_SHIFT = np.uint64(29)
_SALT = np.uint64(0x1A7E_510C_4B10_C4E5)

Numbers = npt.NDArray[Any]


def key_words(keys: Sequence[bytes]) -> Numbers:
    """Keys as rows of four words."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(len(keys), KEY_BYTES // 8)


def _check(words: Numbers, packs: Numbers, ordinals: Numbers) -> Numbers:
    """A mix over everything that must not be torn: any changed word changes it."""
    value = np.full(len(words), _SALT)
    place = packs.astype("<u8") << np.uint64(32) | ordinals.astype("<u8")
    for word in (words[:, 0], words[:, 1], words[:, 2], words[:, 3], place):
        value = (value ^ word) * _MULTIPLIER
        value ^= value >> _SHIFT
    return value


class PackIndex:
    """A table over `memory`, which is a whole power of two of records."""

    def __init__(self, memory: memoryview) -> None:
        self._table: Numbers = np.frombuffer(memory, dtype=RECORD)
        self.records = len(self._table)
        if self.records & (self.records - 1) or not self.records:
            raise ValueError(f"an index of {self.records} records; it must be a power of two")
        self._mask = np.uint64(self.records - 1)
        self._keys, self._packs = self._table["key"], self._table["pack"]
        self.taken = 0
        """Records that are not EMPTY, as far as this life knows (`count` counts them)."""

    def release(self) -> None:
        """Lets go of the memory, so that it can be unmapped."""
        self._table = self._keys = self._packs = np.zeros(0, dtype=RECORD)

    @property
    def size_bytes(self) -> int:
        return self.records * RECORD_BYTES

    def count(self, start: int = 0, stop: int | None = None) -> int:
        """Records of that range that are not EMPTY. Touches them all."""
        return int(np.count_nonzero(self._packs[start:stop]))

    # --- questions -------------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes]) -> tuple[Numbers, Numbers]:
        """(row of each key or -1, pack number of each or 0)."""
        if not keys:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype="<u4")
        words = key_words(keys)
        rows = np.full(len(keys), -1, dtype=np.int64)
        at = (words[:, 0] & self._mask).astype(np.int64)
        open_ = np.arange(len(keys))
        for _ in range(self.records):
            packs = self._packs[at]
            same = (self._keys[at] == words[open_]).all(axis=1) & (packs != EMPTY) & (packs != DELETED)
            rows[open_[same]] = at[same]
            going = ~same & (packs != EMPTY)
            if not going.any():
                break
            open_, at = open_[going], (at[going] + 1) & int(self._mask)
        found = rows >= 0
        at = rows[found]
        good = _check(self._keys[at], self._packs[at], self._table["ordinal"][at]) == self._table["check"][at]
        rows[np.flatnonzero(found)[~good]] = -1
        return rows, np.where(rows >= 0, self._packs[rows], 0)

    def prefix(self, keys: Sequence[bytes]) -> Numbers:
        """Rows of the first keys, up to the first that is not here. Few are asked first: most misses are early ones."""
        first, _ = self.find(keys[:_FIRST_KEYS])
        parts = [first]
        if len(first) == _FIRST_KEYS and (first >= 0).all():
            parts.append(self.find(keys[_FIRST_KEYS:])[0])
        rows = np.concatenate(parts)
        missing = np.flatnonzero(rows < 0)
        return rows[: missing[0]] if len(missing) else rows

    def packs_of(self, rows: Numbers) -> list[int]:
        """Pack numbers of these rows."""
        return [int(number) for number in self._packs[rows]]

    def ordinals_of(self, rows: Numbers) -> list[int]:
        """Places in their packs of the blocks at these rows."""
        return [int(number) for number in self._table["ordinal"][rows]]

    def used_of(self, rows: Numbers) -> Numbers:
        """When the blocks at these rows were last used, in pack numbers."""
        used: Numbers = self._table["used"][rows]
        return used

    # --- changes ---------------------------------------------------------------------------------------------------

    def touch(self, rows: Numbers, now: int) -> None:
        """The blocks at these rows are used at `now`."""
        self._table["used"][rows] = now

    def add(self, keys: Sequence[bytes], pack: int, ordinals: Sequence[int], now: int) -> None:
        """These keys, each once, are at these places of `pack` from now on.

        The caller has seen to it that there is room (`packs/growth`).
        """
        if not keys:
            return
        words, where = key_words(keys), np.asarray(ordinals, dtype="<u4")
        rows, _ = self.find(keys)
        fresh = np.flatnonzero(rows < 0)
        home = (words[fresh, 0] & self._mask).astype(np.int64)
        # Most places are free: those are taken at once, the first of several keys that want one and the rest singly.
        _, first = np.unique(home, return_index=True)
        first = first[self._packs[home[first]] == EMPTY]
        rows[fresh[first]] = home[first]
        self._packs[home[first]] = pack
        self.taken += len(first)
        for i in np.flatnonzero(rows < 0):
            rows[i] = at = self._free(int(words[i, 0]), words[i])
            self._packs[at] = pack
            self._keys[at] = words[i]
        self._keys[rows], self._packs[rows] = words, pack
        self._table["ordinal"][rows], self._table["used"][rows] = where, now
        self._table["check"][rows] = _check(words, np.full(len(words), pack, dtype="<u4"), where)

    def _free(self, hashed: int, word: Numbers) -> int:
        """Where a key goes that `find` did not see: over a torn record of its own, a deleted one, or at the end."""
        at, chosen = hashed & int(self._mask), -1
        for _ in range(self.records):
            pack = int(self._packs[at])
            if pack not in (EMPTY, DELETED) and (self._keys[at] == word).all():
                return at
            if pack == DELETED and chosen < 0:
                chosen = at
            if pack == EMPTY:
                if chosen < 0:
                    self.taken += 1
                    chosen = at
                return chosen
            at = (at + 1) & int(self._mask)
        if chosen < 0:
            raise ValueError("the index is full; whoever adds makes room first")
        return chosen

    def remove(self, rows: Numbers) -> None:
        """Forgets these rows."""
        self._packs[rows] = DELETED

    def remove_keys(self, keys: Sequence[bytes], pack: int) -> list[bytes]:
        """Forgets those that stand in that pack; which they were."""
        rows, packs = self.find(keys)
        mine = packs == pack
        self.remove(rows[mine])
        return [keys[i] for i in np.flatnonzero(mine)]

    def keys_in(self, pack: int) -> list[bytes]:
        """The keys that stand in that pack. Looks at the whole table."""
        rows: Numbers = np.flatnonzero(self._packs == pack)
        good = (
            _check(self._keys[rows], self._packs[rows], self._table["ordinal"][rows])
            == self._table["check"][rows]
        )
        return [row.tobytes() for row in self._keys[rows[good]]]

    def clear(self) -> None:
        """Forgets everything."""
        self._table[:] = np.zeros(1, dtype=RECORD)
        self.taken = 0

    def forget_others(self, packs: Numbers, start: int, stop: int) -> int:
        """Removes the records of rows [start, stop) whose pack is not one of `packs`; how many."""
        here = self._packs[start:stop]
        stale: Numbers = np.flatnonzero((here != EMPTY) & (here != DELETED) & ~np.isin(here, packs))
        here[stale] = DELETED
        return len(stale)

    # --- growth ----------------------------------------------------------------------------------------------------

    def snapshot(self, packs: Numbers | None = None) -> Numbers:
        """A copy of the records that are whole and, if `packs` are given, name one of those."""
        used: Numbers = self._table[(self._packs != EMPTY) & (self._packs != DELETED)]
        good = _check(used["key"], used["pack"], used["ordinal"]) == used["check"]
        if packs is not None:
            good &= np.isin(used["pack"], packs)
        whole: Numbers = used[good]
        return whole

    def fill(self, records: Numbers) -> None:
        """Puts whole records into this table, which is empty: a million in less than a second."""
        at = (records["key"][:, 0] & self._mask).astype(np.int64)
        left = np.arange(len(records))
        while len(left):
            # Of those that want one place the first gets it; who finds a place taken goes on to the next.
            free = self._packs[at] == EMPTY
            places, first = np.unique(at[free], return_index=True)
            winners = np.flatnonzero(free)[first]
            self._table[places] = records[left[winners]]
            lost = np.ones(len(left), dtype=bool)
            lost[winners] = False
            left, at = left[lost], (at[lost] + 1) & int(self._mask)
        self.taken = len(records)

    def check_integrity(self) -> None:
        """Raises `AssertionError` when a record cannot be found by its key, or the count is wrong."""
        used = self.snapshot()
        assert self.taken == self.count(), (self.taken, self.count())
        rows, _ = self.find([row.tobytes() for row in used["key"]])
        assert (rows >= 0).all(), "a record that no look-up finds"

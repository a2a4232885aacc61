"""The index's file: mapped at start, made anew, twice as large or cleaned of what was deleted, before it is too full to be quick.

The new table is built in a thread from a copy while the old one serves; what changes meanwhile is said again to the new one
(`Books.end_rebuild`). Its file takes the old one's name by rename and is never synced: a torn record is as if it were not there.
Where the disk has no room for a larger file the table lives in plain memory, until the next start or the next doubling.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap

import numpy as np

from interlock.host.base import Directory, FileMapping, Host
from interlock.store.packs.books import Books
from interlock.store.packs.index import LOAD, RECORD_BYTES, Numbers, PackIndex

INDEX = "index"


class IndexFile:
    """The mapped table of one open directory."""

    def __init__(self, host: Host, directory: Directory, incarnation: int, records_min: int) -> None:
        self._host, self._directory = host, directory
        self._temporary = f"{INDEX}.{incarnation}.tmp"
        self._records_min = records_min
        self._mapping: FileMapping | None = None
        self._lock = asyncio.Lock()
        self.rebuilt = 0

    def open(self) -> PackIndex:
        """Blocks. The table that was there; a new one where there was none, or one of an impossible size. Raises `OSError`."""
        size = self._directory.size(INDEX) or 0
        records = size // RECORD_BYTES
        if size % RECORD_BYTES or records < self._records_min or records & (records - 1):
            self._directory.remove(INDEX)  # none, torn or foreign: the scan fills another
            size = self._records_min * RECORD_BYTES
        self._mapping = self._directory.map(INDEX, size)
        self._mapping.warm()
        return PackIndex(self._mapping.view)

    async def make_room(self, books: Books, count: int) -> None:
        """Until `count` more keys can be added to the index of `books`."""
        async with self._lock:
            while books.index.taken + count > LOAD * books.index.records:
                old = books.begin_rebuild()
                known = np.array(books.packs.numbers(), dtype="<u4")
                mapping, index = await self._host.in_thread(self._rebuild, old, known, count)
                books.end_rebuild(index)
                before, self._mapping = self._mapping, mapping
                if before is not None:
                    before.close()
                self.rebuilt += 1

    def _rebuild(self, old: PackIndex, known: Numbers, count: int) -> tuple[FileMapping | None, PackIndex]:
        used = old.snapshot(known)
        records = self._records_min
        while len(used) + count > LOAD / 2 * records:
            records *= 2
        size = records * RECORD_BYTES
        try:
            self._directory.remove(self._temporary)
            mapping = self._directory.map(self._temporary, size)
        except OSError:
            index = PackIndex(memoryview(mmap.mmap(-1, size)))
            index.fill(used)
            return None, index
        index = PackIndex(mapping.view)
        index.fill(used)
        with contextlib.suppress(
            OSError
        ):  # it serves as it is; the next start finds the old one and repairs it
            self._directory.rename(self._temporary, INDEX)
        return mapping, index

    def close(self) -> None:
        """Unmaps it once nobody looks into it."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None

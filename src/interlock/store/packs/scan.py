"""Behind the start: every pack is read once, the index is put right, and what failed meanwhile is tried again.

A restart hits before any of this: the index is mapped and the directory listed. The scan goes in slices, between which look-ups are
answered. Then it stays, as the keeper: it looks at packs that could not be read, probes a disk that failed its readers, and keeps
the bound where packs came back with a power cut or could not be deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from interlock.core import limits
from interlock.store.packs.format import BadPackError
from interlock.store.packs.staging import StagingFull
from interlock.store.packs.state import DiskState
from interlock.store.packs.writer import Writer

ROWS = 65536
PACKS = 64
"""Looked at between two pauses."""
PAUSE_SECONDS = 0.001


class Scan:
    """Of one directory, just opened. `counted` is called when writers may begin."""

    def __init__(self, state: DiskState, writer: Writer, counted: Callable[[], None]) -> None:
        self._state, self._writer, self._counted = state, writer, counted
        self.done = asyncio.Event()
        """Every pack that was there at start has been looked at, or cannot be read now."""

    async def run(self) -> None:
        """Puts the index right, then keeps watch. Until cancelled."""
        await self._count()
        self._counted()
        await self._read_packs()
        await self._forget_stale()
        self.done.set()
        while True:
            await self._state.host.clock.sleep_s(limits.DISK_FLUSH_SECONDS)
            if self._writer.over_bytes() > 0:
                await self._writer.make_room()
            await self._probe_reads()
            await self._probe_writes()
            for number, condemned in list(self._state.condemned.items()):
                await self._state.discard(number, condemned)
            await self._read_packs()

    async def _count(self) -> None:
        """How full the index is: before that is known nothing is added."""
        index, taken = self._state.books.index, 0
        for start in range(0, index.records, ROWS):
            taken += index.count(start, start + ROWS)
            await self._state.host.clock.sleep_s(0)
        index.taken = taken

    async def _read_packs(self) -> None:
        state, packs = self._state, self._state.books.packs
        for i, number in enumerate(packs.numbers()):
            pack = state.books.packs.get(number)
            if pack is not None and not pack.scanned and not state.reads.wait_s(state.now_s()):
                await state.contents(number)
                if i % PACKS == PACKS - 1:
                    await state.host.clock.sleep_s(PAUSE_SECONDS)

    async def _forget_stale(self) -> None:
        """Records that name packs which are gone: nobody follows them, and they crowd the table."""
        state, index = self._state, self._state.books.index
        for start in range(0, index.records, ROWS):
            if state.books.index is not index:  # rebuilt meanwhile, and cleaned some other time
                return
            known = np.array(state.books.packs.numbers(), dtype="<u4")
            state.counters["stale"] += index.forget_others(known, start, start + ROWS)
            await state.host.clock.sleep_s(0)

    async def _probe_writes(self) -> None:
        """Nothing may wait to be written, and still somebody wants to know whether the disk works again."""
        state = self._state
        if state.writes.state == "ok" or state.writes.wait_s(state.now_s()):
            return
        try:
            await state.host.in_thread(state.files.probe)
        except StagingFull:
            return
        except OSError as error:
            state.failed(state.writes, "writing", error)
        else:
            state.worked(state.writes, "writing")

    async def _probe_reads(self) -> None:
        """Nobody asks a disk that is said to be failing; so somebody has to see when it works again."""
        state = self._state
        if state.reads.state == "ok" or state.reads.wait_s(state.now_s()):
            return
        pack = state.books.packs.next()
        try:
            if pack is not None:
                await state.host.in_thread(state.files.toc, pack.number)
        except BadPackError as error:
            await state.set_aside(pack.number if pack else 0, str(error))
        except (FileNotFoundError, StagingFull):
            return
        except OSError as error:
            state.failed(state.reads, "reading", error)
            return
        state.worked(state.reads, "reading")

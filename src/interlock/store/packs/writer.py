"""Write-behind: blocks that were published go to disk in packs, soon, in the background, and never at an engine's expense.

Several packs are written at a time, so that one is copied and checked while the other's bytes go out. Before a pack is
written the clock makes room for it; a disk that is full or failing is left alone for a while, and blocks then stay in RAM alone.
"""

from __future__ import annotations

import asyncio
import contextlib

from interlock.core import limits
from interlock.core.prefixes import Block
from interlock.store.checksums import Binding
from interlock.store.packs.files import SourceBlock
from interlock.store.packs.format import stride
from interlock.store.packs.queue import WriteQueue
from interlock.store.packs.staging import StagingFull
from interlock.store.packs.state import Condemned, DiskState

VISITS_PER_PACK_MAX = 512
"""Packs that the clock visits at most to make room for one: each costs a read of its contents."""
_HEADER_SHARE = 64 * 1024
"""What a pack takes beside its blocks, roughly: for the bound, before it is known."""


class Writer:
    """Writes what `offer` took. `run` is a task; several of them share one writer."""

    def __init__(self, state: DiskState, bytes_max: int) -> None:
        self._state = state
        self._bytes_max = bytes_max
        self.queue = WriteQueue(state.store.slab_bytes)
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self._urgent = False
        self._writing: dict[bytes, int] = {}
        """Keys on their way, and the bytes of each."""
        self._room = asyncio.Lock()
        self.reserved = 0
        """Bytes of packs that are being written."""

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is being written."""
        return not self._writing and not len(self.queue)

    def offer(self, block: Block) -> None:
        """Costs microseconds: nothing is read or copied here."""
        state = self._state
        layout = state.store.shelf.layouts[block.layout]
        if state.writes.state != "ok" and not state.writes.may_try(state.now_s()):
            state.counters["skipped_degraded"] += 1
        elif not self.queue.offer(block, stride(layout), state.now_s()):
            state.counters["skipped_full"] += 1
        elif self.queue.full_batch() or len(self.queue) == 1:
            self._wake.set()

    def clear(self) -> None:
        """What waits is forgotten; what is being written finds out by the epoch."""
        self.queue.clear()

    async def flush(self, timeout_s: float) -> bool:
        """Writes what waits now without waiting for company; whether all of it was settled within `timeout_s`."""
        self._urgent = True
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self.idle)
        except TimeoutError:
            return False
        finally:
            self._urgent = False
        return True

    async def settled(self) -> None:
        """Until what is being written now is on the disk or given up."""
        now = set(self._writing)
        async with self._changed:
            await self._changed.wait_for(lambda: not now & set(self._writing))

    # --- the tasks -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Writes packs as they come due. Until cancelled."""
        while True:
            await self._until_due()
            async with self._changed:
                batch, lost = self.queue.take(self._still_there)
                self._state.counters["skipped_left_ram"] += lost
                self._changed.notify_all()
            if batch:
                await self._write(batch)

    async def _until_due(self) -> None:
        state = self._state
        while True:
            pause_s = state.writes.wait_s(state.now_s())
            due_s = self.queue.due_s()
            if due_s is not None and not pause_s:
                pause_s = 0.0 if self._urgent or self.queue.full_batch() else due_s - state.now_s()
                if pause_s <= 0:
                    return
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s or None):
                    await self._wake.wait()

    def _still_there(self, block: Block) -> bool:
        return self._state.store.shelf.get(block.key) == block

    async def _write(self, batch: list[Block]) -> None:
        state = self._state
        _, where = state.books.where([block.key for block in batch])
        fresh = [
            block
            for block, number in zip(batch, where, strict=True)
            if not number and block.key not in self._writing
        ]
        if not fresh:
            async with self._changed:
                self._changed.notify_all()
            return
        layout = state.store.shelf.layouts[fresh[0].layout]
        size = stride(layout) * len(fresh) + _HEADER_SHARE
        self._writing |= {block.key: stride(layout) for block in fresh}
        self.reserved += size
        try:
            await self._write_pack(fresh)
        finally:
            self.reserved -= size
            for block in fresh:
                self._writing.pop(block.key, None)
            async with self._changed:
                self._changed.notify_all()

    async def _write_pack(self, blocks: list[Block]) -> None:
        state = self._state
        if not await self.make_room():
            state.counters["skipped_no_room"] += len(blocks)
            return
        epoch, slab = state.epoch, state.store.slab
        layout = state.store.shelf.layouts[blocks[0].layout]
        sources = [
            SourceBlock(
                Binding(block.key, block.slot, slab.node_incarnation, slab.slab),
                block.parent,
                block.checksums,
                block.tenant,
            )
            for block in blocks
        ]
        number = state.books.take_number()
        try:
            toc = await state.host.in_thread(state.files.write, number, layout, sources, state.slab)
        except StagingFull:
            state.counters["skipped_staging"] += len(blocks)
            return
        except OSError as error:
            state.counters["skipped_failed"] += len(blocks)
            state.failed(state.writes, "writing", error)
            await state.discard(number, Condemned(0, aside=False))  # it may stand there under its name
            return
        state.worked(state.writes, "writing")
        await state.index_file.make_room(state.books, len(blocks))
        written = 0 if toc is None else len(toc.blocks)
        state.counters["skipped_left_ram"] += len(blocks) - written
        if toc is None:
            return
        if epoch != state.epoch:  # everything was cleared meanwhile
            await state.discard(number, Condemned(toc.size_bytes, aside=False))
            return
        state.books.added(toc)
        state.counters["written"] += written
        state.counters["written_bytes"] += toc.size_bytes
        state.counters["packs_written"] += 1

    # --- room ------------------------------------------------------------------------------------------------------

    def over_bytes(self) -> int:
        """How far the directory would be beyond its bound with all that is being written."""
        index = self._state.books.index
        condemned = sum(file.bytes for file in self._state.condemned.values())
        taken = self._state.books.packs.bytes + self.reserved + index.size_bytes + condemned
        return taken - self._bytes_max

    async def make_room(self) -> bool:
        """Until the bound is kept with what is being written; False when that cannot be done now."""
        async with self._room:
            for _ in range(VISITS_PER_PACK_MAX):
                packs = self._state.books.packs
                if self.over_bytes() <= 0 and len(packs) < limits.DISK_PACKS_MAX:
                    return True
                pack = packs.next()
                if pack is None or self._state.writes.wait_s(self._state.now_s()):
                    return False
                await self._visit(pack.number)
            return False

    async def _visit(self, number: int) -> None:
        state, packs = self._state, self._state.books.packs
        contents = await state.contents(number)
        if contents is None:
            packs.visited(number, state.books.now, gave=number not in packs)
            return
        live = contents.live()
        used = state.books.used_of(contents.toc, live)
        for block in contents.toc.blocks:
            # What RAM answers for never asks the disk, and it is what a restart should find.
            if block.ordinal in used and block.key in state.store.shelf:
                used[block.ordinal] = state.books.now
        leaving = packs.victims(contents.toc, live, used)
        before = packs.bytes
        await state.evict(contents, leaving)
        state.counters["evicted"] += len(leaving)
        state.books.packs.visited(number, state.books.now, gave=packs.bytes < before)

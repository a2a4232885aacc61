"""Promotion: blocks on disk come up into RAM slots when a look-up asks for them.

Bytes land in staging memory of our own and are verified there against the checksums of the ranks that wrote them; only then is a
slot taken, so a disk that hangs costs staging memory and no slots (hazards W1). The slot is WRITING, given to nobody, while the
block is copied; it is published with checksums that bind the *staging's* bytes to the new slot.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from interlock.core import limits
from interlock.core.layouts import KVLayout
from interlock.store.filling import fill_slots
from interlock.store.packs.books import Contents
from interlock.store.packs.format import PackBlock
from interlock.store.packs.staging import Staging, StagingFull
from interlock.store.packs.state import DiskState, log
from interlock.store.refusal import Refusal


class _Batch(msgspec.Struct, eq=False):
    number: int
    keys: list[bytes]
    since_s: float


class Promoter:
    """Brings up what `ask` was asked for. `run` is a task; several of them share one promoter."""

    def __init__(self, state: DiskState, staging: Staging) -> None:
        self._state = state
        self._staging = staging
        self._wanted: OrderedDict[bytes, int] = OrderedDict()
        """Keys that wait, and the pack that each is in."""
        self._under_way: dict[int, _Batch] = {}
        self._serial = 0
        self._coming: set[bytes] = set()
        """All of them: waiting, being read, being copied."""
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._coming)

    def clear(self) -> None:
        """What waits is forgotten; what is being read finds out by the epoch."""
        for key in self._wanted:
            self._coming.discard(key)
        self._wanted.clear()

    async def settled(self) -> None:
        """Until what is coming now is here or given up."""
        left = set(self._coming)
        while left := left & self._coming:  # who was asked for anew since is another's to wait for
            await self._state.host.clock.sleep_s(limits.PROMOTION_POLL_SECONDS)

    def ask(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys are in RAM, on their way, or now begin to be: the rest is a miss. Costs a look-up."""
        shelf, state = self._state.store.shelf, self._state
        if not keys or self._stuck():
            return 0
        count = 0
        step = 64  # most misses are early ones
        while count < len(keys):
            part = keys[count : count + step]
            rows, numbers = state.books.where(part)
            fresh = []
            for i, key in enumerate(part):
                if key in self._coming or key in shelf:
                    continue
                if not numbers[i] or len(self._coming) >= limits.DISK_PROMOTED_BLOCKS_MAX:
                    part = part[:i]
                    break
                if not state.store.under_way(key):
                    self._wanted[key] = numbers[i]
                    self._coming.add(key)
                    fresh.append(i)
            count += len(part)
            state.books.touch(rows[fresh])
            state.counters["asked"] += len(fresh)
            if len(part) < step:
                break
            step = len(keys)
        if self._wanted:
            self._wake.set()
        return count

    def _stuck(self) -> bool:
        """The disk does not answer, or is left alone: nobody should wait for it."""
        now_s = self._state.now_s()
        if self._state.reads.wait_s(now_s):
            return True
        oldest = min((batch.since_s for batch in self._under_way.values()), default=now_s)
        return now_s - oldest > limits.PROMOTION_WAIT_SECONDS_MAX

    # --- the tasks -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reads what is wanted, a pack at a time. Until cancelled."""
        while True:
            while not self._wanted:
                self._wake.clear()
                await self._wake.wait()
            number = next(iter(self._wanted.values()))
            self._serial += 1
            serial = self._serial
            batch = self._under_way[serial] = _Batch(number, [], self._state.now_s())
            self._take(batch, 1)
            try:
                await self._bring(batch)
            finally:
                del self._under_way[serial]
                self._coming.difference_update(batch.keys)

    def _take(self, batch: _Batch, count: int) -> None:
        """Moves up to so many keys of the batch's pack from the waiting into it."""
        here = [key for key, number in self._wanted.items() if number == batch.number]
        for key in here[:count]:
            del self._wanted[key]
            batch.keys.append(key)

    async def _bring(self, batch: _Batch) -> None:
        state = self._state
        contents = await state.contents(batch.number)
        if contents is None:
            if batch.number not in state.books.packs:
                self._take(batch, len(self._wanted))  # none of them will come
            state.counters["promotions_failed"] += len(batch.keys)
            return
        fitting = max(1, limits.DISK_READ_BYTES // contents.toc.stride)
        self._take(batch, fitting - len(batch.keys))
        blocks = []
        for key in batch.keys:
            block = contents.by_key.get(key)
            if block is None or block.ordinal in contents.gone:
                state.books.forget(key)
                state.counters["promotions_failed"] += 1
            else:
                blocks.append(block)
        blocks.sort(key=lambda block: block.offset)
        if blocks:
            await self._read(contents, blocks)

    async def _read(self, contents: Contents, blocks: list[PackBlock]) -> None:
        state, toc, epoch = self._state, contents.toc, self._state.epoch
        try:
            with self._staging.take(toc.stride * len(blocks)) as memory:
                good = await state.host.in_thread(state.files.read, toc, blocks, memory)
                state.worked(state.reads, "reading")
                if epoch == state.epoch:
                    await self._put(toc.layout, blocks, good, memory, toc.stride)
        except StagingFull:
            state.counters["promotions_failed"] += len(blocks)
            return
        except FileNotFoundError:  # evicted meanwhile
            state.counters["promotions_failed"] += len(blocks)
            return
        except (OSError, EOFError) as error:
            state.counters["promotions_failed"] += len(blocks)
            trouble = error if isinstance(error, OSError) else OSError(str(error))
            state.failed(state.reads, "reading", trouble)
            return
        bad = [block.ordinal for i, block in enumerate(blocks) if not good[i]]
        if bad and epoch == state.epoch:
            state.counters["promotions_failed"] += len(bad)
            await state.blocks_bad(contents, bad)

    async def _put(
        self, layout: KVLayout, blocks: list[PackBlock], good: list[bool], memory: memoryview, step: int
    ) -> None:
        """Verified blocks into slots, in the order of their chain, as far as there is room."""
        state, store = self._state, self._state.store
        chosen = [
            (block, memory[i * step : i * step + layout.block_bytes])
            for i, block in enumerate(blocks)
            if good[i]
        ]
        epoch, published = state.epoch, 0
        try:
            for tenant in dict.fromkeys(block.tenant for block, _ in chosen):
                own = [pair for pair in chosen if pair[0].tenant == tenant]
                published += await fill_slots(
                    state.host, store, state.slab, layout, own, tenant, lambda _: epoch == state.epoch
                )
        except Refusal as refusal:  # the slab cannot hold such blocks
            log.info("blocks of the disk stay there: %s", refusal)
        state.counters["promoted"] += published
        state.counters["promotions_failed"] += len(chosen) - published

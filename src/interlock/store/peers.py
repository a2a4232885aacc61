"""The tier below RAM that is other hosts' RAM: blocks of peer nodes come up into slots when a look-up asks for them.

Each node follows its peers' indexes (the same listing and numbered changes that any client may follow), so a look-up knows at once what a peer has, and
a miss costs nothing. A block that is wanted is located anew at its owner and read straight from the owner's slab into staging of our own, verified
there against the checksums of the ranks that wrote it, and only then copied into a slot: a peer that hangs costs staging, no slots
(hazards W1), and a slot that its owner reused meanwhile is a checksum that fails, a miss. Nobody writes another's slab; the segment that
is offered is the slab, read-only. Two nodes reading from each other at once is the ordinary case: neither waits for its own reads to answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from interlock.core import limits
from interlock.core.errors import InterlockError
from interlock.core.layouts import KVLayout
from interlock.core.prefixes import KEY_BYTES
from interlock.core.removals import Removal
from interlock.host.base import Host, SharedMemory
from interlock.store.blocks import BlockStore
from interlock.store.changes import RAM
from interlock.store.checksums import Binding, verify_block
from interlock.store.desk import Desk
from interlock.store.filling import fill_slots
from interlock.store.packs.staging import Staging, StagingFull
from interlock.store.peer_messages import ANSWERS, QUESTIONS, BlocksLocated, LocateBlocks, PeerBlock
from interlock.store.refusal import Refusal
from interlock.store.removals import Meeting, Removals, RemoveHere, TellRemovals
from interlock.transfer.engine import Part, TransferEngine
from interlock.transfer.segments import RemoteSegment, Segment
from interlock.wire.identity import Identity
from interlock.wire.store_messages import (
    BlockPage,
    Changes,
    ListBlocks,
    WatchChanges,
)

STAGING_BYTES = 64 * 1024 * 1024
READS_AT_ONCE = 2
FOLLOW_WAIT_SECONDS = 5.0
RETRY_SECONDS_MAX = 2.0
SEGMENT_LABEL = "store slab"
_log = logging.getLogger(__name__)


class PeerTier:
    """`engine`: started, named as this node; `peers`: names of the other nodes, which the engine's directory knows."""

    def __init__(
        self,
        host: Host,
        engine: TransferEngine,
        peers: Sequence[str],
        store: BlockStore,
        desk: Desk,
        memory: SharedMemory,
        removals: Removals,
    ) -> None:
        self._host, self._engine, self._peers = host, engine, list(peers)
        self._store, self._desk, self._memory = store, desk, memory
        self._staging = Staging(STAGING_BYTES)
        self._segment: Segment | None = None
        self._where: OrderedDict[bytes, str] = OrderedDict()
        """Which peer has a block, as far as is known."""
        self._wanted: OrderedDict[bytes, str] = OrderedDict()
        self._coming: set[bytes] = set()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.counters: Counter[str] = Counter()
        self._removals = removals
        removals.with_peers(self._peers, self._ask_removal)

    # --- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Offers the slab, answers peers, follows them."""
        self._segment = self._engine.register(self._memory, SEGMENT_LABEL)
        self._engine.answer_with(self._answer)
        for peer in self._peers:
            self._spawn(self._follow(peer), f"follow {peer}")
        for number in range(READS_AT_ONCE):
            self._spawn(self._run(), f"peer reader {number}")

    async def close(self) -> None:
        """No task of ours touches the slab afterwards; the slab is withdrawn from peers."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        segment, self._segment = self._segment, None
        if segment is not None:
            try:
                await self._engine.unregister(segment)
            except TimeoutError as error:
                # The rest of the node closes; the slab stays mapped as long as somebody looks into it.
                _log.error("%s", error)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))

    # --- for the node's look-ups -----------------------------------------------------------------------------------

    def promote(self, keys: Sequence[bytes]) -> int:
        """How many of the first `keys`, which follow what is known here of a prefix, are on their way now. Costs a look-up."""
        count = 0
        for key in keys:
            if key in self._coming or key in self._store.shelf:
                count += 1
                continue
            peer = self._where.get(key)
            if peer is None or len(self._coming) >= limits.PEER_BLOCKS_COMING_MAX:
                break
            if not self._store.under_way(key):
                self._wanted[key] = peer
                self._coming.add(key)
                self._wake.set()
            count += 1
        return count

    def stats(self) -> dict[str, float]:
        """Gauges and counters by metric name."""
        values = {
            "known_blocks": len(self._where),
            "promoting_blocks": len(self._coming),
            "promoted_blocks_total": self.counters["promoted"],
            "promotions_failed_blocks_total": self.counters["failed"],
            "bad_blocks_total": self.counters["bad"],
            "read_bytes_total": self.counters["bytes"],
            "located_blocks_total": self.counters["located"],
        }
        return {f"interlock_store_peers_{name}": float(value) for name, value in values.items()}

    # --- what peers ask --------------------------------------------------------------------------------------------

    async def _answer(self, peer: Identity, payload: bytes) -> bytes:
        """Raises `Refusal`."""
        try:
            question = QUESTIONS.decode(payload)
        except (msgspec.MsgspecError, ValueError) as error:
            raise Refusal("bad_question", f"{peer} asked what no store asks: {error}") from error
        if isinstance(question, LocateBlocks):
            return msgspec.msgpack.encode(self._locate(question.keys[: limits.PEER_FETCH_BLOCKS_MAX]))
        if isinstance(question, RemoveHere):
            return msgspec.msgpack.encode(await self._removals.asked(peer.name, question))
        if isinstance(question, TellRemovals):
            return msgspec.msgpack.encode(await self._removals.told(question))
        return msgspec.msgpack.encode(await self._desk.answer(question, None))

    def _locate(self, keys: Sequence[bytes]) -> BlocksLocated:
        shelf, segment = self._store.shelf, self._segment
        if segment is None:
            raise Refusal("closing", "this node is closing", retryable=True)
        found = [block for key in keys if (block := shelf.get(key)) is not None]
        numbers = sorted({block.layout for block in found})
        self.counters["located"] += len(found)
        return BlocksLocated(
            self._store.slab.slab,
            segment.remote.number,
            segment.remote.size_bytes,
            [shelf.layout_of(number) for number in numbers],
            [
                PeerBlock(b.key, b.parent, b.slot, numbers.index(b.layout), b.checksums, b.tenant)
                for b in found
            ],
            self._removals.book.done_for((block.key, block.tenant) for block in found),
        )

    # --- following peers -------------------------------------------------------------------------------------------

    async def _follow(self, peer: str) -> None:
        pause_s = limits.RECONNECT_SECONDS_MIN
        while True:
            try:
                await self._follow_once(peer)
                pause_s = limits.RECONNECT_SECONDS_MIN
            except (InterlockError, OSError, TimeoutError, msgspec.MsgspecError) as error:
                _log.info("node %s is not followed now: %s", peer, error)
            except Exception:  # a defect of ours
                self._defect(f"following node {peer}")
            self._forget(peer)
            await self._host.clock.sleep_s(pause_s)
            pause_s = min(2 * pause_s, RETRY_SECONDS_MAX)

    async def _follow_once(self, peer: str) -> None:
        """Hears what was removed, lists all, then follows the changes, until a gap, another slab, or a failure."""
        clock, removals, meeting = self._host.clock, self._removals, Meeting()
        await removals.meet(peer, meeting)
        met_s = clock.monotonic_s()
        slab = after = cursor = -1
        following: int | None = 0
        while following is not None:
            page = await self._ask(peer, ListBlocks(following), BlockPage)
            if cursor == -1:
                slab, after = page.slab, page.sequence
            if page.slab != slab:
                return
            for block in page.blocks:
                self._learn(peer, block.key)
            cursor, following = following, page.next
        while True:
            changes = await self._ask(peer, WatchChanges(slab, after, wait_s=FOLLOW_WAIT_SECONDS), Changes)
            if changes.gap or changes.slab != slab:
                return
            for change in changes.changes:
                if change.medium != RAM:
                    continue
                if change.kind == "stored":
                    self._learn(peer, change.key)
                elif self._where.get(change.key) == peer:
                    del self._where[change.key]
            after = changes.last
            # Either may have heard of a removal from somebody else.
            if removals.book.number > meeting.told or clock.monotonic_s() - met_s >= FOLLOW_WAIT_SECONDS:
                await removals.meet(peer, meeting)
                met_s = clock.monotonic_s()

    async def _ask_removal(self, peer: str, question: msgspec.Struct, wanted: type) -> Any:
        if isinstance(question, RemoveHere):  # answered when it is done
            return await self._ask(peer, question, wanted, timeout_s=limits.PEER_REMOVE_SECONDS_MAX)
        return await self._ask(peer, question, wanted)

    async def _ask(
        self,
        peer: str,
        question: msgspec.Struct,
        wanted: type,
        *,
        timeout_s: float = FOLLOW_WAIT_SECONDS + limits.SILENCE_SECONDS_MAX,
    ) -> Any:
        payload, _ = await self._engine.ask(peer, msgspec.msgpack.encode(question), timeout_s=timeout_s)
        answer = ANSWERS.decode(payload)
        if not isinstance(answer, wanted):
            raise Refusal("bad_answer", f"{peer} answered with a {type(answer).__name__}")
        return answer

    def _learn(self, peer: str, key: bytes) -> None:
        self._where[key] = peer
        if len(self._where) > limits.PEER_BLOCKS_KNOWN_MAX:
            self._where.popitem(last=False)

    def _forget(self, peer: str) -> None:
        for key in [key for key, at in self._where.items() if at == peer]:
            del self._where[key]

    # --- reading from them -----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            while not self._wanted:
                self._wake.clear()
                await self._wake.wait()
            peer = next(iter(self._wanted.values()))
            keys = [key for key, at in self._wanted.items() if at == peer][: limits.PEER_FETCH_BLOCKS_MAX]
            for key in keys:
                del self._wanted[key]
            try:
                await self._fetch(peer, keys)
            except (InterlockError, OSError, TimeoutError, ValueError, msgspec.MsgspecError) as error:
                _log.info("%d blocks did not come from %s: %s", len(keys), peer, error)
            except Exception:  # a defect of ours
                self._defect(f"reading from node {peer}")
            finally:
                self._coming.difference_update(keys)
                missing = [key for key in keys if key not in self._store.shelf]
                self.counters["failed"] += len(missing)
                for key in missing:  # it is not looked for there again before its owner tells of it anew
                    self._where.pop(key, None)

    def _defect(self, doing: str) -> None:
        """It is counted and said, and must not end the task: peers would be followed, or read from, no more."""
        self._store.counters["internal_errors"] += 1
        _log.exception("%s failed", doing)

    async def _fetch(self, peer: str, keys: list[bytes]) -> None:
        payload, incarnation = await self._engine.ask(
            peer, msgspec.msgpack.encode(LocateBlocks(keys)), timeout_s=limits.PEER_FETCH_SECONDS_MAX
        )
        found = ANSWERS.decode(payload)
        if not isinstance(found, BlocksLocated):
            raise Refusal("bad_answer", f"{peer} did not say where its blocks are")
        segment = RemoteSegment(peer, incarnation, found.segment, found.slab_bytes)
        here = {block.key: block for block in found.blocks if len(block.parent) in (0, KEY_BYTES)}
        there = [here[key] for key in keys if key in here]
        for number, layout in enumerate(found.layouts):
            blocks = [block for block in there if block.layout == number]
            fitting = max(1, limits.DISK_READ_BYTES // layout.block_bytes)
            for at in range(0, len(blocks), fitting):
                await self._read(segment, found, layout, blocks[at : at + fitting])

    async def _read(
        self, segment: RemoteSegment, found: BlocksLocated, layout: KVLayout, blocks: list[PeerBlock]
    ) -> None:
        size = layout.block_bytes
        try:
            with self._staging.take(size * len(blocks)) as memory:
                rows = [
                    (block.slot * limits.SLOT_GRAIN_BYTES, i * size, size) for i, block in enumerate(blocks)
                ]
                transfer = self._engine.read(
                    [Part(segment, memory, rows)], timeout_s=limits.PEER_FETCH_SECONDS_MAX
                )
                try:
                    outcome = await transfer.outcome()
                finally:
                    # Only at its release is the staging ours again (hazards W1); a cancelled task waits for it, too.
                    transfer.cancel()
                    await asyncio.shield(transfer.release())
                outcome.check()
                self.counters["bytes"] += outcome.size_bytes
                datas = [memory[i * size : (i + 1) * size] for i in range(len(blocks))]
                bindings = [Binding(b.key, b.slot, segment.incarnation, found.slab) for b in blocks]
                good = await self._host.in_thread(_verify, layout, blocks, datas, bindings)
                self.counters["bad"] += good.count(False)
                chosen = [
                    pair for pair, fine in zip(zip(blocks, datas, strict=True), good, strict=True) if fine
                ]
                for tenant in dict.fromkeys(block.tenant for block, _ in chosen):
                    own = [pair for pair in chosen if pair[0].tenant == tenant]
                    await self._fill(layout, own, tenant, found.removals)
                datas.clear()
                chosen.clear()
        except StagingFull as full:
            raise Refusal("staging_full", str(full), retryable=True) from full

    async def _fill(
        self,
        layout: KVLayout,
        chosen: list[tuple[PeerBlock, memoryview]],
        tenant: str,
        removals: list[Removal],
    ) -> None:
        """Verified blocks into slots of our own, in the order of their chain, as far as there is room.

        Unless they are of something that was removed and the peer had not removed it when it named them (core/removals).
        """
        book = self._removals.book
        self.counters["promoted"] += await fill_slots(
            self._host,
            self._store,
            self._memory,
            layout,
            chosen,
            tenant,
            lambda key: book.admits(key, tenant, removals),
        )


def _verify(
    layout: KVLayout, blocks: list[PeerBlock], datas: list[memoryview], bindings: list[Binding]
) -> list[bool]:
    return [
        verify_block(binding, layout, data, block.checksums)
        for block, data, binding in zip(blocks, datas, bindings, strict=True)
    ]

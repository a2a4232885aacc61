"""The index's changes as vLLM's KV events, for routers that know those: published with numbers, replayed on request.

The words, their order and the frames are those of vllm 0.32 (`vllm/distributed/kv_events.py`): a message is (topic, number
of 8 bytes, big-endian; payload), the payload an `EventBatch`; a question to the replay socket is the first number that is
missing, and the answer all batches from there on, then number -1. Hashes are our block keys (32 bytes), which a router can
compute with `core/prefixes.chain_keys`; for one that names blocks in its own way `token_ids` are there where the node was told to
publish them (store/told_tokens), of all blocks of an event or of none. The first batch of a life says that
all blocks are cleared; so does one after this publisher fell behind, and the whole index follows it.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Protocol

import msgspec

from interlock.core.limits import (
    BLOCKS_LISTED_MAX,
    CHANGES_PER_CALL_MAX,
    KV_EVENT_BATCHES_MAX,
    KV_EVENT_BYTES_MAX,
)
from interlock.host.base import Host
from interlock.host.publisher import Publisher
from interlock.store.changes import RAM, Change, ChangeKind, ChangeLog
from interlock.store.notice import Notice
from interlock.store.shelf import Shelf
from interlock.store.told_tokens import TokenBook, unpack_tokens

WAIT_SECONDS = 5.0
END = (-1).to_bytes(8, "big", signed=True)
_log = logging.getLogger(__name__)


class KVCacheEvent(msgspec.Struct, omit_defaults=True, tag=True, frozen=True):
    """What vLLM calls so."""


class BlockStored(KVCacheEvent, frozen=True):
    """A chain of blocks came to `medium`; its first one hangs on `parent_block_hash`."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(KVCacheEvent, frozen=True):
    """These blocks left `medium`."""

    block_hashes: list[bytes]
    medium: str | None


class AllBlocksCleared(KVCacheEvent, frozen=True):
    """Nothing is anywhere; what there is follows."""


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True):
    """One message: when it was made (seconds since 1970), and what happened."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


def events_of(
    changes: Sequence[Change], tokens: TokenBook | None = None
) -> Iterator[BlockStored | BlockRemoved]:
    """Chains of stored blocks, and runs of removed ones, each as one event."""
    known = [b"" if tokens is None else tokens.of(change.key) for change in changes]
    start = 0
    for index in range(1, len(changes) + 1):
        if index == len(changes) or not (
            _go_together(changes[index - 1], changes[index]) and bool(known[index - 1]) == bool(known[index])
        ):
            run = changes[start:index]
            keys = [change.key for change in run]
            first = run[0]
            if first.kind is ChangeKind.STORED:
                parent = first.parent or None
                ids = unpack_tokens(b"".join(known[start:index]))
                yield BlockStored(keys, parent, ids, first.block_tokens, None, first.medium, None)
            else:
                yield BlockRemoved(keys, first.medium)
            start = index


def _go_together(one: Change, two: Change) -> bool:
    if (one.kind, one.medium, one.block_tokens) != (two.kind, two.medium, two.block_tokens):
        return False
    return one.kind is ChangeKind.REMOVED or two.parent == one.key


class Lower(Protocol):
    """As much of the disk tier as its events ask for."""

    @property
    def is_open(self) -> bool:
        """Whether its blocks can be listed."""
        ...

    def listing(self) -> AsyncIterator[list[Change]]:
        """All blocks that are there."""
        ...


class KVEvents:
    """Publishes the changes of a shelf and of the disk below it. `run` and `serve_replays` are tasks of the node."""

    def __init__(
        self,
        host: Host,
        shelf: Shelf,
        publisher: Publisher,
        *,
        topic: str = "",
        tokens: TokenBook | None = None,
        disk: tuple[Lower, ChangeLog] | None = None,
    ) -> None:
        self._host, self._shelf, self._publisher, self._tokens = host, shelf, publisher, tokens
        self._disk: Lower | None = None if disk is None else disk[0]
        self._topic = topic.encode()
        self._batches: deque[tuple[bytes, bytes]] = deque()
        self._bytes = 0
        self._number = 0
        self._changed = Notice()
        self._encode = msgspec.msgpack.Encoder().encode
        self._logs = (shelf.changes, ChangeLog(kept_max=1) if disk is None else disk[1])
        self._known = [0, 0]
        """Of each log, the last change that followers know."""
        self._disk_told = False
        for log in self._logs:
            log.listeners.append(self._changed.ring)

    async def run(self) -> None:
        """Until cancelled."""
        await self._begin_anew()
        while True:
            if not self._disk_told and self._disk is not None and self._disk.is_open:
                await self._tell_disk()
            if self._known == [log.last for log in self._logs]:
                await self._changed.wait(WAIT_SECONDS)
            await self._follow_all()

    async def _follow_all(self) -> None:
        for number, log in enumerate(self._logs):
            await self._follow(number, log)

    async def _follow(self, number: int, log: ChangeLog) -> None:
        changes = log.since(self._known[number], CHANGES_PER_CALL_MAX)
        if changes is None:
            _log.warning("KV events fell behind after change %d: all is told again", self._known[number])
            await self._begin_anew()
        elif changes:
            self._known[number] += len(changes)
            await self._publish(list(events_of(changes, self._tokens)))

    async def serve_replays(self) -> None:
        """Answers who missed batches. Until cancelled."""
        while True:
            frames = await self._publisher.question()
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            who, first = frames[0], frames[2]
            for number, payload in list(self._batches):
                if number >= first:  # big-endian numbers of one length compare as their bytes
                    await self._publisher.answer((who, b"", self._topic, number, payload))
            await self._publisher.answer((who, b"", b"", END, b""))

    async def _begin_anew(self) -> None:
        """Says that all is cleared, then all there is. What changes meanwhile is told afterwards, also what was told already."""
        self._known = [log.last for log in self._logs]
        self._disk_told = False
        await self._publish([AllBlocksCleared()])
        cursor: int | None = 0
        while cursor is not None:
            blocks, cursor = self._shelf.page(cursor, BLOCKS_LISTED_MAX)
            tokens = [self._shelf.layout_of(block.layout).block_tokens for block in blocks]
            await self._list(
                [
                    Change(ChangeKind.STORED, block.key, block.parent, count, block.tenant, RAM)
                    for block, count in zip(blocks, tokens, strict=True)
                ]
            )

    async def _tell_disk(self) -> None:
        """All that is on the disk, which is open now. It may take long, so what changes is told between two packs."""
        assert self._disk is not None
        self._disk_told = True
        async for stored in self._disk.listing():
            await self._list(stored)
            await self._follow_all()
            if not self._disk_told:  # it fell behind nevertheless, and all is told again
                return

    async def _list(self, stored: list[Change]) -> None:
        if stored:
            await self._publish(list(events_of(stored, self._tokens)))
        await self._host.clock.sleep_s(0)

    async def _publish(self, events: list[BlockStored | BlockRemoved | AllBlocksCleared]) -> None:
        payload = self._encode(EventBatch(self._host.clock.wall_ns() / 1e9, events, 0))
        number = self._number.to_bytes(8, "big")
        self._number += 1
        self._batches.append((number, payload))
        self._bytes += len(payload)
        while len(self._batches) > KV_EVENT_BATCHES_MAX or self._bytes > KV_EVENT_BYTES_MAX:
            self._bytes -= len(self._batches.popleft()[1])
        with contextlib.suppress(ConnectionError):
            await self._publisher.publish((self._topic, number, payload))

"""What a node answers besides look-ups and writes: listings, changes, pins, and an administrator's verbs.

The node (store/node) handles look-ups and writes at once, without waiting. What stands here may wait or take long, so it
is done in slices between which others are answered: a look-up has milliseconds, and a slab has millions of slots.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from interlock.core.limits import BLOCKS_LISTED_MAX
from interlock.core.prefixes import Block
from interlock.core.removals import What
from interlock.host.base import Host
from interlock.store.blocks import BlockStore
from interlock.store.checksums import Binding, verify_block
from interlock.store.notice import Notice
from interlock.store.packs.tier import DiskTier
from interlock.store.refusal import Refusal
from interlock.store.roster import Member
from interlock.store.told_tokens import TokenBook
from interlock.wire.store_messages import (
    BlockPage,
    ChangedBlock,
    Changes,
    Clear,
    Done,
    GetTenants,
    ListBlocks,
    Listed,
    NodeMessage,
    Pin,
    Remove,
    StartWrite,
    Tenants,
    TenantUse,
    Unpin,
    Verified,
    VerifyBlocks,
    WatchChanges,
)

Question = Clear | Remove | Pin | Unpin | ListBlocks | VerifyBlocks | WatchChanges | GetTenants


class Desk:
    """Answers `Question`s about one store. `memory` is the slab's."""

    def __init__(self, host: Host, store: BlockStore, memory: memoryview) -> None:
        self._host, self._store, self._memory = host, store, memory
        self._changed, self._settled = Notice(), Notice()
        store.shelf.changes.listeners.append(self._changed.ring)
        store.on_keys_settled = self._settled.ring
        self.disk: DiskTier | None = None
        """The tier below, which forgets what is forgotten here."""
        self.tokens: TokenBook | None = None
        self.everywhere: Callable[[Remove], Awaitable[Done]]
        """Removes here and at the peers (store/removals)."""

    async def answer(self, body: Question, member: Member | None) -> NodeMessage:
        """Raises `Refusal`."""
        match body:
            case Clear():
                gone = await self._sweep(lambda _: True)
                if self.tokens is not None:
                    self.tokens.forget(lambda *_: True)
                if self.disk is not None and not await self.disk.clear():
                    raise self._left_on_disk()
                return Done(gone)
            case Remove():
                if not (body.keys or body.prefix or body.tenant is not None):
                    raise Refusal(
                        "bad_remove",
                        "name keys, a tenant, or the first digits of a key; Clear forgets everything",
                    )
                if body.keys:
                    return Done(await self._remove_keys(body.keys))
                return await self.everywhere(body)
            case Pin():
                now_s = self._host.clock.monotonic_s()
                return Done(self._store.pin(_owner(member), body.name, body.keys, now_s, body.seconds))
            case Unpin():
                return Done(self._store.unpin(_owner(member), body.name))
            case ListBlocks():
                return self._list(body)
            case VerifyBlocks():
                return await self._verify(body)
            case WatchChanges():
                return await self._watch(body)
            case GetTenants():
                orders = self._store.shelf.orders
                named = sorted({*orders.tenants(), *orders.quotas})
                return Tenants([TenantUse(n, orders.used_bytes(n), orders.quota(n)) for n in named])

    async def wait_for_keys(self, body: StartWrite) -> None:
        """Until none of the asked keys is under way, or `body.wait_s` passed."""
        deadline_s = self._host.clock.monotonic_s() + body.wait_s
        while self._store.count_under_way(body.keys):
            left_s = deadline_s - self._host.clock.monotonic_s()
            if left_s <= 0:
                return
            await self._settled.wait(left_s)

    # --- an administrator's verbs --------------------------------------------------------------------------------

    async def _sweep(self, wanted: Callable[[Block], bool]) -> int:
        gone, cursor = 0, 0
        while True:
            more, following = self._store.sweep(cursor, wanted)
            gone += more
            if following is None:
                return gone
            cursor = following
            await self._host.clock.sleep_s(0)

    async def remove(self, what: What) -> tuple[int, bool]:
        """Here: in RAM, on the disk, and what is on its way from or to there; how many blocks there were, and whether none is left."""
        wanted = _filter(what)
        self._store.writes.end_concerned(what.concerns)
        gone, whole = await self._sweep(wanted), True
        if self.disk is not None:
            from_disk, whole = await self.disk.sweep(wanted)
            gone += from_disk + await self._sweep(wanted)  # what was on its way up meanwhile
        if self.tokens is not None:
            self.tokens.forget(what.concerns)
        return gone, whole

    async def _remove_keys(self, keys: Sequence[bytes]) -> int:
        blocks = [block for key in keys if (block := self._store.shelf.get(key)) is not None]
        gone = sum(self._store.shelf.withdraw(block.key, block.slot) for block in blocks)
        if self.disk is not None:
            _, whole = await self.disk.remove(keys)
            if not whole:
                raise self._left_on_disk()
        return gone

    def _left_on_disk(self) -> Refusal:
        why = self.disk.error if self.disk is not None else ""
        return Refusal(
            "disk_away",
            f"gone from RAM, but the disk keeps some of it for now{f' ({why})' if why else ''}; it could come back",
            retryable=True,
            hint="say it again when the disk works",
        )

    # --- looking -------------------------------------------------------------------------------------------------

    def _list(self, body: ListBlocks) -> BlockPage:
        shelf = self._store.shelf
        blocks, following = shelf.page(body.cursor, min(body.limit, BLOCKS_LISTED_MAX))
        wanted = _filter(What(body.tenant, body.prefix))
        return BlockPage(
            self._store.slab.slab,
            shelf.changes.last,
            [self._listed(block) for block in blocks if wanted(block)],
            following,
        )

    def _listed(self, block: Block) -> Listed:
        shelf = self._store.shelf
        layout = shelf.layout_of(block.layout)
        pinned = block.key in shelf.pins
        return Listed(
            block.key, block.parent, block.slot, layout.block_bytes, layout.block_tokens, block.tenant, pinned
        )

    async def _verify(self, body: VerifyBlocks) -> Verified:
        shelf = self._store.shelf
        blocks, following = shelf.page(body.cursor, body.limit)
        bad = []
        for block in blocks:  # one at a time: a slot that was reused meanwhile is nobody's fault
            good = await self._host.in_thread(self._check, block)
            if not good and shelf.get(block.key) is block:
                shelf.withdraw(block.key, block.slot)
                bad.append(block.key)
        self._store.counters["verified"] += len(blocks)
        self._store.counters["verified_bad"] += len(bad)
        return Verified(len(blocks), bad, following)

    def _check(self, block: Block) -> bool:
        layout = self._store.shelf.layout_of(block.layout)
        start = self._store.slots.offset_bytes(block.slot)
        slab = self._store.slab
        binding = Binding(block.key, block.slot, slab.node_incarnation, slab.slab)
        return verify_block(
            binding, layout, self._memory[start : start + layout.block_bytes], block.checksums
        )

    async def _watch(self, body: WatchChanges) -> Changes:
        log, slab = self._store.shelf.changes, self._store.slab.slab
        if body.slab != slab:
            return Changes(slab, log.last, True, [])
        if body.after == log.last:
            await self._changed.wait(body.wait_s)
        found = log.since(body.after, body.limit)
        if found is None:
            return Changes(slab, log.last, True, [])
        told = [
            ChangedBlock(c.kind.value, c.key, c.parent, c.block_tokens, c.tenant, c.medium) for c in found
        ]
        return Changes(slab, body.after + len(found), False, told)


def _filter(what: What) -> Callable[[Any], bool]:
    """Of blocks, in RAM or on the disk."""
    if what.prefix:
        return lambda block: what.concerns(block.key, block.tenant)
    return lambda block: what.tenant is None or block.tenant == what.tenant


def _owner(member: Member | None) -> Member:
    if member is None:
        raise Refusal(
            "not_attached",
            "a pin belongs to a process whose exit can be proven, so only attached connections pin",
            hint="attach first, as a reader if you like",
        )
    return member

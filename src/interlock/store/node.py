"""The store node: owns one slab, answers its clients, and gives a slot to somebody else only on evidence.

Everything that is decided stands in `store/blocks` (blocks, slots, sessions) and `store/roster` (who is attached); this
driver turns messages, proven exits and the clock into their events. Each message is handled at once and without waiting,
so no two of them interleave; only the answer is awaited.

On what evidence a process counts as gone is `store/witness`'s.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from interlock.core import limits
from interlock.core.errors import ChannelClosed, InterlockError
from interlock.core.layouts import KVLayout
from interlock.core.packed_sums import SUM_BYTES
from interlock.core.sessions import SlabName
from interlock.host.base import Host, Listener, SharedMemory
from interlock.host.publisher import Publisher
from interlock.host.state_file import StateFile
from interlock.store.blocks import BlockStore
from interlock.store.changes import ChangeLog
from interlock.store.desk import Desk, Question
from interlock.store.housekeeping import TICK_SECONDS, Housekeeping
from interlock.store.kv_events import KVEvents
from interlock.store.metrics import store_stats
from interlock.store.packs.state import Emit
from interlock.store.packs.tier import DiskTier
from interlock.store.peers import PeerTier
from interlock.store.refusal import Refusal
from interlock.store.removals import Removals
from interlock.store.roster import EngineLife, LifeName, Member, Roster
from interlock.store.told_tokens import WORD_BYTES, TokenBook
from interlock.store.witness import Witness
from interlock.transfer.engine import TransferEngine
from interlock.wire.channel import Channel, Received, serve_channels
from interlock.wire.identity import Identity
from interlock.wire.store_messages import (
    AbortWrite,
    Attach,
    Attached,
    ClientMessage,
    Done,
    GetStats,
    Match,
    Matched,
    NodeMessage,
    Report,
    StartWrite,
    Stats,
    Withdraw,
    WriteStarted,
)


class DiskConfig(msgspec.Struct, frozen=True):
    """Where blocks go that leave RAM, and how many bytes they may take there."""

    path: Path
    bytes_max: int
    index_records_min: int = limits.DISK_INDEX_RECORDS_MIN


MATCHED_BYTES_MAX = limits.FRAME_BYTES_MAX // 2
"""A longer answer is cut: what does not fit is a miss."""
_LOCATION_BYTES = 24


def _location_bytes(layout: KVLayout) -> int:
    """At most so many bytes an answer takes for one block of that layout."""
    groups = len(layout.cuts) + 1
    return _LOCATION_BYTES + SUM_BYTES * layout.heads * groups + 8 * groups


class Node:
    """One life of a store node over one slab. `start` listens, `close` stops; the slab ends with its last holder."""

    def __init__(
        self,
        host: Host,
        me: Identity,
        memory: SharedMemory,
        slab: int,
        *,
        token: bytes = b"",
        join_s: float = limits.JOIN_SECONDS_MAX,
        tick_s: float = TICK_SECONDS,
        quotas: Mapping[str, int] | None = None,
        end_frozen_writers: bool = False,
        disk: DiskConfig | None = None,
        emit: Emit | None = None,
        peers: tuple[TransferEngine, Sequence[str]] | None = None,
        publisher: Publisher | None = None,
        publish_tokens: bool = False,
        removals: StateFile | None = None,
    ) -> None:
        """`publish_tokens`: engines are asked for the tokens of what they save, and `publisher` tells them to everybody.

        `removals`: where it is kept what was removed; None: for this life alone. `peers`: a started engine of the same identity as `me`, and the names of other nodes, whose blocks come up from there."""
        self._host = host
        self._me = me
        self._memory = memory
        self._token = token
        self._slab = slab
        self._incarnation = me.incarnation
        self.store = BlockStore(
            SlabName(me.incarnation, slab), memory.size_bytes, join_s=join_s, quotas=quotas
        )
        self._desk = Desk(host, self.store, memory.view)
        self.disk: DiskTier | None = None
        self._disk_changes = ChangeLog() if disk is not None and publisher is not None else None
        if disk is not None:
            self.disk = self._desk.disk = DiskTier(
                host,
                disk.path,
                disk.bytes_max,
                self.store,
                memory,
                owner=f"store node {me.name}@{me.incarnation}",
                emit=emit,
                records_min=disk.index_records_min,
                changes=self._disk_changes,
            )
        self.removals = Removals(host, me, slab, removals, self._desk.remove)
        self._desk.everywhere = self.removals.everywhere
        self.store.promotions.holds = lambda key, tenant: self.removals.book.holds(key, tenant)
        if self.disk is not None:
            self.disk.on_open = lambda identity, empty: self.removals.disk_opened(identity, empty=empty)
        self.peers: PeerTier | None = None
        if peers is not None:
            self.peers = PeerTier(host, *peers, self.store, self._desk, memory, self.removals)
        self._publisher = publisher
        self._tokens = self._desk.tokens = TokenBook() if publisher is not None and publish_tokens else None
        self._roster = Roster()
        self._witness = Witness(self.store, self._roster, self._spawn, end_frozen_writers=end_frozen_writers)
        self._housekeeping = Housekeeping(host.clock, self.store, self._witness, self.check_integrity, tick_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: Listener | None = None

    async def start(self, address: str) -> None:
        """Raises `OSError` when the address cannot be listened on, `DirectoryBusy` when another node has the disk's directory."""
        await self.removals.open()
        if self.disk is None:
            self.removals.without_disk()
        else:
            await self.disk.start()
        if self.peers is not None:
            self.peers.start()
        self._listener = await serve_channels(
            self._host, address, me=self._me, accept=ClientMessage, on_channel=self._serve, token=self._token
        )
        self._spawn(self._housekeeping.run(), "store housekeeping")
        self._spawn(self.removals.run(), "removals")
        if self._publisher is not None:
            below = (
                None if self.disk is None or self._disk_changes is None else (self.disk, self._disk_changes)
            )
            events = KVEvents(self._host, self.store.shelf, self._publisher, tokens=self._tokens, disk=below)
            self._spawn(events.run(), "kv events")
            if self._publisher.replay is not None:
                self._spawn(events.serve_replays(), "kv event replays")

    async def close(self) -> None:
        """Ends connections and tasks, writes what waits for the disk, and unmaps the slab. Idempotent."""
        if self._listener is not None:
            await self._listener.close()
            self._listener = None
        if self.peers is not None:
            await self.peers.close()
        if self.disk is not None:
            await self.disk.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._publisher is not None:
            self._publisher.close()
        self._witness.close()
        self._memory.close()

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the books do not balance."""
        self.store.check_integrity()
        if self.disk is not None:
            self.disk.check_integrity()

    # --- channels ------------------------------------------------------------------------------------------------

    async def _serve(self, channel: Channel) -> None:
        members: list[Member] = []
        try:
            async for received in channel.messages():
                await self._answer(channel, received, members)
        except ChannelClosed:
            pass
        finally:
            # No cleanup beyond this: the end of a connection proves nothing about its process.
            for member in members:
                member.connections -= 1

    async def _answer(self, channel: Channel, received: Received, members: list[Member]) -> None:
        if not isinstance(
            received.body, GetStats
        ):  # who scrapes often must not keep the books from being checked
            self._housekeeping.heard()
        for fd in received.fds:  # nobody has to send us any
            os.close(fd)
        try:
            if isinstance(received.body, Attach):
                await self._attach(channel, received, received.body, members)
                return
            member = members[0] if members else None
            if isinstance(received.body, Question):
                answer = await self._desk.answer(received.body, member)
            else:
                if isinstance(received.body, StartWrite) and received.body.wait_s:
                    await self._desk.wait_for_keys(received.body)
                answer = self._handle(received.body, member)
        except Refusal as refusal:
            self.store.counters["refused"] += 1
            await channel.fault(received, refusal.code, str(refusal), refusal.retryable)
        except InterlockError as error:
            self.store.counters["refused"] += 1
            await channel.fault(received, "refused", str(error), error.retryable)
        else:
            await channel.reply(received, answer)

    def _handle(self, body: object, member: Member | None) -> NodeMessage:
        """Raises `Refusal`."""
        match body:
            case Match():
                return self._match(body)
            case StartWrite():
                life = self._scheduler(member)
                self._check_tokens(body, life)
                grants = self.store.start_write(life, body, self._host.clock.monotonic_s())
                if self._tokens is not None and body.tokens:
                    for grant in grants:
                        self._tokens.learn(body.keys[grant.index], body.tokens[grant.index], body.tenant)
                under_way = self.store.count_under_way(body.keys) - len(grants)
                present = sum(map(self.store.shelf.__contains__, body.keys))
                return WriteStarted(self._slab, grants, under_way, present)
            case Report():
                self.store.report(self._rank(member), body)
                return Done(len(body.good))
            case AbortWrite():
                life = self._scheduler(member)
                self.store.abort(life, body.session, body.attempt, never_given=body.never_given)
                return Done(1)
            case Withdraw():
                self._attached(member)
                return Done(self.store.withdraw(body.keys, body.slots))
            case GetStats():
                below = self.disk.stats() if self.disk is not None else {}
                below |= self.peers.stats() if self.peers is not None else {}
                below |= self.removals.stats()
                return Stats(store_stats(self.store) | below)
            case _:
                raise Refusal("unknown_message", f"a {type(body).__name__} is nothing that a store answers")

    def _check_tokens(self, body: StartWrite, life: EngineLife) -> None:
        """Raises `Refusal`: readers cut an event's tokens into blocks, so each block has all of its own or none."""
        size = WORD_BYTES * life.layout.block_tokens
        if body.tokens and (
            len(body.tokens) != len(body.keys) or any(len(each) not in (0, size) for each in body.tokens)
        ):
            raise Refusal(
                "bad_start",
                f"tokens are of every block or none, {life.layout.block_tokens} a block of 4 bytes each",
            )

    def _match(self, body: Match) -> Matched:
        blocks = self.store.match(body.keys)
        coming = self.disk.promote(body.keys[len(blocks) :]) if self.disk is not None else 0
        if self.peers is not None:
            coming += self.peers.promote(body.keys[len(blocks) + coming :])
        layouts = self.store.shelf.layouts
        fitting = MATCHED_BYTES_MAX // max(map(_location_bytes, layouts), default=1)
        if len(blocks) > fitting:
            blocks, coming = blocks[:fitting], 0
        cuts = [layout.cuts for layout in layouts]
        return Matched.at(
            self._slab,
            [block.slot for block in blocks],
            [block.sums for block in blocks],
            [cuts[block.layout] for block in blocks],
            coming,
        )

    # --- attachment ----------------------------------------------------------------------------------------------

    async def _attach(
        self, channel: Channel, received: Received, body: Attach, members: list[Member]
    ) -> None:
        if members:
            raise Refusal("attached_already", f"this connection is {members[0].process} already")
        pid = self._witness.prove(channel)
        number = self.store.layout(body.layout)
        name = LifeName(body.engine, body.engine_incarnation)
        member = self._roster.attach(body, pid, number)
        for older in self._roster.older_lives(name):
            older.ended = True
            self.store.writer_gone(older.name)
        member.connections += 1
        members.append(member)
        attached = Attached(
            self._slab,
            self._memory.size_bytes,
            self.store.slots.slot_bytes(number),
            self.store.slots.capacity(number),
            self._tokens is not None,
        )
        if body.rank is None:
            await channel.reply(received, attached)
        elif body.writes:
            await channel.reply(received, attached, fds=(self._memory.fd,))
        else:
            fd = self._memory.open_read_only()
            try:
                await channel.reply(received, attached, fds=(fd,))
            finally:
                os.close(fd)

    def _attached(self, member: Member | None) -> Member:
        if member is None:
            raise Refusal(
                "not_attached", "this connection has not attached", retryable=True, hint="attach first"
            )
        return member

    def _scheduler(self, anybody: Member | None) -> EngineLife:
        member = self._attached(anybody)
        if not member.schedules:
            raise Refusal("not_scheduler", "only an engine's scheduler begins and ends write sessions")
        life = self._roster.get(member.life)
        if life is None:
            raise Refusal("life_ended", f"engine {member.life} is over")
        return life

    def _rank(self, anybody: Member | None) -> Member:
        member = self._attached(anybody)
        if member.rank is None:
            raise Refusal("not_rank", "only ranks report; this connection is a scheduler's")
        return member

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

"""The store node: owns one slab, answers its clients, and gives a slot to somebody else only on evidence.

Everything that is decided stands in `store/blocks` (blocks, slots, sessions) and `store/roster` (who is attached); this
driver turns messages, proven exits and the clock into their events. Each message is handled at once and without waiting,
so no two of them interleave; only the answer is awaited.

Evidence. When a process attaches, the node keeps the channel's watch on it (a pidfd, which outlives the channel and which
no pid used again can deceive). Its exit, and nothing else, ends the quarantine of what that process was given and did not
report on; the exit of a scheduler ends the sessions of its engine's life.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from interlock.core import limits
from interlock.core.errors import ChannelClosed, InterlockError
from interlock.core.sessions import SlabName
from interlock.host.base import Host, Listener, SharedMemory, Watch
from interlock.host.publisher import Publisher
from interlock.store.blocks import BlockStore
from interlock.store.desk import Desk, Question
from interlock.store.kv_events import KVEvents
from interlock.store.metrics import store_stats
from interlock.store.packs.state import Emit
from interlock.store.packs.tier import DiskTier
from interlock.store.peers import PeerTier
from interlock.store.refusal import Refusal
from interlock.store.roster import EngineLife, LifeName, Member, Roster
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
    Location,
    Match,
    Matched,
    NodeMessage,
    Report,
    StartWrite,
    Stats,
    Withdraw,
    WriteStarted,
)

TICK_SECONDS = 0.5
IDLE_SECONDS = 5.0
CHECKED_SLOTS_MAX = 16384
"""Looking at more than that takes tens of milliseconds, in which no look-up is answered."""
_log = logging.getLogger(__name__)


class DiskConfig(msgspec.Struct, frozen=True):
    """Where blocks go that leave RAM, and how many bytes they may take there."""

    path: Path
    bytes_max: int
    index_records_min: int = limits.DISK_INDEX_RECORDS_MIN


MATCHED_BYTES_MAX = limits.FRAME_BYTES_MAX // 2
"""A longer answer is cut: what does not fit is a miss."""
_LOCATION_BYTES = 24


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
    ) -> None:
        """`peers`: a started engine of the same identity as `me`, and the names of other nodes, whose blocks come up from there."""
        self._host = host
        self._me = me
        self._memory = memory
        self._token = token
        self._tick_s = tick_s
        self._slab = slab
        self._incarnation = me.incarnation
        self.store = BlockStore(
            SlabName(me.incarnation, slab), memory.size_bytes, join_s=join_s, quotas=quotas
        )
        self._desk = Desk(host, self.store, memory.view)
        self.disk: DiskTier | None = None
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
            )
        self.peers: PeerTier | None = None
        if peers is not None:
            self.peers = PeerTier(host, *peers, self.store, self._desk, memory)
        self._publisher = publisher
        self._end_frozen_writers = end_frozen_writers
        self._roster = Roster()
        self._watches: dict[int, Watch] = {}
        self._told_frozen: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: Listener | None = None
        self._heard_s: float | None = None
        """When a message came, or None: the books were checked since then."""

    async def start(self, address: str) -> None:
        """Raises `OSError` when the address cannot be listened on, `DirectoryBusy` when another node has the disk's directory."""
        if self.disk is not None:
            await self.disk.start()
        if self.peers is not None:
            self.peers.start()
        self._listener = await serve_channels(
            self._host, address, me=self._me, accept=ClientMessage, on_channel=self._serve, token=self._token
        )
        self._spawn(self._tick(), "store tick")
        if self._publisher is not None:
            events = KVEvents(self._host, self.store.shelf, self._publisher)
            self._spawn(events.run(), "kv events")
            if self._publisher.replay is not None:
                self._spawn(events.serve_replays(), "kv event replays")

    async def close(self) -> None:
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
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()
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
        # Who scrapes often must not keep the books from being checked.
        if not isinstance(received.body, GetStats):
            self._heard_s = self._host.clock.monotonic_s()
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
                grants = self.store.start_write(life, body, self._host.clock.monotonic_s())
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
                return Stats(store_stats(self.store) | below)
            case _:
                raise Refusal("unknown_message", f"a {type(body).__name__} is nothing that a store answers")

    def _match(self, body: Match) -> Matched:
        blocks = self.store.match(body.keys)
        coming = self.disk.promote(body.keys[len(blocks) :]) if self.disk is not None else 0
        if self.peers is not None:
            coming += self.peers.promote(body.keys[len(blocks) + coming :])
        if blocks:
            each = _LOCATION_BYTES + max(len(block.sums) for block in blocks)
            if len(blocks) > MATCHED_BYTES_MAX // each:
                blocks, coming = blocks[: MATCHED_BYTES_MAX // each], 0
        layouts = {
            number: self.store.shelf.layout_of(number) for number in {block.layout for block in blocks}
        }
        cuts = {number: list(layout.cuts) for number, layout in layouts.items()}
        return Matched(
            self._slab,
            [Location(b.slot, b.sums, cuts[b.layout]) for b in blocks],
            coming,
        )

    # --- attachment ----------------------------------------------------------------------------------------------

    async def _attach(
        self, channel: Channel, received: Received, body: Attach, members: list[Member]
    ) -> None:
        if members:
            raise Refusal("attached_already", f"this connection is {members[0].process} already")
        pid = self._prove(channel)
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

    def _prove(self, channel: Channel) -> int:
        """The process at the other end, of whose exit we will have proof from now on. Raises `Refusal` without."""
        watch = channel.peer_process
        if watch is None or watch.exited:
            raise Refusal(
                "no_proof",
                "this node cannot prove the exit of the process that wants to attach, so it gets no slots",
                hint="connect over the node's Unix socket, from the same PID namespace",
            )
        known = self._watches.get(watch.pid)
        if known is not None and not known.exited:
            return watch.pid
        if known is not None:  # its pid was used again before the loop told us
            self._gone(known)
        self._watches[watch.pid] = watch
        self._spawn(self._await_exit(watch), f"exit of {watch.pid}")
        return watch.pid

    async def _await_exit(self, watch: Watch) -> None:
        with contextlib.suppress(ConnectionError):
            await watch.wait_exited()
        if watch.exited:
            self._gone(watch)

    def _gone(self, watch: Watch) -> None:
        if self._watches.get(watch.pid) is not watch:
            return
        del self._watches[watch.pid]
        self._told_frozen.discard(watch.pid)
        for member in self._roster.exited(watch.pid):
            self.store.process_gone(member)
            if member.schedules:
                self.store.writer_gone(member.life)
        watch.close()

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

    # --- time ----------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await self._host.clock.sleep_s(self._tick_s)
            try:
                now_s = self._host.clock.monotonic_s()
                self.store.tick(now_s)
                self._end_frozen(now_s)
                self._check_when_idle(now_s)
            except Exception:  # a defect of ours: without ticks no deadline would ever pass again
                self.store.counters["internal_errors"] += 1
                _log.exception("a tick of the store failed")

    def _end_frozen(self, now_s: float) -> None:
        """Asks the kernel to end those whose silence keeps more of the slab than may wait; their exit frees it."""
        frozen = self.store.frozen_writers(now_s)
        self.store.counters["writers_frozen"] = len(frozen)
        for pid in sorted({pid for name in frozen if (pid := self._roster.pid_of(name)) is not None}):
            watch = self._watches.get(pid)
            if watch is None or pid in self._told_frozen:
                continue
            self._told_frozen.add(pid)
            names = ", ".join(sorted(name for name in frozen if self._roster.pid_of(name) == pid))
            _log.error(
                "%s keeps slots of ended sessions, neither reporting nor exiting, and more than %.0f%% of the slab waits: %s",
                names,
                limits.QUARANTINE_SHARE_MAX * 100,
                "it is ended" if self._end_frozen_writers else "end it, nothing is saved until then",
            )
            if self._end_frozen_writers:
                watch.kill()
                self.store.counters["writers_ended"] += 1

    def _check_when_idle(self, now_s: float) -> None:
        """Once after each burst of messages: do the books balance? A metric says when they did not."""
        if self._heard_s is None or now_s - self._heard_s < IDLE_SECONDS:
            return
        self._heard_s = None
        if sum(self.store.slots.count.values()) > CHECKED_SLOTS_MAX:
            return
        try:
            self.check_integrity()
        except AssertionError:
            self.store.counters["integrity_failures"] += 1
            _log.exception("the store's books do not balance")

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

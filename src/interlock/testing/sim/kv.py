"""Simulated users of a store node: an engine's scheduler and its ranks, a process each, moving real bytes on the real wire.

They keep the rules of `store/client` and of the connector on asynchronous channels: a rank reports what it was given exactly
once, repeated until it is acknowledged; a scheduler whose question was not answered in time says `never_given`. Contents are a
function of (key, head), so whoever reads a byte that somebody else wrote into the slot sees it.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from interlock.core.errors import ChannelFault, InterlockError
from interlock.core.layouts import KVLayout, Shard, shard_of_rank
from interlock.core.limits import SLOT_GRAIN_BYTES
from interlock.core.packed_sums import pack_sums
from interlock.core.prefixes import chain_keys
from interlock.store.checksums import Binding, head_checksum, verify_block
from interlock.testing.sim.host import Pages, SimHost
from interlock.wire.channel import Channel, connect_channel
from interlock.wire.identity import Identity
from interlock.wire.locations import Location
from interlock.wire.store_messages import (
    AbortWrite,
    Attach,
    Attached,
    Match,
    Matched,
    NodeMessage,
    Report,
    StartWrite,
    Withdraw,
    WriteStarted,
)

if TYPE_CHECKING:
    from interlock.testing.sim.worlds import World

LAYOUT = KVLayout(layers=2, heads=2, block_tokens=4, content=64, dtype="float32")
SLAB_BYTES = 40 * SLOT_GRAIN_BYTES
SALT = hashlib.blake2b(b"simulated", digest_size=32).digest()
STORE = "unix:/run/store.sock"
ASK_SECONDS = 0.25
ATTACH_SECONDS = 2.0
RETRY_SECONDS = 0.2


@functools.lru_cache(maxsize=4096)
def content(key: bytes, head: int) -> bytes:
    """What stands in a block of that key, for one head."""
    return hashlib.shake_128(key + bytes([head])).digest(LAYOUT.head_bytes)


class Link(msgspec.Struct, eq=False):
    """Being attached to one life of the node."""

    channel: Channel
    slab: int
    pages: Pages | None


class Save(msgspec.Struct):
    """One session's blocks, as a scheduler tells its ranks."""

    session: str
    attempt: int
    node_incarnation: int
    slab: int
    blocks: list[tuple[bytes, int]]


class Load(msgspec.Struct):
    """Blocks to read: key, slot, checksums of all heads."""

    node_incarnation: int
    slab: int
    blocks: list[tuple[bytes, Location]]


class StoreUser:
    """A process attached to the node; attaches again whenever it must."""

    def __init__(self, host: SimHost, me: Identity, attach: Attach) -> None:
        self.host, self.me, self.attach = host, me, attach
        self._link: Link | None = None

    async def link(self) -> Link:
        """Attached now, however long that takes."""
        while self._link is None or self._link.channel.closed is not None:
            try:
                self._link = await self._connect()
            except (OSError, TimeoutError, InterlockError):
                await self.host.clock.sleep_s(RETRY_SECONDS)
        return self._link

    async def keep(self) -> None:
        """As the real client's keeper: attaches by itself, and asks now and then whether the node is still there."""
        while True:
            link = await self.link()
            try:
                await link.channel.request(Match([]), 4 * ASK_SECONDS)
            except (OSError, TimeoutError, InterlockError):
                await self.drop(link)
            await self.host.clock.sleep_s(RETRY_SECONDS)

    async def drop(self, link: Link) -> None:
        """The connection is no good."""
        await link.channel.close()

    async def insist(self, slab: int, body: Report | AbortWrite | Withdraw) -> None:
        """Until acknowledged or refused, or nobody waits for it: the slab is gone."""
        while True:
            link = await self.link()
            if link.slab != slab:
                return
            try:
                await link.channel.request(body, 4 * ASK_SECONDS)
            except ChannelFault:
                return
            except (OSError, TimeoutError, InterlockError):
                await self.drop(link)
                await self.host.clock.sleep_s(RETRY_SECONDS)
            else:
                return

    async def _connect(self) -> Link:
        channel = await connect_channel(
            self.host, STORE, me=self.me, role="store-client", accept=NodeMessage, deadline_s=ATTACH_SECONDS
        )
        try:
            answer = await channel.request(self.attach, ATTACH_SECONDS)
            assert isinstance(answer, Attached)
            fds = channel.take_fds()
            pages = self.host.map_memory(fds[0]).pages if fds else None
        except BaseException:
            await channel.close()
            raise
        return Link(channel, answer.slab, pages)


class Rank:
    """One tensor-parallel rank: copies its heads into slots, and out of them."""

    def __init__(self, world: World, host: SimHost, engine: str, life: int, rank: int, ranks: int) -> None:
        self._world, self._host, self._rank = world, host, rank
        self._shard: Shard = shard_of_rank(rank, ranks, layers=LAYOUT.layers, heads=LAYOUT.heads)
        me = Identity(f"{engine}-r{rank}", life, bytes([rank + 1]))
        self.user = StoreUser(host, me, Attach(engine, life, rank, ranks, LAYOUT))
        self.jobs: asyncio.Queue[Save | Load] = asyncio.Queue()

    async def run(self) -> int:
        self._host.process.run(self.user.keep, "keeper")
        while True:
            job = await self.jobs.get()
            if isinstance(job, Save):
                await self._save(job)
            else:
                await self._load(job)

    async def _save(self, job: Save) -> None:
        link = await self.user.link()
        rng = self._host.process.kernel.rng
        good: list[bool] = []
        sums: list[list[int]] = []
        for key, slot in job.blocks:
            fit = link.slab == job.slab and link.pages is not None and rng.random() > 0.03
            good.append(fit)
            sums.append([])
            if fit and link.pages is not None:
                self._world.touches(self._host.process, job.slab, slot, job.session)
                sums[-1] = await self._write(link.pages, Binding(key, slot, job.node_incarnation, job.slab))
        self._world.promised(self._host.process, job.slab, [slot for _, slot in job.blocks])
        if not self._shard.area:
            good, sums = [], []
        packed = [pack_sums(each) for each in sums]
        report = Report(job.session, job.attempt, self._rank, job.node_incarnation, job.slab, good, packed)
        await self.user.insist(job.slab, report)

    async def _write(self, pages: Pages, where: Binding) -> list[int]:
        sums = []
        for head in range(self._shard.head_start, self._shard.head_stop):
            data = content(where.key, head)
            at = where.slot * SLOT_GRAIN_BYTES + head * LAYOUT.head_bytes
            half = len(data) // 2
            pages.data[at : at + half] = data[:half]
            await self._host.clock.sleep_s(self._host.process.kernel.rng.random() * 0.01)
            pages.data[at + half : at + len(data)] = data[half:]
            sums.append(head_checksum(where, head, data))
        return sums

    async def _load(self, job: Load) -> None:
        link = await self.user.link()
        if link.slab != job.slab or link.pages is None or not self._shard.area:
            return
        start, stop = self._shard.head_start, self._shard.head_stop
        for key, location in job.blocks:
            at = location.slot * SLOT_GRAIN_BYTES
            first, last = at + start * LAYOUT.head_bytes, at + stop * LAYOUT.head_bytes
            middle = (first + last) // 2
            staging = bytes(link.pages.data[first:middle])
            await self._host.clock.sleep_s(self._host.process.kernel.rng.random() * 0.01)
            staging += bytes(link.pages.data[middle:last])
            binding = Binding(key, location.slot, job.node_incarnation, job.slab)
            if verify_block(binding, LAYOUT, staging, location.checksums, head_start=start, head_stop=stop):
                self._world.loaded(self._host.process, key, staging, start, stop)
            else:
                await self.user.insist(job.slab, Withdraw([key], [location.slot]))


class Scheduler:
    """An engine's scheduler side: looks up, begins write sessions, tells the ranks."""

    def __init__(self, world: World, host: SimHost, engine: str, life: int, ranks: Sequence[Rank]) -> None:
        self._world, self._host, self._ranks = world, host, ranks
        me = Identity(engine, life, b"s")
        self.user = StoreUser(host, me, Attach(engine, life, None, len(ranks), LAYOUT))
        self._sessions = 0
        self._life = life

    async def run(self) -> int:
        rng = self._host.process.kernel.rng
        while not self._world.calm:
            await self._host.clock.sleep_s(rng.uniform(0.02, 0.4))
            family, length = int(rng.random() * 4), 1 + int(rng.random() * 8)
            await self.turn([family + 1] * 4 + [int(rng.random() * 3) for _ in range(4 * length)])
        await self._probe()
        self._world.probed(self._host.process.name)
        await asyncio.Event().wait()
        return 0

    async def _probe(self) -> None:
        """After the faults: a prompt nobody had is saved, and found."""
        tokens = [1000 + self._life, *self._host.process.name.encode()][:8]
        while await self.turn(tokens + [7] * (8 - len(tokens))) < 2:
            await self._host.clock.sleep_s(0.5)

    async def turn(self, tokens: list[int]) -> int:
        """One request's look-up and save; how many blocks were found."""
        keys = chain_keys(tokens, LAYOUT.block_tokens, SALT)
        link = await self.user.link()
        node = link.channel.peer.incarnation
        try:
            found = await link.channel.request(Match(keys), ASK_SECONDS)
        except (OSError, TimeoutError, InterlockError):
            await self.user.drop(link)
            return 0
        assert isinstance(found, Matched)
        hits = found.locations
        if hits:
            self._tell(Load(node, link.slab, list(zip(keys, hits, strict=False))))
        await self._save(link, node, keys, len(hits))
        return len(hits)

    async def _save(self, link: Link, node: int, keys: list[bytes], known: int) -> None:
        rest, parents = keys[known:], [b"", *keys][known : len(keys)]
        if not rest:
            return
        self._sessions += 1
        session = f"s{self._sessions}"
        try:
            started = await link.channel.request(StartWrite(session, 1, rest, parents), ASK_SECONDS)
        except ChannelFault:
            return
        except (OSError, TimeoutError, InterlockError):
            task = self.user.insist(link.slab, AbortWrite(session, 1, never_given=True))
            self._host.process.run(lambda: task, "never given")
            return
        assert isinstance(started, WriteStarted)
        if started.grants:
            blocks = [(rest[grant.index], grant.slot) for grant in started.grants]
            self._tell(Save(session, 1, node, started.slab, blocks))
            if self._host.process.kernel.rng.random() < 0.1:
                await self.user.insist(link.slab, AbortWrite(session, 1))

    def _tell(self, job: Save | Load) -> None:
        """The engine's own way to its ranks: in order, at its own pace."""
        for rank in self._ranks:
            self._host.process.kernel.loop.later(0.001, rank.jobs.put_nowait, job)

"""Users of the store through the real, synchronous `StoreClient`: an engine's scheduler and its ranks, threads of a process each.

What `kv.py` does on asynchronous channels of its own, here the client does: its keeper connects, attaches again and delivers
what must not be lost, its breaker turns a slow node into misses. Only where the bytes go and come from is made up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from interlock.core.layouts import shard_of_rank
from interlock.core.prefixes import chain_keys
from interlock.store.checksums import Binding, head_checksum, verify_block
from interlock.store.client import MatchResult, StoreClient, WriteGrant
from interlock.store.mapping import MappedSlab
from interlock.testing.sim.host import SimHost
from interlock.testing.sim.kv import ASK_SECONDS, LAYOUT, SALT, STORE, content
from interlock.testing.sim.threads import SimThread, current_thread, sleep_s
from interlock.wire.identity import Identity
from interlock.wire.store_messages import Attach

if TYPE_CHECKING:
    from interlock.testing.sim.worlds import World


class Save(msgspec.Struct):
    """One session's blocks, as a scheduler tells its ranks."""

    grant: WriteGrant
    keys: list[bytes]


class Load(msgspec.Struct):
    """Blocks to read."""

    found: MatchResult
    keys: list[bytes]


class Rank:
    """One tensor-parallel rank on a thread of its own: copies its heads into slots, and out of them."""

    def __init__(self, world: World, host: SimHost, engine: str, life: int, rank: int, ranks: int) -> None:
        self._world, self._host, self._rank = world, host, rank
        self._shard = shard_of_rank(rank, ranks, layers=LAYOUT.layers, heads=LAYOUT.heads)
        me = Identity(f"{engine}-r{rank}", life, bytes([rank + 1]))
        self._about = me, Attach(engine, life, rank, ranks, LAYOUT)
        self._jobs: deque[Save | Load] = deque()
        self._waiting: asyncio.Future[None] | None = None

    async def run(self) -> int:
        await SimThread(self._host.process, "rank", self._work).run()
        return 1

    def give(self, job: Save | Load) -> None:
        """From the engine's own way to its ranks."""
        self._jobs.append(job)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _work(self) -> None:
        self.client = StoreClient(STORE, *self._about, lookup_timeout_s=ASK_SECONDS)
        self.client.start()
        while True:
            while not self._jobs:
                self._waiting = self._host.process.kernel.loop.create_future()
                current_thread().park(self._waiting, None)
            job = self._jobs.popleft()
            if isinstance(job, Save):
                self._save(job)
            else:
                self._load(job)

    def _save(self, job: Save) -> None:
        process, grant = self._host.process, job.grant
        mapped = self.client.slab_of(grant.slab)
        good: list[bool] = []
        sums: list[list[int]] = []
        for each in grant.grants:
            fit = mapped is not None and process.kernel.rng.random() > 0.03
            good.append(fit)
            sums.append([])
            if fit and mapped is not None:
                self._world.touches(process, grant.slab, each.slot, grant.session)
                sums[-1] = self._write(mapped, job.keys[each.index], each.slot)
        self._world.promised(process, grant.slab, [each.slot for each in grant.grants])
        if not self._shard.area:
            good, sums = [], []
        self.client.report(grant, self._rank, good, sums)

    def _write(self, mapped: MappedSlab, key: bytes, slot: int) -> list[int]:
        sums = []
        for head in range(self._shard.head_start, self._shard.head_stop):
            data, memory = content(key, head), mapped.heads(slot, head, head + 1)
            half = len(data) // 2
            memory[:half] = data[:half]
            self._pause()
            memory[half:] = data[half:]
            sums.append(head_checksum(mapped.binding(key, slot), head, data))
        return sums

    def _load(self, job: Load) -> None:
        mapped = self.client.slab_of(job.found.slab)
        if mapped is None or not self._shard.area:
            return
        start, stop = self._shard.head_start, self._shard.head_stop
        for key, location in zip(job.keys, job.found.locations, strict=False):
            memory = mapped.heads(location.slot, start, stop)
            half = len(memory) // 2
            staging = bytes(memory[:half])
            self._pause()
            staging += bytes(memory[half:])
            binding: Binding = mapped.binding(key, location.slot)
            if verify_block(binding, LAYOUT, staging, location.checksums, head_start=start, head_stop=stop):
                self._world.loaded(self._host.process, key, staging, start, stop)
            else:
                self.client.withdraw(job.found.slab, [key], [location.slot])

    def _pause(self) -> None:
        sleep_s(self._host.process.kernel.rng.random() * 0.01)


class Scheduler:
    """An engine's scheduler side: looks up, begins write sessions, tells the ranks; a thread, as vLLM's is."""

    def __init__(self, world: World, host: SimHost, engine: str, life: int, ranks: Sequence[Rank]) -> None:
        self._world, self._host, self._ranks, self._life = world, host, ranks, life
        self._about = Identity(engine, life, b"s"), Attach(engine, life, None, len(ranks), LAYOUT)
        self._sessions = 0

    async def run(self) -> int:
        await SimThread(self._host.process, "scheduler", self._work).run()
        await asyncio.Event().wait()
        return 0

    def _work(self) -> None:
        rng = self._host.process.kernel.rng
        self.client = StoreClient(STORE, *self._about, lookup_timeout_s=ASK_SECONDS)
        self.client.start()
        while not self._world.calm:
            sleep_s(rng.uniform(0.02, 0.4))
            family, length = int(rng.random() * 4), 1 + int(rng.random() * 8)
            self.turn([family + 1] * 4 + [int(rng.random() * 3) for _ in range(4 * length)])
        tokens = [1000 + self._life, *self._host.process.name.encode()][:8]
        while self.turn(tokens + [7] * (8 - len(tokens))) < 2:
            sleep_s(0.5)
        self._world.probed(self._host.process.name)

    def turn(self, tokens: list[int]) -> int:
        """One request's look-up and save; how many blocks were found."""
        keys = chain_keys(tokens, LAYOUT.block_tokens, SALT)
        found = self.client.match(keys)
        known = len(found.locations) if found is not None else 0
        if found is not None and known:
            self._tell(Load(found, keys))
        rest, parents = keys[known:], [b"", *keys][known : len(keys)]
        if rest:
            self._save(rest, parents)
        return known

    def _save(self, keys: list[bytes], parents: list[bytes]) -> None:
        self._sessions += 1
        session = f"s{self._sessions}"
        grant = self.client.start_write(session, 1, keys, parents)
        if grant is not None and grant.grants:
            self._tell(Save(grant, keys))
            if self._host.process.kernel.rng.random() < 0.1:
                self.client.abort_write(session, 1)

    def _tell(self, job: Save | Load) -> None:
        """The engine's own way to its ranks: in order, at its own pace."""
        for rank in self._ranks:
            self._host.process.kernel.loop.later(0.001, rank.give, job)

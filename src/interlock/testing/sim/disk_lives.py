"""The disk tier through one life after another: what each life leaves to the next by crash, power cut and rot.

A dedicated harness, thousands of lives a minute: the real `DiskTier` over the real `BlockStore`, on a simulated platter, without
sockets or fleets. Each life opens what the last one left, publishes blocks whose bytes are a function of their key, asks for old
ones, and ends: it closes, it dies inside any call to the disk, or the power fails with whatever was not synced torn and reordered.
Between lives bits flip, files are cut short, strangers' files appear; within them the disk fills up and fails.

Checked: what is published after a promotion is exactly what was saved under that key (bytes and checksums); what a deleted tenant had stored
never comes up again; slots balance after
every step; at rest the books name the files that are there and the bound in bytes is kept; a life after faults works again.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import hashlib
import itertools
import logging
import random
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import msgspec

from interlock.core.layouts import KVLayout
from interlock.core.packed_sums import pack_sums
from interlock.core.prefixes import Block
from interlock.core.sessions import SlabName
from interlock.store.blocks import BlockStore
from interlock.store.checksums import Binding, block_checksums, verify_block
from interlock.store.packs.tier import DiskTier
from interlock.testing.sim.directories import SimDirectory
from interlock.testing.sim.disk import SimDisk
from interlock.testing.sim.kernel import ProcessEnded
from interlock.testing.sim.loop import SimLoop

T = TypeVar("T")
LAYOUTS = (
    KVLayout(layers=1, heads=2, block_tokens=4, content=8, dtype="float32"),
    KVLayout(layers=2, heads=1, block_tokens=16, content=64, dtype="float32", cuts=(1,)),
)
SLAB_PAGES = 48
"""Sixteen extents of three pages."""
PAGE = 4096
DISK_BYTES = 40 * PAGE
CHAINS, CHAIN_BLOCKS = 6, 8
STEPS_MAX = 20
PATH = Path("/kv")


class Outcome(msgspec.Struct):
    """What the lives of one seed did. `wrong` is empty, or the harness has found something."""

    seed: int
    lives: int = 0
    crashes: int = 0
    power_cuts: int = 0
    published: int = 0
    promoted: int = 0
    written: int = 0
    evicted: int = 0
    repaired: int = 0
    bad_blocks: int = 0
    packs_aside: int = 0
    deleted: int = 0
    wrong: list[str] = msgspec.field(default_factory=list)

    def add(self, other: Outcome) -> None:
        for field in msgspec.structs.fields(Outcome):
            if field.name != "seed":
                setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class _Clock:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def monotonic_s(self) -> float:
        return self._loop.time()

    def wall_ns(self) -> int:
        return int(self._loop.time() * 1e9)

    async def sleep_s(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Host:
    """As much of a `Host` as the disk tier asks for. A call in a thread is one step, at some moment."""

    def __init__(self, loop: asyncio.AbstractEventLoop, life: Life) -> None:
        self.clock = _Clock(loop)
        self._life = life

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        await asyncio.sleep(self._life.rng.random() * 0.01)
        if self._life.dead:
            await asyncio.Event().wait()
        try:
            result = function(*args)
        except ProcessEnded:
            self._life.dead = True
            self._life.died.set()
            await asyncio.Event().wait()
            raise
        await asyncio.sleep(self._life.rng.random() * 0.01)
        return result

    def open_directory(self, path: Path, owner: str) -> SimDirectory:
        process: Any = self._life  # as much of a process as it asks for
        return SimDirectory(process, path, owner)


@functools.cache
def chain_of(number: int, generation: int = 0) -> list[bytes]:
    """A chain of one tenant's; after his deletion he stores others."""
    names = [b"%d/%d/%d" % (generation, number, i) for i in range(CHAIN_BLOCKS)]
    return [hashlib.blake2b(name, digest_size=32).digest() for name in names]


class Tenants:
    """Who stores what on one disk: each chain is one tenant's, and what was stored before his deletion must not come back."""

    def __init__(self) -> None:
        self.generation = [0] * CHAINS
        self._live = {key: n for n in range(CHAINS) for key in chain_of(n)}

    def chain(self, number: int, rng: random.Random) -> list[bytes]:
        """What he stores now, or (whoever asks) what he stored before."""
        return chain_of(number, rng.randrange(self.generation[number] + 1))

    def now(self, number: int) -> list[bytes]:
        return chain_of(number, self.generation[number])

    def deleted(self, number: int) -> None:
        self._live = {key: n for key, n in self._live.items() if n != number}
        self.generation[number] += 1
        self._live.update(dict.fromkeys(self.now(number), number))

    def allows(self, key: bytes) -> bool:
        return key in self._live


@functools.cache
def bytes_of(key: bytes, layout: KVLayout) -> bytes:
    """What every engine would compute for that key."""
    return hashlib.shake_128(key).digest(layout.block_bytes)


class Slab:
    """As much of a `SharedMemory` as the disk tier asks for."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def read_into(self, offset: int, into: memoryview) -> None:
        into[:] = self._view[offset : offset + len(into)]

    def write_at(self, offset: int, data: memoryview) -> None:
        self._view[offset : offset + len(data)] = data


class Life:
    """One life of a node over the platter."""

    def __init__(
        self, disk: SimDisk, rng: random.Random, incarnation: int, outcome: Outcome, tenants: Tenants
    ) -> None:
        self.disk, self.rng, self.outcome, self.tenants = disk, rng, outcome, tenants
        self.machine = SimpleNamespace(disk=disk)
        self.die_at_disk = None
        self._seen: set[tuple[bytes, int]] = set()
        self.incarnation = incarnation
        self.dead = False
        self.calls_left = rng.randrange(40) if rng.random() < 0.95 else 1 << 30
        """Calls to the disk until it dies in one."""
        self.slab = memoryview(bytearray(SLAB_PAGES * PAGE))

    def at_disk(self, call: str) -> None:
        del call
        self.calls_left -= 1
        if self.calls_left < 0:
            raise ProcessEnded

    async def live(self) -> None:
        self.died = asyncio.Event()
        host: Any = _Host(asyncio.get_running_loop(), self)
        self.store = BlockStore(SlabName(self.incarnation, self.incarnation + 7), len(self.slab))
        slab: Any = Slab(self.slab)
        self.tier = DiskTier(
            host, PATH, DISK_BYTES, self.store, slab, owner=f"life {self.incarnation}", records_min=64
        )
        try:
            await self._until_dead(self._work())
        finally:
            self.outcome.lives += 1
            if self.tier.state is not None:
                counters = self.tier.state.counters
                for name in ("written", "evicted", "repaired", "packs_aside", "promoted"):
                    setattr(self.outcome, name, getattr(self.outcome, name) + counters[name])
                self.outcome.bad_blocks += counters["blocks_bad"]

    async def _until_dead(self, work: Any) -> None:
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self.died.wait())]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        others = asyncio.all_tasks() - {asyncio.current_task()} - done
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for task in done:
            task.result()

    async def _work(self) -> None:
        await self.tier.start()
        for _ in range(self.rng.randrange(1, STEPS_MAX)):
            await self._step()
            self.store.check_integrity()
            self.tier.check_integrity()
            self._check_published()
        if self.rng.random() < 0.3:
            self._relent()
            await self._rest()
        self._check_published(everything=True)
        await self.tier.close()

    async def _step(self) -> None:
        choice = self.rng.random()
        number = self.rng.randrange(CHAINS)
        keys = self.tenants.chain(number, self.rng)
        if choice < 0.4:
            self._publish(self.tenants.now(number), str(number))
        elif choice < 0.75:
            self._ask(keys)
        elif choice < 0.8:
            await self.tier.flush(5.0)
        elif choice < 0.82:
            await self.tier.clear()
        elif choice < 0.85:
            await self.tier.remove([self.rng.choice(keys)])
        elif choice < 0.88:
            self.disk.full = True
        elif choice < 0.91:
            self.disk.failing = 0.2
        elif choice < 0.94:
            self._relent()
        elif choice < 0.955:
            await self._delete_tenant(number)
        elif choice < 0.97 and self.disk.names:
            self.disk.flip_bit(self.rng.choice(list(self.disk.names)))
        await asyncio.sleep(self.rng.choice([0.0, 0.01, 0.1, 3.0]))

    async def _delete_tenant(self, number: int) -> None:
        """As a node does. Said to be done, it is so for ever; until it is, nothing of it comes up."""
        self.store.promotions.holds = lambda _, tenant: tenant == str(number)

        def wanted(block: Any) -> bool:
            return bool(block.tenant == str(number))

        for block in [block for block in self.store.shelf if wanted(block)]:
            self.store.shelf.withdraw(block.key, block.slot)
        _, whole = await self.tier.sweep(wanted)
        self.store.promotions.holds = lambda *_: False
        if whole:
            self.tenants.deleted(number)
            self.outcome.deleted += 1

    def _publish(self, keys: list[bytes], tenant: str) -> None:
        """Saves a prefix as a session of the whole block's writer would: the slot, its bytes, their checksums."""
        layout = LAYOUTS[keys[0][0] % 2]
        number = self.store.layout(layout)
        for i, key in enumerate(keys[: self.rng.randrange(1, CHAIN_BLOCKS + 1)]):
            if key in self.store.shelf or self.store.under_way(key):
                continue
            parent = keys[i - 1] if i else b""
            slots = self.store.shelf.take_slots(number, [parent], tenant)
            if not slots:
                return
            binding = Binding(key, slots[0], self.incarnation, self.incarnation + 7)
            data = bytes_of(key, layout)
            self.slab[slots[0] * PAGE : slots[0] * PAGE + len(data)] = data
            sums = pack_sums(block_checksums(binding, layout, data))
            block = Block(key, parent, number, slots[0], sums, tenant)
            self.store.shelf.publish([block])
            self.store.on_publish(block)
            self.outcome.published += 1

    def _ask(self, keys: list[bytes]) -> None:
        found = len(self.store.match(keys))
        self.tier.promote(keys[found:])

    def _relent(self) -> None:
        self.disk.failing, self.disk.full = 0.0, False

    async def _rest(self) -> None:
        """When nothing fails any more and nothing is under way, the books tell the truth about the files."""
        await asyncio.sleep(70.0)
        assert self.tier.state is not None, f"the disk works again and is not open: {self.tier.error}"
        assert self.tier.scan is not None
        assert self.tier.scan.done.is_set()
        assert await self.tier.flush(10.0)
        await asyncio.sleep(5.0)  # the index may have grown with it
        await self.tier.check_files()
        assert self.tier.state.reads.state == "ok" or not len(self.tier.state.books.packs)
        assert self.tier.state.writes.state == "ok", "a disk that works again is not used again"
        assert self.tier.state.books.packs.bytes + self.tier.state.books.index.size_bytes <= DISK_BYTES
        assert len(self.tier.promoter or ()) == 0

    def _check_published(self, *, everything: bool = False) -> None:
        """What is new since the last time, or all of it."""
        for block in self.store.shelf:
            if not everything and (block.key, block.slot) in self._seen:
                continue
            self._seen.add((block.key, block.slot))
            layout = self.store.shelf.layouts[block.layout]
            data = self.slab[block.slot * PAGE : block.slot * PAGE + layout.block_bytes]
            binding = Binding(block.key, block.slot, self.incarnation, self.incarnation + 7)
            if bytes(data) != bytes_of(block.key, layout):
                self.outcome.wrong.append(f"life {self.incarnation}: wrong bytes under {block.key.hex()[:8]}")
            if not self.tenants.allows(block.key):
                self.outcome.wrong.append(f"life {self.incarnation}: {block.key.hex()[:8]} was deleted")
            if not verify_block(binding, layout, data, block.checksums):
                self.outcome.wrong.append(f"life {self.incarnation}: {block.key.hex()[:8]} fails its check")


def _between(disk: SimDisk, rng: random.Random, outcome: Outcome, *, died: bool) -> None:
    """What happens to a disk while nobody has it."""
    if died:
        outcome.crashes += 1
        if rng.random() < 0.5:
            outcome.power_cuts += 1
            disk.power_cut()
    names = [name for name in disk.names if name.endswith((".safetensors", ".gone", "index"))]
    if names and rng.random() < 0.1:
        disk.flip_bit(rng.choice(names))
    if names and rng.random() < 0.05:
        file = disk.names[rng.choice(names)]
        file.now = file.durable = file.now[: rng.randrange(file.size + 1)]
    if len(names) > 1 and rng.random() < 0.03:  # somebody copied one file over another
        one, other = rng.sample(names, 2)
        disk.names[one].now = disk.names[one].durable = disk.names[other].now


def run_seeds(first: int, crashes: int, lives: int) -> Outcome:
    """Seeds from `first` on until so many lives have crashed, or something is wrong."""
    total = Outcome(first)
    for seed in itertools.count(first):
        total.add(live_through(seed, lives))
        if total.wrong:
            total.wrong.append(f"of seed {seed}")
            return total
        if total.crashes >= crashes:
            return total
    raise AssertionError("seeds do not end")


def main() -> int:
    """`python -m interlock.testing.sim.disk_lives --crashes 100000`: part of `make long`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--crashes", type=int, default=100_000, help="lives that end in a crash, all together"
    )
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--lives", type=int, default=40, help="lives of one disk")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    share = -(-asked.crashes // asked.processes)
    with ProcessPoolExecutor(asked.processes) as pool:
        running = [
            pool.submit(run_seeds, asked.first_seed + number * 1_000_000, share, asked.lives)
            for number in range(asked.processes)
        ]
        total = Outcome(asked.first_seed)
        for future in running:
            total.add(future.result())
    sys.stdout.write(msgspec.json.encode(total).decode() + "\n")
    return 1 if total.wrong else 0


def live_through(seed: int, lives: int) -> Outcome:
    """Plays `lives` lives of one disk from one seed. What must not be is in the outcome's `wrong`."""
    rng = random.Random(seed)
    disk = SimDisk(rng)
    outcome, tenants = Outcome(seed), Tenants()
    logging.getLogger("interlock.store.packs").setLevel(logging.CRITICAL)
    for incarnation in range(1, lives + 1):
        life = Life(disk, rng, incarnation, outcome, tenants)
        loop = SimLoop(rng)
        try:
            loop.run_until_complete(life.live())
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome.wrong.append(
                f"life {incarnation}: {type(error).__name__}: {error} in {where.name}, line {where.lineno}: {where.line}"
            )
        finally:
            loop.close()
        if life.store.counters["internal_errors"]:
            outcome.wrong.append(f"life {incarnation}: {life.tier.error}")
        if outcome.wrong:
            break
        life.dead = True  # its lock goes with it
        _between(disk, rng, outcome, died=life.died.is_set())
    return outcome


if __name__ == "__main__":
    sys.exit(main())

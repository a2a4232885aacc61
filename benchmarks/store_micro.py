"""Measures the store: look-ups and grants through a real node process, and bytes through the slab against memcpy.

    python benchmarks/store_micro.py [--megabytes N]

Prints one line a figure: median and 99th percentile of milliseconds, or GB/s (best of five rounds).
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from interlock.core.layouts import KVLayout, shard_of_rank
from interlock.core.prefixes import KeySalt, chain_keys
from interlock.host.blocking import BlockingHost
from interlock.host.real import RealHost
from interlock.store.checksums import block_checksums, verify_block
from interlock.store.client import StoreClient
from interlock.store.main import StoreConfig, run_node
from interlock.wire.identity import passing_identity
from interlock.wire.store_messages import Attach

LAYOUT = KVLayout(layers=8, heads=4, block_tokens=32, content=128, dtype="float32")
"""The demo model's blocks: 512 KiB each."""


def serve(address: str, state_dir: str, slab_bytes: int) -> None:
    asyncio.run(
        run_node(RealHost(), StoreConfig(address=address, state_dir=Path(state_dir), slab_bytes=slab_bytes))
    )


def client(address: str, rank: int | None) -> StoreClient:
    shard = None if rank is None else shard_of_rank(rank, 1, layers=LAYOUT.layers, heads=LAYOUT.heads)
    attach = Attach("bench", 1, rank, 1, LAYOUT, shard)
    made = StoreClient(address, passing_identity(BlockingHost(), "bench"), attach, lookup_timeout_s=5.0)
    assert made.wait_ready(10), made.last_error
    return made


def timed(name: str, rounds: int, call: Callable[[], object]) -> None:
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1000)
    times.sort()
    print(
        f"{name:<44} median {statistics.median(times):7.3f} ms   p99 {times[int(0.99 * len(times))]:7.3f} ms"
    )


def throughput(name: str, size: int, call: Callable[[], object]) -> None:
    best = 0.0
    for _ in range(5):
        begun = time.perf_counter()
        call()
        best = max(best, size / (time.perf_counter() - begun) / 1e9)
    print(f"{name:<44} {best:6.2f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=768, help="size of the slab")
    slab_bytes = parser.parse_args().megabytes << 20
    with tempfile.TemporaryDirectory() as directory:
        address = f"unix:{directory}/store.sock"
        state = Path(directory) / "state"
        state.mkdir(mode=0o700)
        process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(address, str(state), slab_bytes)
        )
        process.start()
        try:
            measure(address)
        finally:
            process.terminate()
            process.join(10)


def measure(address: str) -> None:
    scheduler, rank = client(address, None), client(address, 0)
    salt = KeySalt(model="bench", dtype=LAYOUT.dtype, layout_digest=LAYOUT.digest()).digest()
    tokens = list(range(32 * 1000))
    timed("chain_keys of 1,000 blocks of 32 tokens", 50, lambda: chain_keys(tokens, 32, salt))
    keys = chain_keys(tokens, 32, salt)
    parents = [b"", *keys[:-1]]
    grant = scheduler.start_write("fill", 1, keys, parents)
    assert grant is not None, scheduler.counts()
    assert len(grant.grants) == 1000, "the slab is too small"
    slab = rank.slab_of(grant.slab)
    assert slab is not None
    source = memoryview(bytearray(b"\x5a" * LAYOUT.block_bytes))

    def copy() -> None:
        for item in grant.grants:
            slab.block(item.slot)[:] = source

    def copy_and_sum() -> list[list[int]]:
        sums = []
        for item in grant.grants:
            slab.block(item.slot)[:] = source
            sums.append(block_checksums(slab.binding(keys[item.index], item.slot), LAYOUT, source))
        return sums

    total = 1000 * LAYOUT.block_bytes
    sums = copy_and_sum()
    throughput("put: memcpy into the slab", total, copy)
    throughput("put: memcpy and checksums", total, copy_and_sum)
    rank.report(grant, 0, [True] * 1000, sums)
    assert rank.wait_delivered(10)
    found = scheduler.match(keys)
    assert found is not None, scheduler.counts()
    assert len(found.locations) == 1000
    staging = memoryview(bytearray(LAYOUT.block_bytes))

    def load() -> None:
        for location in found.locations:
            staging[:] = slab.block(location.slot)

    def load_and_verify() -> None:
        for key, location in zip(keys, found.locations, strict=True):
            staging[:] = slab.block(location.slot)
            assert verify_block(slab.binding(key, location.slot), LAYOUT, staging, location.checksums)

    throughput("get: memcpy out of the slab", total, load)
    throughput("get: memcpy and verify", total, load_and_verify)
    timed("match of 1,000 keys, all hit", 300, lambda: scheduler.match(keys))
    timed("match of 64 keys, all hit", 300, lambda: scheduler.match(keys[:64]))
    other = chain_keys(tokens, 32, b"x" * 32)
    timed("match of 1,000 keys, all missed", 300, lambda: scheduler.match(other))
    number = iter(range(10**6))

    def start() -> None:
        session = f"s{next(number)}"
        begun = scheduler.start_write(session, 1, other[:64], [b"", *other[:63]])
        assert begun is not None, scheduler.counts()
        assert len(begun.grants) == 64
        rank.report(begun, 0, [False] * 64, [[]] * 64)
        assert rank.wait_delivered(10)

    timed("start_write and failed report of 64 blocks", 200, start)
    scheduler.close()
    rank.close()


if __name__ == "__main__":
    main()

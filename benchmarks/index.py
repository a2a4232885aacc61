"""Measures the index alone: the longest prefix of 1,000 keys among a million blocks, and a full slab that makes room.

    python benchmarks/index.py [--blocks N] [--keys N]

No node and no memory behind it: this is what the node's loop spends per call. Prints median and 99th percentile of the
thread's own time, in ms: what other processes take meanwhile is theirs.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable

from interlock.core.layouts import KVLayout
from interlock.core.prefixes import Block
from interlock.store.shelf import Shelf

LAYOUT = KVLayout(layers=1, heads=1, block_tokens=16, content=64, dtype="float32")
"""One page a block: as many blocks as a slab can have."""


def chain(rng: random.Random, length: int) -> list[bytes]:
    return [rng.randbytes(32) for _ in range(length)]


def save(shelf: Shelf, layout: int, keys: list[bytes]) -> int:
    parents = [b"", *keys[:-1]]
    slots = shelf.take_slots(layout, parents)
    blocks = zip(keys, parents, slots, strict=False)
    shelf.publish([Block(key, parent, layout, slot, bytes(8)) for key, parent, slot in blocks])
    return len(slots)


def timed(name: str, rounds: int, call: Callable[[], object]) -> None:
    times = []
    for _ in range(rounds):
        begun = time.thread_time()
        call()
        times.append((time.thread_time() - begun) * 1000)
    times.sort()
    print(
        f"{name:<58} median {statistics.median(times):7.3f} ms   p99 {times[int(0.99 * len(times))]:7.3f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--keys", type=int, default=1000, help="keys a look-up")
    asked = parser.parse_args()
    rng = random.Random(1)
    shelf = Shelf(asked.blocks * 4096, Counter())
    layout = shelf.layout(LAYOUT)
    chains = [chain(rng, asked.keys) for _ in range(asked.blocks // asked.keys)]
    begun = time.perf_counter()
    for keys in chains:
        save(shelf, layout, keys)
    took = time.perf_counter() - begun
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(shelf)} blocks published in {took:.1f} s; the process has {memory:.0f} MiB")
    timed("a full garbage collection, which stops all look-ups", 5, gc.collect)
    first = iter(chains)
    timed(f"match of {asked.keys} keys, first time", len(chains), lambda: shelf.match(next(first)))
    timed(f"match of {asked.keys} keys, all hit", 2000, lambda: shelf.match(rng.choice(chains)))
    timed("match of 64 keys, all hit", 2000, lambda: shelf.match(rng.choice(chains)[:64]))
    lost = chain(rng, asked.keys)
    timed(f"match of {asked.keys} keys, all missed", 2000, lambda: shelf.match(lost))
    timed("save 64 blocks into a full slab (64 evictions)", 1000, lambda: save(shelf, layout, chain(rng, 64)))
    timed(f"a page of {4096} slots", 200, lambda: shelf.page(rng.randrange(asked.blocks), 4096))


if __name__ == "__main__":
    main()

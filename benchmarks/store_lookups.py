"""Look-ups of `store.py`: what a scheduler's step waits for, with a million blocks in the index, and what a save costs."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from harness import Options, Point, line, percentile, report
from store_ours import Engine, fresh_keys, node

SMALL = 4096
"""Bytes of a block: so that a million of them fit into a machine's memory; an index does not see the difference."""


def run(given: Options) -> None:
    total = 50_000 if given.quick else 1_000_000
    calls = 200 if given.quick else 1000
    with (
        tempfile.TemporaryDirectory() as directory,
        node(Path(directory), (total + 40_000) * SMALL) as address,
    ):
        engine = Engine(address, SMALL)
        chains = fill(engine, total)
        line({"index": "filled", "blocks": sum(map(len, chains)), "block_bytes": SMALL})
        gc.freeze()  # a million keys of the benchmark's own, which its collector would walk in the middle of a call
        latency(
            "match of 1,000 keys, all hit",
            calls,
            lambda n: engine.scheduler.match(chains[n % len(chains)][:1000]),
            blocks=total,
        )
        missed = [fresh_keys(1000) for _ in range(16)]
        latency(
            "match of 1,000 keys, none hit",
            calls,
            lambda n: engine.scheduler.match(missed[n % 16]),
            blocks=total,
        )
        latency(
            "match of 64 keys, all hit",
            calls,
            lambda n: engine.scheduler.match(chains[n % len(chains)][:64]),
            blocks=total,
        )
        writes(engine, calls)
        engine.close()
    submits(given)


def fill(engine: Engine, total: int) -> list[list[bytes]]:
    """Chains of a thousand blocks, entered as an engine does, without bytes: look-ups do not read them."""
    chains = []
    for number in range(total // 1000):
        keys = fresh_keys(1000)
        grant = engine.scheduler.start_write(f"fill-{number}", 1, keys, [b"", *keys[:-1]])
        assert grant is not None, engine.scheduler.counts()
        assert len(grant.grants) == 1000, "the slab is too small"
        engine.rank.report(grant, 0, [True] * 1000, [[n] * engine.layout.heads for n in range(1000)])
        assert engine.rank.wait_delivered(10)
        chains.append(keys)
    return chains


def latency(name: str, calls: int, call: Callable[[int], Any], **more: Any) -> None:
    """Milliseconds of each call: median, p99 and the worst."""
    times = []
    for number in range(calls + 20):
        begun = perf_counter()
        answer = call(number)
        times.append((perf_counter() - begun) * 1e3)
        assert answer is not None
    times = times[20:]
    report(
        Point(name, "interlock", "ms", times),
        p99=round(percentile(times, 0.99), 4),
        worst=round(max(times), 4),
        **more,
    )


def writes(engine: Engine, calls: int) -> None:
    """start_write alone is what the scheduler waits for; the report that frees the slots is not timed."""
    times = []
    for number in range(calls // 2):
        keys = fresh_keys(64)
        begun = perf_counter()
        grant = engine.scheduler.start_write(f"w{number}", 1, keys, [b"", *keys[:-1]])
        times.append((perf_counter() - begun) * 1e3)
        assert grant is not None
        assert len(grant.grants) == 64
        engine.rank.report(grant, 0, [False] * 64, [[]] * 64)
        assert engine.rank.wait_delivered(10)
    report(Point("start_write of 64 blocks", "interlock", "ms", times), p99=round(percentile(times, 0.99), 4))


def submits(given: Options) -> None:
    """What a save costs the model's thread: all in its hook, or a copy there and the rest in the saver's thread."""
    try:
        import torch

        from interlock.connectors.vllm.movers import CpuMover
        from interlock.connectors.vllm.saver import Saver
        from interlock.connectors.vllm.tensors import KVBlocks
    except ImportError as missing:
        line({"side": "saver", "not_run": f"{missing}"})
        return
    from interlock.core.layouts import KVLayout
    from interlock.host.threads import Event

    layout = KVLayout(layers=16, heads=4, block_tokens=32, content=128, dtype="bfloat16")
    memory = torch.zeros((16, 256, 4, 32, 128), dtype=torch.bfloat16)
    memory.view(torch.uint8).random_()
    mover = CpuMover(KVBlocks(list(memory), layout, 4), layout, 0)
    slab = _slab(layout, 256)
    pages = -(-layout.block_bytes // 4096)
    rounds = 40 if given.quick else 200
    for blocks in (1, 8, 64):
        keys, slots = fresh_keys(blocks), [n * pages for n in range(blocks)]
        for name, buffers in (("in the hook", 0), ("off the model's thread", 4)):
            saver = Saver(mover, buffers_max=buffers)
            hook, whole = [], []
            for number in range(rounds + 10):
                done, chosen = (
                    Event(),
                    [int(b) for b in np.random.default_rng(number).permutation(256)[:blocks]],
                )
                begun = perf_counter()
                saver.save(slab, keys, slots, chosen, lambda good, sums, done=done: done.set())
                hook.append((perf_counter() - begun) * 1e3)
                assert done.wait(10)
                whole.append((perf_counter() - begun) * 1e3)
            saver.close(5)
            size = blocks * layout.block_bytes
            report(
                Point(
                    f"submit of {blocks} blocks of {layout.block_bytes >> 10} KiB",
                    f"checksums {name}",
                    "ms",
                    hook[10:],
                ),
                p99=round(percentile(hook[10:], 0.99), 4),
                until_reported=round(float(np.median(whole[10:])), 4),
                bytes=size,
            )


def _slab(layout: Any, blocks: int) -> Any:
    import os

    from interlock.host.memory import create_memory
    from interlock.store.mapping import MappedSlab

    size = -(-layout.block_bytes // 4096) * 4096 * blocks
    memory = create_memory("bench-slab", size)
    fd = os.dup(memory.fd)
    memory.close()
    return MappedSlab(fd, slab=7, node_incarnation=9, size_bytes=size, layout=layout, writable=True)

"""Our side of `store.py`: a node in a process of its own, and an engine's clients at it."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interlock.core.layouts import KVLayout, shard_of_rank
from interlock.host.blocking import BlockingHost
from interlock.host.real import RealHost
from interlock.store.client import StoreClient
from interlock.store.main import StoreConfig, run_node
from interlock.wire.identity import passing_identity
from interlock.wire.store_messages import Attach

HEADS = 8
PATIENCE_S = 10.0


def serve(address: str, state_dir: str, slab_bytes: int, more: dict[str, Any]) -> None:
    config = StoreConfig(address=address, state_dir=Path(state_dir), slab_bytes=slab_bytes, **more)
    asyncio.run(run_node(RealHost(), config))


@contextlib.contextmanager
def node(directory: Path, slab_bytes: int, **more: Any) -> Iterator[str]:
    """A node in a process of its own; its address."""
    state = directory / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    address = f"unix:{directory}/store.sock"
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(address, str(state), slab_bytes, more)
    )
    process.start()
    try:
        yield address
    finally:
        process.terminate()
        process.join(PATIENCE_S)
        if process.is_alive():
            process.kill()


def layout_of(size: int) -> KVLayout:
    """A block of `size` bytes with eight heads, as a model with grouped-query attention has."""
    return KVLayout(layers=1, heads=HEADS, block_tokens=16, content=size // HEADS // 16, dtype="uint8")


class Engine:
    """One engine of one rank at the node: its scheduler's client and its rank's, in this process."""

    def __init__(self, address: str, size: int, *, name: str = "bench") -> None:
        self.layout = layout_of(size)
        assert self.layout.block_bytes == size
        self.name = name
        self.scheduler, self.rank = self._client(address, None), self._client(address, 0)

    def _client(self, address: str, rank: int | None) -> StoreClient:
        shard = None if rank is None else shard_of_rank(rank, 1, layers=1, heads=HEADS)
        attach = Attach(f"{self.name}-{self.layout.block_bytes}", 1, rank, 1, self.layout, shard)
        made = StoreClient(address, passing_identity(BlockingHost(), self.name), attach, lookup_timeout_s=5.0)
        assert made.wait_ready(PATIENCE_S), made.last_error
        return made

    def close(self) -> None:
        self.scheduler.close()
        self.rank.close()


def fresh_keys(count: int) -> list[bytes]:
    return [os.urandom(32) for _ in range(count)]


def seconds(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun

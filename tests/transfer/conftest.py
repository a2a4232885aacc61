"""Engines in this process, with memory that can be checked, and nothing left behind by any of them."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from interlock.host.real import RealHost
from interlock.membership.directory import StaticDirectory
from interlock.transfer.engine import LaneOptions, TransferEngine
from interlock.wire.identity import Identity

Bytes = npt.NDArray[np.uint8]
TCP = LaneOptions(kinds=("tcp",))
SHM = LaneOptions(kinds=("shm",))
BOTH = LaneOptions()


def random_bytes(count: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def open_descriptors() -> dict[str, str]:
    """What this process has open, but for what comes and goes by itself."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
    return found


class Yard:
    """Makes engines that know each other by name. `restart` gives a name its next life."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self.host = RealHost()
        self.directory = StaticDirectory()
        self.engines: dict[str, TransferEngine] = {}
        self._lives: dict[str, int] = {}

    async def make(
        self, name: str, lanes: LaneOptions = TCP, *, address: str = "", endpoints_max: int = 64
    ) -> TransferEngine:
        self._lives[name] = life = self._lives.get(name, 0) + 1
        address = address or f"unix:{self.path}/{name}.sock"
        engine = TransferEngine(
            self.host,
            Identity(name, life, f"{name}{life}".encode()),
            address,
            directory=self.directory,
            lanes=lanes,
            token=b"a secret of the test",
            endpoints_max=endpoints_max,
        )
        await engine.start()
        self.directory.update(name, engine.address)
        self.engines[name] = engine
        return engine

    async def pair(self, lanes: LaneOptions = TCP) -> tuple[TransferEngine, TransferEngine]:
        return await self.make("a", lanes), await self.make("b", lanes)

    async def end(self, name: str) -> None:
        await self.engines.pop(name).close()

    async def close(self) -> None:
        for name in list(self.engines):
            await self._settle(self.engines[name])
            self.engines[name].check_integrity()
            await self.end(name)
        self.host.close()

    async def _settle(self, engine: TransferEngine) -> None:
        """A reader has its last byte a moment before the owner's thread let go of the segment."""
        segments = engine.segments._segments
        await until(lambda: not any(segment.readers for segment in segments.values()))


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[Yard]:
    tmp_path.chmod(0o700)
    made = Yard(tmp_path)
    yield made
    await made.close()


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No descriptor more than before, once everything is closed."""
    before = set(open_descriptors().values())
    yield
    gc.collect()
    left = [what for what in open_descriptors().values() if what not in before and "eventpoll" not in what]
    assert not left, left


async def until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Waits for what other tasks and processes bring about."""
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)


Waiting = Callable[[Callable[[], bool]], Awaitable[None]]

"""Conformance of a kind of lane: what every lane must do, checked on two engines of one process that have no other kind.

    async def test_my_lane_conforms(tmp_path):
        await check_lane(LaneOptions(kinds=("mine",)), tmp_path)

Raises `AssertionError` naming what failed. The rules are those of `interlock.transfer.lanes.base`.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from interlock.host.real import RealHost
from interlock.membership.directory import StaticDirectory
from interlock.transfer.engine import LaneOptions, Part, TransferEngine
from interlock.transfer.outcomes import Outcome
from interlock.transfer.segments import RemoteSegment
from interlock.wire.identity import Identity

SIZE = 24 * 1024 * 1024
PATIENCE_SECONDS = 10.0


async def check_lane(lanes: LaneOptions, directory: Path) -> None:
    """`directory`: private and empty; sockets are made there."""
    os.chmod(directory, 0o700)
    host, addresses = RealHost(), StaticDirectory()
    reader = await _engine(host, "a", lanes, directory, addresses)
    owner = await _engine(host, "b", lanes, directory, addresses)
    try:
        await _Check(reader, owner).run()
    finally:
        await reader.close()
        await owner.close()
        host.close()


async def _engine(
    host: RealHost, name: str, lanes: LaneOptions, directory: Path, addresses: StaticDirectory
) -> TransferEngine:
    address = f"unix:{directory}/{name}.sock"
    me = Identity(name, time.time_ns(), os.urandom(8))
    engine = TransferEngine(host, me, address, directory=addresses, lanes=lanes)
    await engine.start()
    addresses.update(name, address)
    return engine


class _Check:
    def __init__(self, reader: TransferEngine, owner: TransferEngine) -> None:
        self.reader, self.owner = reader, owner
        self.source = np.random.default_rng(3).integers(0, 256, SIZE, dtype=np.uint8)
        self.here = np.zeros(SIZE, np.uint8)

    async def run(self) -> None:
        self.held = self.owner.register(self.source, "lane")
        (self.segment,) = await self.reader.segments_of("b", "lane", timeout_s=PATIENCE_SECONDS)
        await self.whole()
        await self.scattered()
        await self.both_ways()
        await self.bounds()
        await self.cancelled()
        await self.made_anew()
        await self.revoked()
        self.reader.check_integrity()
        self.owner.check_integrity()

    async def _read(
        self, rows: Any = None, segment: RemoteSegment | None = None, engine: TransferEngine | None = None
    ) -> Outcome:
        transfer = (engine or self.reader).read(
            [Part(segment or self.segment, self.here, rows)], timeout_s=PATIENCE_SECONDS
        )
        outcome = await transfer.outcome()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await transfer.release()
        return outcome

    async def whole(self) -> None:
        outcome = await self._read()
        assert outcome.ok, f"a whole segment was not read: {outcome.message}"
        assert (self.here == self.source).all(), "a whole segment was read, and is other bytes"

    async def scattered(self) -> None:
        self.here[:] = 0
        at = np.random.default_rng(4).permutation(SIZE // 8192)[:3000] * 8192
        rows = np.stack([at, at[::-1], np.full(3000, 777)], axis=1)
        assert (await self._read(rows)).ok
        for remote, local, count in rows.tolist():
            assert (self.here[local : local + count] == self.source[remote : remote + count]).all()
        touched = np.zeros(SIZE, bool)
        for _, local, count in rows.tolist():
            touched[local : local + count] = True
        assert not self.here[~touched].any(), "bytes were written beside the pieces"

    async def both_ways(self) -> None:
        """Each side reads from the other at the same time."""
        mine = self.reader.register(self.source[: 1 << 20].copy(), "back")
        there = np.zeros(1 << 20, np.uint8)
        back = self.owner.read([Part(mine.remote, there)], timeout_s=PATIENCE_SECONDS)
        assert (await self._read()).ok
        assert (await back.outcome()).ok, "the owner could not read from the reader"
        await back.release()
        assert (there == self.source[: 1 << 20]).all()
        await self.reader.unregister(mine)

    async def bounds(self) -> None:
        lie = RemoteSegment("b", self.segment.incarnation, self.segment.number, SIZE * 2)
        outcome = await self._read([(SIZE - 1, 0, 2)], lie)
        assert outcome.code == "bounds", f"a piece beyond the segment was answered with {outcome}"
        old = RemoteSegment("b", self.segment.incarnation - 1, self.segment.number, SIZE)
        outcome = await self._read([(0, 0, 1)], old)
        assert outcome.code == "stale", f"a segment of another life was answered with {outcome}"

    async def cancelled(self) -> None:
        """After the release no byte lands, and the next read is whole."""
        for wait_s in (0.0, 0.001, 0.004):
            transfer = self.reader.read([Part(self.segment, self.here)], timeout_s=PATIENCE_SECONDS)
            await asyncio.sleep(wait_s)
            transfer.cancel()
            async with asyncio.timeout(PATIENCE_SECONDS):
                await transfer.release()
            self.here[:] = 9
            await asyncio.sleep(0.03)
            assert (self.here == 9).all(), "bytes landed after the release"
        await self.whole()

    async def made_anew(self) -> None:
        """A lane is destroyed with its endpoint and made anew: nothing is reset, nobody helps."""
        for engine, peer in ((self.reader, "b"), (self.owner, "a")):
            engine.retire(peer)
            await self.whole()

    async def revoked(self) -> None:
        transfer = self.reader.read([Part(self.segment, self.here)], timeout_s=PATIENCE_SECONDS)
        await self.owner.unregister(self.held)
        self.source[:] = 0
        outcome = await transfer.outcome()
        await transfer.release()
        assert not outcome.ok or self.here.any(), "a revoked segment's successor was read as itself"
        outcome = await self._read([(0, 0, 1)])
        assert outcome.code == "revoked", f"a revoked segment was answered with {outcome}"

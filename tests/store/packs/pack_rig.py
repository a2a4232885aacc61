"""A disk tier over a real directory, published blocks with real bytes, and a life that can be followed by another."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

from interlock.core.layouts import KVLayout
from interlock.core.limits import REMOVALS_FILE_BYTES_MAX
from interlock.core.packed_sums import pack_sums
from interlock.core.prefixes import Block
from interlock.core.sessions import SlabName
from interlock.host.base import SharedMemory
from interlock.host.real import RealHost
from interlock.host.state_file import StateFile
from interlock.store.blocks import BlockStore
from interlock.store.checksums import Binding, block_checksums
from interlock.store.node import DiskConfig, Node
from interlock.store.packs.tier import DiskTier
from interlock.store.removals import FILE, KIND
from interlock.wire.identity import Identity

PAGE = 4096
LAYOUT = KVLayout(layers=2, heads=4, block_tokens=4, content=32, dtype="float32")
"""One page a block."""
PATIENCE_S = 10.0


def chain(count: int, name: str = "a") -> list[bytes]:
    return [hashlib.blake2b(f"{name}{i}".encode(), digest_size=32).digest() for i in range(count)]


def bytes_of(key: bytes, layout: KVLayout = LAYOUT) -> bytes:
    return hashlib.shake_128(key).digest(layout.block_bytes)


class TierLife:
    """One life of a store with a disk, `async with`."""

    def __init__(
        self, path: Path, incarnation: int, *, slots: int = 64, disk_bytes: int = 1 << 20, **more: Any
    ) -> None:
        self.incarnation = incarnation
        self.host = RealHost()
        self.memory: SharedMemory = self.host.create_memory("test", slots * PAGE)
        self.store = BlockStore(
            SlabName(incarnation, incarnation + 1), slots * PAGE, quotas=more.pop("quotas", None)
        )
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.tier = DiskTier(
            more.pop("host", self.host),
            path,
            disk_bytes,
            self.store,
            self.memory,
            owner=f"life {incarnation}",
            emit=lambda name, **fields: self.events.append((name, fields)),
            records_min=256,
        )

    async def __aenter__(self) -> TierLife:
        try:
            await self.tier.start()
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.tier.close()
            self.check()
        finally:
            self._close()

    def _close(self) -> None:
        self.memory.close()
        self.host.close()

    def check(self) -> None:
        self.store.check_integrity()
        self.tier.check_integrity()

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def publish(self, keys: list[bytes], *, layout: KVLayout = LAYOUT, tenant: str = "") -> None:
        number = self.store.layout(layout)
        for i, key in enumerate(keys):
            parent = keys[i - 1] if i else b""
            (slot,) = self.store.shelf.take_slots(number, [parent], tenant)
            data = bytes_of(key, layout)
            self.memory.view[slot * PAGE : slot * PAGE + len(data)] = data
            binding = Binding(key, slot, self.incarnation, self.incarnation + 1)
            block = Block(
                key, parent, number, slot, pack_sums(block_checksums(binding, layout, data)), tenant
            )
            self.store.shelf.publish([block])
            self.store.on_publish(block)

    async def save(self, keys: list[bytes], **more: Any) -> None:
        """Published, and on the disk."""
        self.publish(keys, **more)
        assert await self.tier.flush(PATIENCE_S)

    async def load(self, keys: list[bytes]) -> int:
        """Asks until nothing more is coming: how many of the first keys are in RAM then, each with the right bytes."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = self.store.match(keys)
                if not self.tier.promote(keys[len(found) :]):
                    break
                await asyncio.sleep(0.002)
        for block in found:
            data = self.memory.view[block.slot * PAGE : block.slot * PAGE + LAYOUT.block_bytes]
            assert bytes(data) == bytes_of(block.key)
        return len(found)

    async def asked_once(self, keys: list[bytes]) -> None:
        """One look-up, and until what it asked for is here or given up."""
        self.tier.promote(keys)
        assert self.tier.promoter is not None
        await asyncio.wait_for(self.tier.promoter.settled(), PATIENCE_S)

    async def scanned(self) -> None:
        assert self.tier.scan is not None
        await asyncio.wait_for(self.tier.scan.done.wait(), PATIENCE_S)


class NodeLife(TierLife):
    """One life of a whole node without clients, over a disk and a file of removals in `base`, `async with`."""

    def __init__(
        self, base: Path, incarnation: int, *, disk: str = "kv", slots: int = 64, **more: Any
    ) -> None:
        self.incarnation = incarnation
        self.host = RealHost()
        self.memory = self.host.create_memory("test", slots * PAGE)
        self.events = []
        self._address = f"unix:{base}/{incarnation}.sock"
        self.node = Node(
            self.host,
            Identity("n", incarnation, b"n"),
            self.memory,
            incarnation + 1,
            disk=DiskConfig(base / disk, more.pop("disk_bytes", 1 << 20), index_records_min=256),
            removals=StateFile(self.host.files, base / FILE, KIND, REMOVALS_FILE_BYTES_MAX),
            **more,
        )
        assert self.node.disk is not None
        self.store, self.tier = self.node.store, self.node.disk

    async def __aenter__(self) -> NodeLife:
        await self.node.start(self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.node.close()
            self.check()
        finally:
            self.host.close()

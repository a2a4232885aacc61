"""A real node on its socket with a disk below it: look-ups say what is coming, and a restart hits."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from interlock.core.prefixes import KeySalt, chain_keys
from interlock.host.blocking import BlockingHost, monotonic_s, sleep_s
from interlock.host.real import RealHost
from interlock.store.checksums import block_checksums, verify_block
from interlock.store.client import StoreClient
from interlock.store.main import slab_number
from interlock.store.node import DiskConfig, Node
from interlock.wire.identity import load_identity, passing_identity
from interlock.wire.store_messages import Attach

PATIENCE_S = 10.0


class DiskNode:
    """One life of a node, and an engine of one rank attached to it."""

    def __init__(self, tmp_path: Path, packs: Any, slots: int = 64) -> None:
        self.host, self.packs = RealHost(), packs
        self._loop = asyncio.new_event_loop()
        self._tmp, self._slots = tmp_path, slots
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self.node: Node = self.run(self._start())
        except BaseException:
            self._stop()
            raise
        me = passing_identity(BlockingHost(), "engine")
        address = f"unix:{tmp_path}/store.sock"
        self.scheduler = StoreClient(
            address, me, Attach("e", me.incarnation, None, 1, packs.LAYOUT), lookup_timeout_s=5.0
        )
        self.rank = StoreClient(address, me, Attach("e", me.incarnation, 0, 1, packs.LAYOUT))
        assert self.scheduler.wait_ready(PATIENCE_S)
        assert self.rank.wait_ready(PATIENCE_S)

    async def _start(self) -> Node:
        state = self._tmp / "state"
        state.mkdir(mode=0o700, exist_ok=True)
        me = load_identity(self.host, state, "store")
        memory = self.host.create_memory("test", self._slots * self.packs.PAGE)
        node = Node(
            self.host,
            me,
            memory,
            slab_number(me.name, me.incarnation),
            tick_s=0.02,
            disk=DiskConfig(self._tmp / "kv", 8 << 20),
        )
        try:
            await node.start(f"unix:{self._tmp}/store.sock")
        except BaseException:
            await node.close()
            raise
        return node

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    def save(self, session: str, keys: list[bytes]) -> None:
        grant = self.scheduler.start_write(session, 1, keys, [b"", *keys[:-1]])
        assert grant is not None
        slab = self.rank.slab_of(grant.slab)
        assert slab is not None
        sums = []
        for given in grant.grants:
            key = keys[given.index]
            data = self.packs.bytes_of(key)
            slab.block(given.slot)[:] = data
            sums.append(block_checksums(slab.binding(key, given.slot), self.packs.LAYOUT, data))
        assert self.rank.report(grant, 0, [True] * len(sums), sums)
        assert self.rank.wait_delivered(PATIENCE_S)

    def load(self, keys: list[bytes]) -> tuple[int, int]:
        """(blocks read and verified in the end, look-ups that said more was coming)."""
        waited, deadline_s = 0, monotonic_s() + PATIENCE_S
        while monotonic_s() < deadline_s:
            found = self.scheduler.match(keys)
            assert found is not None
            assert len(found.locations) + found.coming <= len(keys)
            if not found.coming:
                break
            waited += 1
            sleep_s(0.002)
        slab = self.rank.slab_of(found.slab)
        assert slab is not None or not found.locations
        for key, location in zip(keys, found.locations, strict=False):
            data = bytes(slab.block(location.slot))
            assert verify_block(slab.binding(key, location.slot), self.packs.LAYOUT, data, location.checksums)
            assert data == self.packs.bytes_of(key)
        return len(found.locations), waited

    def flush(self) -> None:
        assert self.run(self.node.disk.flush(PATIENCE_S))  # type: ignore[union-attr]

    async def _check(self) -> None:
        self.node.check_integrity()

    def close(self) -> None:
        self.run(self._check())
        self.scheduler.close()
        self.rank.close()
        self.run(self.node.close())
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()
        self.host.close()


def keys_of(packs: Any, count: int, start: int = 0) -> list[bytes]:
    salt = KeySalt(model="m", dtype="float32", layout_digest=packs.LAYOUT.digest())
    return chain_keys(range(start, start + 4 * count), 4, salt)


@pytest.mark.parametrize("cleanly", [True, False])
def test_a_restarted_node_hits_what_engines_saved_before(tmp_path: Path, packs: Any, cleanly: bool) -> None:
    keys = keys_of(packs, 20)
    node = DiskNode(tmp_path, packs)
    node.save("s", keys)
    if not cleanly:
        node.flush()
    node.close()
    node = DiskNode(tmp_path, packs)
    begun_s = monotonic_s()
    blocks, waited = node.load([*keys, *keys_of(packs, 2, 9000)])
    assert blocks == 20
    assert waited >= 1
    assert monotonic_s() - begun_s < 1.0
    assert node.load(keys) == (20, 0), "they are in RAM now"
    stats = node.node.disk.stats()  # type: ignore[union-attr]
    assert stats["interlock_store_disk_promoted_blocks_total"] == 20
    node.close()


def test_what_ram_evicts_comes_back_from_disk_and_slots_balance(tmp_path: Path, packs: Any) -> None:
    node = DiskNode(tmp_path, packs, slots=16)
    chains = [keys_of(packs, 6, 1000 * i) for i in range(10)]
    for i, keys in enumerate(chains):
        node.save(f"s{i}", keys)
        node.flush()
    for _ in range(2):
        for keys in chains:
            assert node.load(keys)[0] == 6
    counts = node.node.store.slots.count
    assert sum(counts.values()) == 16
    assert counts["writing"] == counts["quarantined"] == 0
    node.close()


def test_a_key_that_comes_from_disk_is_not_granted_to_a_writer_meanwhile(tmp_path: Path, packs: Any) -> None:
    keys = keys_of(packs, 6)
    node = DiskNode(tmp_path, packs)
    node.save("s", keys)
    node.close()
    node = DiskNode(tmp_path, packs)
    node.load(keys)
    grant = node.scheduler.start_write("t", 1, keys, [b"", *keys[:-1]])
    assert grant is not None
    assert grant.grants == []
    node.close()


def test_a_second_node_on_the_directory_is_refused_and_told_by_whom(tmp_path: Path, packs: Any) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "kv").symlink_to(tmp_path / "a" / "kv")
    node = DiskNode(tmp_path / "a", packs)
    with pytest.raises(OSError, match="belongs to store node store@"):
        DiskNode(tmp_path / "b", packs)
    node.close()


def test_the_command_finds_a_flipped_bit_while_the_node_runs(
    tmp_path: Path, packs: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from interlock.cli.main import main

    keys = keys_of(packs, 4)
    node = DiskNode(tmp_path, packs)
    node.save("s", keys)
    node.flush()
    monkeypatch.setattr(sys, "argv", ["interlock", "store", "verify-disk", str(tmp_path / "kv")])
    assert main() == 0
    assert "1 packs, 4 blocks, 16384 bytes read, 0 findings" in capsys.readouterr().out
    toc, _ = node.node.disk.state.files.toc(1)  # type: ignore[union-attr]
    with (tmp_path / "kv" / "0000000001.safetensors").open("r+b") as file:
        file.seek(toc.blocks[2].offset)
        file.write(bytes([packs.bytes_of(toc.blocks[2].key)[0] ^ 4]))
    assert main() == 1
    assert f"pack 1: {toc.blocks[2].key.hex()}: its bytes are not what was saved" in capsys.readouterr().out
    node.close()

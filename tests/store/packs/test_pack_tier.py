"""The disk tier on a real directory: restarts hit, what is damaged is never served, a disk that fails is done without."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors

from interlock.core import limits
from interlock.host.base import Directory
from interlock.host.disk import DirectoryBusy, RealDirectory
from interlock.host.real import RealHost


def pack_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ 1]))


async def test_a_restart_hits_what_the_last_life_wrote(tmp_path: Path, packs: Any) -> None:
    keys = packs.chain(20)
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        await life.save(keys)
        await life.tier.check_files()
    async with packs.TierLife(tmp_path / "kv", 2) as life:
        assert await life.load(keys) == 20
        assert await life.load(packs.chain(3, "other")) == 0
        assert life.store.slots.count["published"] == 20
        await life.scanned()
        assert life.tier.stats()["interlock_store_disk_promoted_blocks_total"] == 20
        assert life.tier.stats()["interlock_store_disk_repaired_blocks_total"] == 0


async def test_a_pack_is_read_by_the_safetensors_library(tmp_path: Path, packs: Any) -> None:
    keys = packs.chain(3)
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        await life.save(keys, tenant="ann")
    (file,) = pack_files(tmp_path / "kv")
    with safetensors.safe_open(str(file), framework="numpy") as pack:
        names = [name for name in pack.keys() if len(name) == 64]  # noqa: SIM118 - it is no mapping
        assert names == sorted(key.hex() for key in keys)
        for key in keys:
            tensor = pack.get_tensor(key.hex())
            assert tensor.shape == (4, 2, 4, 32)
            assert tensor.tobytes() == packs.bytes_of(key)
        assert '"tenant":"ann"' in pack.metadata()[keys[0].hex()]
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert (header + 8) % packs.PAGE == 0


async def test_a_lost_index_is_filled_again_behind_the_start(tmp_path: Path, packs: Any) -> None:
    keys = packs.chain(20)
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        await life.save(keys)
    (tmp_path / "kv" / "index").write_bytes(b"\x07" * 64 * 256)  # whatever it is, it is no record
    async with packs.TierLife(tmp_path / "kv", 2) as life:
        await life.scanned()
        assert life.tier.stats()["interlock_store_disk_repaired_blocks_total"] == 20
        assert await life.load(keys) == 20


@pytest.mark.parametrize("place", ["header", "foot", "truncated", "foreign", "renamed"])
async def test_a_damaged_or_foreign_pack_is_set_aside_and_said(
    tmp_path: Path, packs: Any, place: str
) -> None:
    directory = tmp_path / "kv"
    keys = packs.chain(5)
    async with packs.TierLife(directory, 1) as life:
        await life.save(keys)
    (file,) = pack_files(directory)
    match place:
        case "header":
            flip(file, 40)
        case "foot":
            flip(file, file.stat().st_size - packs.PAGE + 20)
        case "truncated":
            os.truncate(file, file.stat().st_size - packs.PAGE)
        case "foreign":
            file.write_bytes(os.urandom(8 * packs.PAGE))
        case "renamed":
            file.rename(directory / "0000000009.safetensors")
    async with packs.TierLife(directory, 2) as life:
        await life.scanned()
        assert await life.load(keys) == 0
        assert "store.disk.aside" in life.names()
        assert life.tier.stats()["interlock_store_disk_packs_aside_total"] == 1
        await life.tier.check_files()
    assert not pack_files(directory)
    assert len(list((directory / "aside").iterdir())) == 1


async def test_a_flipped_block_is_lost_alone_and_its_neighbours_are_served(
    tmp_path: Path, packs: Any
) -> None:
    directory, keys = tmp_path / "kv", packs.chain(5)
    async with packs.TierLife(directory, 1) as life:
        await life.save(keys)
        toc, _ = life.tier.state.files.toc(1)
    flip(pack_files(directory)[0], toc.blocks[3].offset + 77)
    async with packs.TierLife(directory, 2) as life:
        assert await life.load(keys) == 3
        assert await life.load([keys[4]]) == 1
        assert life.names().count("store.disk.bad_block") == 1
        await life.tier.check_files()
    async with packs.TierLife(directory, 3) as life:  # it is recorded as gone: not found damaged once more
        await life.scanned()
        assert await life.load(keys) == 3
        assert "store.disk.bad_block" not in life.names()


async def test_a_pack_of_which_too_many_blocks_are_damaged_is_set_aside(tmp_path: Path, packs: Any) -> None:
    directory, keys = tmp_path / "kv", packs.chain(8)
    async with packs.TierLife(directory, 1) as life:
        await life.save(keys)
        toc, _ = life.tier.state.files.toc(1)
    for block in toc.blocks[: limits.DISK_BAD_BLOCKS_MAX]:
        flip(pack_files(directory)[0], block.offset)
    async with packs.TierLife(directory, 2) as life:
        await life.load(keys)
        assert "store.disk.aside" in life.names()
        assert await life.load([keys[7]]) in (0, 1)
    assert not pack_files(directory)


async def test_a_slot_that_changed_hands_while_it_waited_is_not_written(tmp_path: Path, packs: Any) -> None:
    """Reading is optimistic: only the checksum says whether the bytes are still the block's."""
    keys = packs.chain(4)
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        life.publish(keys)
        block = life.store.shelf.get(keys[2])
        life.memory.view[block.slot * packs.PAGE] ^= 1
        assert await life.tier.flush(packs.PATIENCE_S)
        assert life.tier.stats()["interlock_store_disk_written_blocks_total"] == 3
    async with packs.TierLife(tmp_path / "kv", 2) as life:
        assert await life.load(keys) == 2


async def test_two_nodes_never_have_one_directory_and_the_second_hears_of_the_first(
    tmp_path: Path, packs: Any
) -> None:
    async with packs.TierLife(tmp_path / "kv", 1):
        with pytest.raises(DirectoryBusy, match="life 1"):
            async with packs.TierLife(tmp_path / "kv", 2):
                pass
    async with packs.TierLife(tmp_path / "kv", 3):
        pass


async def test_files_of_dead_owners_are_swept_whatever_their_age(tmp_path: Path, packs: Any) -> None:
    directory = tmp_path / "kv"
    directory.mkdir(mode=0o700)
    (directory / "0000000004.safetensors.77.tmp").write_bytes(b"half")
    (directory / "0000000009.gone").write_bytes(b"of no pack")
    (directory / "notes.txt").write_text("somebody's")
    (directory / "model.safetensors").write_bytes(b"somebody's weights")
    async with packs.TierLife(directory, 2) as life:
        assert "store.disk.swept" in life.names()
    assert sorted(p.name for p in directory.iterdir()) == ["aside", "identity", "index", "notes.txt", "owner"]
    assert [p.name for p in (directory / "aside").iterdir()] == ["model.safetensors"]


async def test_the_bound_in_bytes_is_kept_and_what_was_used_stays(tmp_path: Path, packs: Any) -> None:
    hot = packs.chain(4, "hot")
    async with packs.TierLife(tmp_path / "kv", 1, slots=16, disk_bytes=70 * 4096) as life:
        await life.save(hot)
        for i in range(30):
            if i % 3 == 0:
                assert await life.load(hot) == 4, i
            await life.save(packs.chain(4, f"cold{i}"))
            await life.tier.check_files()
            size = sum(p.stat().st_blocks * 512 for p in (tmp_path / "kv").rglob("*") if p.is_file())
            assert size <= 70 * 4096 + 3 * 4096, i
        assert life.tier.stats()["interlock_store_disk_evicted_blocks_total"] > 50
    async with packs.TierLife(tmp_path / "kv", 2) as life:
        assert await life.load(hot) == 4


async def test_holes_are_recorded_before_they_are_punched_and_not_taken_for_damage(
    tmp_path: Path, packs: Any
) -> None:
    """Hazards x7: a punched block reads as zeros, and a file's checksum would condemn the whole pack."""
    keys = packs.chain(6)
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        await life.save(keys)
        assert await life.tier.remove([keys[1], keys[4]]) == (2, True)
        await life.tier.check_files()
    (file,) = pack_files(tmp_path / "kv")
    assert file.stat().st_blocks * 512 <= file.stat().st_size - 2 * 4096
    async with packs.TierLife(tmp_path / "kv", 2) as life:
        await life.scanned()
        assert await life.load(keys) == 1
        assert await life.load(keys[2:4]) == 2
        assert await life.load([keys[4]]) == 0
        assert not life.events
        assert await life.tier.remove(keys) == (4, True)
    assert not pack_files(tmp_path / "kv")
    assert not list((tmp_path / "kv").glob("*.gone"))


async def test_a_tenant_is_deleted_from_the_disk_and_others_stay(tmp_path: Path, packs: Any) -> None:
    ann, bob = packs.chain(4, "ann"), packs.chain(4, "bob")
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        life.publish(ann, tenant="ann")
        await life.save(bob, tenant="bob")
        assert await life.tier.sweep(lambda block: block.tenant == "ann") == (4, True)
    async with packs.TierLife(tmp_path / "kv", 2) as life:
        assert await life.load(ann) == 0
        assert await life.load(bob) == 4
        assert life.store.shelf.get(bob[0]).tenant == "bob"


async def test_a_block_from_disk_counts_for_the_tenant_that_stored_it(tmp_path: Path, packs: Any) -> None:
    ann, bob, out = packs.chain(4, "ann"), packs.chain(3, "bob"), packs.chain(2, "out")
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        life.publish(ann, tenant="ann")
        life.publish(out, tenant="out")
        await life.save(bob, tenant="bob")
    async with packs.TierLife(tmp_path / "kv", 2, quotas={"ann": 2 * packs.PAGE}) as life:
        await life.scanned()
        assert await life.load(bob) == 3
        await life.asked_once(ann)
        orders = life.store.shelf.orders
        assert [orders.used_bytes(whose) // packs.PAGE for whose in ("ann", "bob", "")] == [2, 3, 0]
        assert len(life.store.match(bob)) == 3, "who is at his quota evicted another's block"


async def test_a_tenant_whose_quota_is_gone_gets_nothing_up_from_disk_and_leaves_no_trace(
    tmp_path: Path, packs: Any
) -> None:
    out = packs.chain(2, "out")
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        await life.save(out, tenant="out")
    async with packs.TierLife(tmp_path / "kv", 2, quotas={"*": 0}) as life:
        await life.scanned()
        await life.asked_once(out)
        assert not life.store.match(out)
        assert not list(life.store.shelf.orders), "an order stays for a tenant that has no block"


async def test_clear_forgets_everything_at_once_and_for_good(tmp_path: Path, packs: Any) -> None:
    keys = packs.chain(6)
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        await life.save(keys)
        life.publish(packs.chain(3, "waiting"))
        await life.tier.clear()
        assert not pack_files(tmp_path / "kv")
        assert life.tier.promote(keys) == 6  # in RAM still: that is the node's to clear
        assert life.tier.promote(packs.chain(1, "nowhere")) == 0
    async with packs.TierLife(tmp_path / "kv", 2) as life:
        await life.scanned()
        assert await life.load(keys) == 0
        assert await life.load(packs.chain(3, "waiting")) == 0


class TroubledHost(RealHost):
    """A real host whose disk fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.write_error = self.read_error = 0

    def open_directory(self, path: Path, owner: str) -> RealDirectory:
        directory = super().open_directory(path, owner)
        write_new, read = directory.write_new, directory.read

        def failing_write(name: str, data: memoryview) -> None:
            if self.write_error:
                raise OSError(self.write_error, os.strerror(self.write_error))
            write_new(name, data)

        def failing_read(name: str, pieces: Any) -> None:
            if self.read_error:
                raise OSError(self.read_error, os.strerror(self.read_error))
            read(name, pieces)

        directory.write_new, directory.read = failing_write, failing_read  # type: ignore[method-assign]
        return directory


@pytest.fixture
def quick_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interlock.store.packs.health.DISK_RETRY_SECONDS_MIN", 0.02)
    monkeypatch.setattr("interlock.core.limits.DISK_FLUSH_SECONDS", 0.02)


@pytest.mark.usefixtures("quick_recovery")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
async def test_a_disk_that_takes_nothing_is_done_without_and_used_again(
    tmp_path: Path, packs: Any, code: int
) -> None:
    host = TroubledHost()
    async with packs.TierLife(tmp_path / "kv", 1, host=host) as life:
        host.write_error = code
        await life.save(packs.chain(4))
        assert life.tier.state.writes.state == ("full" if code == errno.ENOSPC else "failing")
        assert life.tier.stats()["interlock_store_disk_up_number"] == 0
        assert await life.load(packs.chain(4)) == 4  # from RAM
        assert life.names() == ["store.disk.degraded"]
        host.write_error = 0
        async with asyncio.timeout(packs.PATIENCE_S):
            while life.tier.state.writes.state != "ok":
                await asyncio.sleep(0.01)
        assert life.names() == ["store.disk.degraded", "store.disk.recovered"]
        await life.save(packs.chain(4, "later"))
    host.close()
    async with packs.TierLife(tmp_path / "kv", 2) as life:
        assert await life.load(packs.chain(4, "later")) == 4


@pytest.mark.usefixtures("quick_recovery")
async def test_a_disk_that_cannot_be_read_is_a_miss_and_loses_nothing(tmp_path: Path, packs: Any) -> None:
    host = TroubledHost()
    keys = packs.chain(4)
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        await life.save(keys)
    async with packs.TierLife(tmp_path / "kv", 2, host=host) as life:
        await life.scanned()
        host.read_error = errno.EIO
        for _ in range(limits.DISK_FAILURES_MAX):
            life.tier.promote(keys)
            await life.tier.promoter.settled()
        assert life.tier.promote(keys) == 0, "nobody waits for a disk that fails"
        host.read_error = 0
        async with asyncio.timeout(packs.PATIENCE_S):
            while life.tier.state.reads.state != "ok":
                await asyncio.sleep(0.01)
        assert await life.load(keys) == 4
    host.close()


async def test_a_disk_that_cannot_be_opened_is_opened_later(tmp_path: Path, packs: Any) -> None:
    class Late(RealHost):
        away = True

        def open_directory(self, path: Path, owner: str) -> Directory:
            if self.away:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().open_directory(path, owner)

    host = Late()
    async with packs.TierLife(tmp_path / "kv", 1, host=host) as life:
        life.publish(packs.chain(2))
        assert await life.load(packs.chain(2)) == 2
        assert life.names() == ["store.disk.degraded"]
        host.away = False
        async with asyncio.timeout(packs.PATIENCE_S):
            while life.tier.state is None:
                await asyncio.sleep(0.01)
        await life.save(packs.chain(2, "later"))
    host.close()
    assert pack_files(tmp_path / "kv")


async def test_descriptors_and_memory_do_not_grow_over_ten_times_the_size(
    tmp_path: Path, packs: Any, descriptors: Callable[[], set[str]]
) -> None:
    async with packs.TierLife(tmp_path / "kv", 1, slots=16, disk_bytes=64 * 4096) as life:
        await life.save(packs.chain(8, "first"))
        before = len(descriptors())
        for i in range(80):
            await life.save(packs.chain(8, f"c{i}"))
        assert len(descriptors()) == before
        assert life.tier.state.books.index.records <= 1024
        staging = life.tier.stats()["interlock_store_disk_staging_bytes"]
        assert staging < 1 << 20
        life.check()


async def test_a_disk_that_hangs_costs_no_slots_and_nobody_waits_for_it_long(
    tmp_path: Path, packs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazards W1: bytes of a read that hangs land in staging memory of our own, whenever they come."""
    monkeypatch.setattr("interlock.core.limits.PROMOTION_WAIT_SECONDS_MAX", 0.1)
    release = threading.Event()

    class Hanging(RealHost):
        hangs = False

        def open_directory(self, path: Path, owner: str) -> RealDirectory:
            directory = super().open_directory(path, owner)
            read = directory.read

            def slow(name: str, pieces: Any) -> None:
                if self.hangs:
                    release.wait(packs.PATIENCE_S)
                read(name, pieces)

            directory.read = slow  # type: ignore[method-assign]
            return directory

    host, keys = Hanging(), packs.chain(6)
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        await life.save(keys)
    async with packs.TierLife(tmp_path / "kv", 2, host=host) as life:
        await life.scanned()
        host.hangs = True
        assert life.tier.promote(keys) == 6
        await asyncio.sleep(0.2)  # the bound itself is what is waited for
        assert life.tier.promote(keys) == 0
        assert life.store.slots.count["writing"] == 0
        life.publish(packs.chain(3, "meanwhile"))
        life.check()
        host.hangs = False
        release.set()
        await life.tier.promoter.settled()
        assert await life.load(keys) == 6
    host.close()


async def test_a_block_that_is_being_written_by_an_engine_is_not_promoted_over_it(
    tmp_path: Path, packs: Any
) -> None:
    keys = packs.chain(2)
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        await life.save(keys)
    async with packs.TierLife(tmp_path / "kv", 2) as life:
        number = life.store.layout(packs.LAYOUT)
        assert life.store.begin_promotion(number, [keys[0]], [b""])  # somebody has it in hand
        life.tier.promote(keys)
        await life.tier.promoter.settled()
        assert life.store.shelf.get(keys[0]) is None
        assert life.store.shelf.get(keys[1]) is not None
        life.store.end_promotion(keys[0], None)
        assert await life.load(keys) == 2

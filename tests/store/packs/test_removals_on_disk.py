"""A tenant's deletion against disks that are away, fail, are exchanged, and nodes that die in the middle of it."""

from __future__ import annotations

import asyncio
import errno
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from interlock.core import limits
from interlock.core.errors import InterlockError
from interlock.core.removals import EVERYTHING, Removal, RemovalBook, What
from interlock.host.blocking import BlockingHost
from interlock.host.real import RealHost
from interlock.host.state_file import StateFile
from interlock.store.control import AsyncStoreClient
from interlock.store.node import Node
from interlock.store.packs.files import PackFiles
from interlock.store.packs.reader import Promoter
from interlock.store.packs.staging import Staging
from interlock.store.removals import FILE, KIND, TellRemovals
from interlock.wire.identity import Identity, passing_identity
from interlock.wire.store_messages import Clear, Done, Remove

PATIENCE_S = 10.0


def node_life(packs: Any, base: Path, incarnation: int, *, disk: str = "kv") -> Any:
    """One life of a node over a disk and a file of removals in `base`; `async with`."""
    return packs.NodeLife(base, incarnation, disk=disk)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REMOVAL_RETRY_SECONDS", 0.02)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "node"
    path.mkdir(mode=0o700)
    return path


async def removed(life: Any, tenant: str = "ann") -> Done:
    return await life.node.removals.everywhere(Remove(tenant))


async def all_done(life: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while life.node.removals.book.pending():
            await asyncio.sleep(0.01)


async def test_a_removal_whose_disk_is_away_is_not_said_to_be_done_and_is_done_when_it_opens(
    base: Path, packs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bob = packs.chain(3, "ann"), packs.chain(3, "bob")
    async with node_life(packs, base, 1) as life:
        life.publish(ann, tenant="ann")
        await life.save(bob, tenant="bob")
    monkeypatch.setattr(limits, "DISK_RETRY_SECONDS_MIN", 0.02)
    open_files = PackFiles.open
    with monkeypatch.context() as away:

        def fails(self: Any) -> Any:
            raise OSError(errno.EIO, "the disk is away")

        away.setattr(PackFiles, "open", fails)
        life = node_life(packs, base, 2)
        async with life:
            assert (await removed(life)).missed == ["n"], "its own node could not"
            with pytest.raises(InterlockError, match="could come back"):
                await life.node._desk.answer(Clear(), None)
            with pytest.raises(InterlockError, match="could come back"):
                await life.node._desk.answer(Remove(keys=ann), None)
            away.setattr(PackFiles, "open", open_files)
            async with asyncio.timeout(PATIENCE_S):
                while life.tier.state is None:
                    await asyncio.sleep(0.01)
            await all_done(life)
            assert await life.load(ann) == 0
            assert await life.load(bob) == 3
    async with node_life(packs, base, 3) as life:
        assert await life.load(ann) == 0
        assert await life.load(bob) == 3


async def test_a_node_that_dies_in_the_middle_of_a_removal_brings_nothing_up_and_carries_it_out(
    base: Path, packs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = packs.chain(3, "ann")
    async with node_life(packs, base, 1) as life:
        await life.save(ann, tenant="ann")
    async with node_life(packs, base, 2) as life:
        removals = life.node.removals
        removals.book.begin(What("ann", ""), "n", 77)
        await removals._keep()  # and dies here
    held = asyncio.Event()

    async def waits(what: What) -> tuple[int, bool]:
        await held.wait()
        return await life.node._desk.remove(what)

    life = node_life(packs, base, 3)
    monkeypatch.setattr(life.node.removals, "_sweep", waits)
    async with life:
        await life.scanned()
        await life.asked_once(ann)
        assert len(life.store) == 0, "before it is carried out nothing of it comes up"
        held.set()
        await all_done(life)
    async with node_life(packs, base, 4) as life:
        assert not life.node.removals.book.pending()
        await life.asked_once(ann)
        assert len(life.store) == 0
        await life.save(ann, tenant="ann")
    async with node_life(packs, base, 5) as life:
        assert await life.load(ann) == 3, "what was stored after it stays"


async def test_a_pack_that_cannot_be_read_keeps_a_removal_from_being_done(
    base: Path, packs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = packs.chain(3, "ann")
    async with node_life(packs, base, 1) as life:
        await life.save(ann, tenant="ann")
    toc = PackFiles.toc

    def fails(self: Any, number: int) -> Any:
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(PackFiles, "toc", fails)
    async with node_life(packs, base, 2) as life:
        assert (await removed(life)).missed == ["n"]
        monkeypatch.setattr(PackFiles, "toc", toc)
        await all_done(life)
        assert await life.load(ann) == 0


async def test_evictions_that_cannot_be_recorded_do_not_bring_a_deleted_tenant_back(
    base: Path, packs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk takes no sidecar: the whole pack goes, for removing it needs no room."""
    ann, bob = packs.chain(3, "ann"), packs.chain(3, "bob")

    def full(self: Any, toc: Any, ordinals: Any) -> bool:
        raise OSError(errno.ENOSPC, "no space left")

    async with node_life(packs, base, 1) as life:
        life.publish(bob, tenant="bob")
        await life.save(ann, tenant="ann")
        monkeypatch.setattr(PackFiles, "evict", full)
        state = life.tier.state
        (number,) = state.books.packs.numbers()
        contents = await state.contents(number)
        await state.evict(contents, [contents.by_key[ann[0]].ordinal])
        assert contents.unrecorded, "an ordinary eviction may be lost"
        assert (await removed(life)).missed == []
    monkeypatch.undo()
    async with node_life(packs, base, 2) as life:
        await life.scanned()
        await life.asked_once(ann)
        assert not any(key in life.store.shelf for key in ann)


async def test_a_pack_that_could_come_back_with_a_power_cut_is_not_said_to_be_gone(
    base: Path, packs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the simulator: with its last block a pack's file goes, and a name that goes unsynced may be back."""
    ann = packs.chain(3, "ann")
    sync = PackFiles.sync

    def fails(self: Any) -> None:
        raise OSError(errno.EIO, "the disk is away")

    async with node_life(packs, base, 1) as life:
        await life.save(ann, tenant="ann")
        monkeypatch.setattr(PackFiles, "sync", fails)
        assert (await removed(life)).missed == ["n"]
        assert await life.tier.remove(ann) == (0, False)
        monkeypatch.setattr(PackFiles, "sync", sync)
        await all_done(life)


async def test_in_another_directory_of_packs_nothing_is_done_yet(base: Path, packs: Any) -> None:
    ann = packs.chain(3, "ann")
    async with node_life(packs, base, 1, disk="old") as life:
        await life.save(ann, tenant="ann")
    async with node_life(packs, base, 2, disk="new") as life:
        await life.save(packs.chain(2, "bob"), tenant="bob")
        assert (await removed(life)).missed == []
    async with node_life(packs, base, 3, disk="old") as life:
        await all_done(life)
        assert await life.load(ann) == 0


async def test_what_was_removed_in_a_life_without_a_disk_does_not_come_back_from_the_disk_of_the_next(
    base: Path, packs: Any
) -> None:
    ann, bob = packs.chain(3, "ann"), packs.chain(3, "bob")
    async with node_life(packs, base, 1) as life:
        assert (await removed(life, "carl")).missed == [], "now the file names the directory of this life"
        life.publish(ann, tenant="ann")
        await life.save(bob, tenant="bob")
    host = RealHost()
    memory = host.create_memory("test", 64 * packs.PAGE)
    kept = StateFile(host.files, base / FILE, KIND, limits.REMOVALS_FILE_BYTES_MAX)
    node = Node(host, Identity("n", 2, b"n"), memory, 3, removals=kept)
    try:
        await node.start(f"unix:{base}/2.sock")
        assert (await node.removals.everywhere(Remove("ann"))).missed == []
    finally:
        await node.close()
        host.close()
    async with node_life(packs, base, 3) as life:
        await all_done(life)
        assert await life.load(ann) == 0
        assert await life.load(bob) == 3


async def test_a_node_that_remembers_all_it_can_still_hears_of_what_needs_no_room(
    base: Path, packs: Any
) -> None:
    async with node_life(packs, base, 1) as life:
        removals = life.node.removals
        known = Removal(What("ann", ""), "m", 1, done=True)
        removals.book = RemovalBook([known], kept_max=1)
        said = [Removal(What("bob", ""), "m", 2), Removal(What("ann", ""), "m", 3)]
        with pytest.raises(InterlockError, match="removals are remembered here"):
            await removals.told(TellRemovals(0, 0, said))
        assert removals.book.get(known.name).epoch == 3
        await all_done(life)


async def test_a_defect_in_a_removal_does_not_keep_the_next_try_from_carrying_it_out(
    base: Path, packs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node_life(packs, base, 1) as life:
        removals = life.node.removals
        sweep, failed = removals._sweep, []

        async def fails(what: What) -> tuple[int, bool]:
            if not failed:
                failed.append(what)
                raise RuntimeError("a defect")
            swept: tuple[int, bool] = await sweep(what)
            return swept

        monkeypatch.setattr(removals, "_sweep", fails)
        await removals.told(TellRemovals(0, 0, [Removal(What("ann", ""), "m", 1)]))
        await all_done(life)
        assert failed == [What("ann", "")]


async def test_who_waits_for_promotions_does_not_wait_for_those_that_are_asked_for_anew() -> None:
    """Blocks that find no room are asked for again and again: a removal would never be over."""
    one, other = b"1" * 32, b"2" * 32

    class Clock:
        looks = 0

        async def sleep_s(self, _: float) -> None:
            self.looks += 1
            assert self.looks < 10, "each was given up once, and it waits still"
            promoter._coming = {one} if self.looks % 2 else {other}

    state: Any = SimpleNamespace(host=SimpleNamespace(clock=Clock()))
    promoter = Promoter(state, Staging(0))
    promoter._coming = {one, other}
    await promoter.settled()


async def test_a_file_of_removals_that_is_spoilt_has_everything_removed_and_is_set_aside(
    base: Path, packs: Any
) -> None:
    keys = packs.chain(3)
    async with node_life(packs, base, 1) as life:
        await life.save(keys)
        await removed(life)
    (base / FILE).write_bytes(b"interlock store removals\nrot")
    async with node_life(packs, base, 2) as life:
        assert [removal.what for removal in life.node.removals.book] == [EVERYTHING]
        await all_done(life)
        assert await life.load(keys) == 0
        await life.save(keys)
    assert list(base.glob(f"{FILE}.unreadable-*"))
    async with node_life(packs, base, 3) as life:
        assert await life.load(keys) == 3


async def test_a_removal_that_cannot_be_written_down_is_not_said_to_last(
    base: Path, packs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, body: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    async with node_life(packs, base, 1) as life:
        monkeypatch.setattr(StateFile, "save", full)
        with pytest.raises(InterlockError, match="could not be written down"):
            await removed(life)


async def test_a_node_process_that_is_killed_after_a_removal_remembers_it(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from interlock.host.real import RealHost; "
        "from interlock.store.main import StoreConfig, run_node; base = Path(sys.argv[1]); "
        "asyncio.run(run_node(RealHost(), StoreConfig(address=f'unix:{base}/s', state_dir=base / 'state', "
        "slab_bytes=1 << 20, disk=base / 'kv', disk_bytes=1 << 30)))"
    )

    async def stats_after(*, remove: str = "") -> dict[str, float]:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(tmp_path))
        client = AsyncStoreClient(
            RealHost(), f"unix:{tmp_path}/s", passing_identity(BlockingHost(), "test"), timeout_s=PATIENCE_S
        )
        try:
            async with asyncio.timeout(3 * PATIENCE_S):
                while True:
                    try:
                        if remove:
                            await client.remove(tenant=remove)
                        return await client.stats()
                    except (OSError, InterlockError):
                        await asyncio.sleep(0.02)
        finally:
            await client.close()
            process.kill()
            await process.wait()

    assert (await stats_after(remove="ann"))["interlock_store_removals_pending_number"] == 0
    stats = await stats_after()
    assert stats["interlock_store_removals_number"] == 1
    assert stats["interlock_store_removals_pending_number"] == 0

"""KV events of the disk: a block that leaves RAM and stays below is told so, and a router's table is what is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from interlock.store import changes
from interlock.store.kv_events import AllBlocksCleared, BlockStored, EventBatch, KVEvents
from interlock.wire.store_messages import Remove

PATIENCE_S = 10.0


class Router:
    """A publisher whose one subscriber keeps, by medium, which blocks there are; what it heard can be replayed."""

    def __init__(self) -> None:
        self._questions: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self._decoder = msgspec.msgpack.Decoder(EventBatch)
        self.replayed: list[tuple[bytes, ...]] = []
        self.cleared = 0
        self.table: dict[tuple[bytes, str | None], bytes | None] = {}
        self.replay = "somewhere"

    async def publish(self, frames: tuple[bytes, ...]) -> None:
        self._keep(self._decoder.decode(frames[2]))

    def _keep(self, batch: EventBatch) -> None:
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self.table.clear()
                self.cleared += 1
                continue
            above = event.parent_block_hash if isinstance(event, BlockStored) else None
            for key in event.block_hashes:
                if isinstance(event, BlockStored):
                    self.table[key, event.medium] = above
                    above = key
                else:
                    self.table.pop((key, event.medium), None)

    async def question(self) -> list[bytes]:
        return await self._questions.get()

    async def answer(self, frames: tuple[bytes, ...]) -> None:
        self.replayed.append(frames)

    def close(self) -> None:
        """Nothing is open."""

    def at(self, medium: str) -> set[bytes]:
        return {key for key, where in self.table if where == medium}

    async def ask_again(self, first: int) -> None:
        """All batches from there on, instead of what was heard."""
        self.replayed.clear()
        self._questions.put_nowait([b"me", b"", first.to_bytes(8, "big")])
        await eventually(lambda: bool(self.replayed) and self.replayed[-1][3] == b"\xff" * 8)
        self.table.clear()
        for _, _, _, _, payload in self.replayed[:-1]:
            self._keep(self._decoder.decode(payload))


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "node"
    path.mkdir(mode=0o700)
    return path


def on_disk(life: Any) -> set[bytes]:
    """What the books say can be found there."""
    books = life.tier.state.books
    return {key for number in books.packs.numbers() for key in books.index.keys_in(number)}


def same(router: Router, life: Any) -> Callable[[], bool]:
    """Whether the router knows what there is in RAM and on the disk."""
    return lambda: (
        router.at("CPU") == {block.key for block in life.store.shelf}
        and router.at("STORAGE") == on_disk(life)
    )


async def test_a_block_that_leaves_ram_and_stays_on_the_disk_is_removed_from_ram_alone(
    base: Path, packs: Any
) -> None:
    router, keys = Router(), packs.chain(4)
    async with packs.NodeLife(base, 1, publisher=router) as life:
        await life.save(keys)
        await eventually(lambda: router.at("STORAGE") == router.at("CPU") == set(keys))
        assert [router.table[key, "STORAGE"] for key in keys] == [None, *keys[:-1]], "as the chain that it is"
        block = life.store.shelf.get(keys[3])
        life.store.withdraw([block.key], [block.slot])
        await eventually(lambda: router.at("CPU") == set(keys[:3]))
        assert router.at("STORAGE") == set(keys)
        assert await life.load(keys) == 4
        await eventually(same(router, life))
        await life.tier.remove([keys[1]])
        await eventually(lambda: router.at("STORAGE") == {keys[0], *keys[2:]})
        await router.ask_again(0)
        assert same(router, life)(), "a replay tells the same"


async def test_what_the_disk_held_before_the_start_is_told_and_a_cleared_disk_is_empty(
    base: Path, packs: Any
) -> None:
    keys = packs.chain(5)
    async with packs.NodeLife(base, 1) as life:
        await life.save(keys)
    router = Router()
    async with packs.NodeLife(base, 2, publisher=router) as life:
        await eventually(lambda: router.at("STORAGE") == set(keys))
        assert router.at("CPU") == set()
        assert await life.load(keys) == 5
        await eventually(same(router, life))
        await life.tier.clear()
        await eventually(lambda: router.cleared == 2 and router.at("STORAGE") == set())
        await eventually(same(router, life))
        assert router.at("CPU") == set(keys)


async def test_blocks_that_the_disk_evicts_and_packs_that_are_set_aside_are_told_of(
    base: Path, packs: Any
) -> None:
    router = Router()
    async with packs.NodeLife(base, 1, publisher=router, slots=16, disk_bytes=40 * packs.PAGE) as life:
        for number in range(12):
            await life.save(packs.chain(4, f"c{number}"))
        assert life.tier.state.counters["evicted"]
        await eventually(same(router, life))
        assert router.at("STORAGE")
        number = life.tier.state.books.packs.numbers()[0]
        await life.tier.state.set_aside(number, "its header is spoilt")
        await eventually(same(router, life))
        await life.node.removals.everywhere(Remove(prefix=packs.chain(4, "c11")[2].hex()))
        await eventually(same(router, life))
        assert packs.chain(4, "c11")[2] not in router.at("STORAGE")


async def test_a_publisher_that_fell_behind_the_disk_tells_ram_and_disk_anew(
    base: Path, packs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, keys = Router(), packs.chain(6)
    async with packs.NodeLife(base, 1, publisher=router) as life:
        await life.save(keys)
        await eventually(same(router, life))
        log = life.node._disk_changes
        for number in range(50):  # faster than they are told
            log.append(
                changes.Change(changes.ChangeKind.REMOVED, bytes([number]) * 32, b"", 0, medium="STORAGE")
            )
        log._ring = [None] * 2
        await eventually(lambda: router.cleared == 2)
        await eventually(same(router, life))
        assert router.at("STORAGE") == set(keys)


def test_who_follows_a_log_that_was_cut_has_a_gap_and_who_begins_behind_it_has_none() -> None:
    log = changes.ChangeLog(kept_max=4)
    change = changes.Change(changes.ChangeKind.STORED, b"k" * 32, b"", 4)
    log.extend([change] * 3)
    log.cut()
    assert [log.since(after, 9) for after in range(4)] == [None] * 4
    assert log.since(4, 9) == []
    log.append(change)
    assert log.since(4, 9) == [change]
    assert log.since(3, 9) is None


async def test_changes_are_told_while_a_large_disk_is_being_listed(base: Path, packs: Any) -> None:
    """Told only afterwards they would be forgotten by then, all would be told again, and so on for ever."""
    async with packs.NodeLife(base, 1) as life:
        shelf, router = life.store.shelf, Router()
        shelf.changes = changes.ChangeLog(kept_max=8)
        above, below = packs.chain(20, "above"), packs.chain(20, "below")

        class Lower:
            is_open = True

            async def listing(self) -> AsyncIterator[list[changes.Change]]:
                for one, other in zip(above, below, strict=True):
                    shelf.changes.append(changes.Change(changes.ChangeKind.STORED, one, b"", 4))
                    yield [changes.Change(changes.ChangeKind.STORED, other, b"", 4, medium=changes.DISK)]

        publisher: Any = router
        events = KVEvents(life.host, shelf, publisher, disk=(Lower(), changes.ChangeLog()))
        telling = asyncio.create_task(events.run())
        try:
            await eventually(lambda: router.at("STORAGE") == set(below) and router.at("CPU") == set(above))
            assert router.cleared == 1, "it fell behind"
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

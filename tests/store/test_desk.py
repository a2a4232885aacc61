"""Listings, changes, an administrator's verbs and frozen writers, against a real node."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from interlock.core.errors import ChannelFault
from interlock.host.real import RealHost
from interlock.store import blocks as blocks_module
from interlock.store import changes as changes_module
from interlock.store import control as control_module
from interlock.store import quarantine as quarantine_module
from interlock.store.api import Store
from interlock.store.control import AsyncStoreClient
from interlock.store.mirror import IndexMirror
from interlock.store.notice import Notice
from interlock.wire.identity import passing_identity
from interlock.wire.store_messages import Pin


@pytest.fixture
async def control(rig: Any) -> AsyncIterator[AsyncStoreClient]:
    host = RealHost()
    client = AsyncStoreClient(host, rig.address, passing_identity(host, "test"))
    yield client
    await client.close()
    host.close()


def put(rig: Any, tools: Any, count: int, *, start: int = 0, tenant: str = "") -> list[bytes]:
    keys, _ = tools.make_keys(count, start=start)
    with Store.open(rig.address, tools.LAYOUT) as store:
        data = np.full((count, tools.LAYOUT.block_bytes), start % 251, dtype=np.uint8)
        assert store.put(keys, data, tenant=tenant).stored == count
    return keys


async def test_first_questions_that_come_at_once_share_one_connection(
    rig: Any, control: AsyncStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that were made at once one would be kept, and nobody would close the other."""
    rig.node()
    made, real = [], control_module.connect_channel

    async def connect(*arguments: Any, **options: Any) -> Any:
        made.append(await real(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(control_module, "connect_channel", connect)
    await asyncio.gather(control.stats(), control.stats())
    assert len(made) == 1


# --- listings and verbs ------------------------------------------------------------------------------------------


async def test_a_listing_shows_all_blocks_page_by_page_with_their_tenant(
    rig: Any, tools: Any, control: AsyncStoreClient
) -> None:
    rig.node()
    a = await asyncio.to_thread(put, rig, tools, 10, tenant="alice")
    b = await asyncio.to_thread(put, rig, tools, 10, start=1000, tenant="bob")
    page = await control.page(limit=7)
    assert page.next is not None
    assert len(page.blocks) == 7
    listed = {block.key: block async for block in control.blocks()}
    assert set(listed) == {*a, *b}
    assert listed[a[3]].parent == a[2]
    assert {block.tenant async for block in control.blocks(tenant="bob")} == {"bob"}
    assert [block.key async for block in control.blocks(prefix=a[4].hex()[:30])] == [a[4]]
    assert {use.tenant: use.used_bytes for use in await control.tenants()} == {
        "alice": 10 * 4096,
        "bob": 10 * 4096,
    }


async def test_a_tenants_deletion_takes_what_is_published_and_what_is_under_way(
    rig: Any, tools: Any, control: AsyncStoreClient
) -> None:
    node = rig.node()
    await asyncio.to_thread(put, rig, tools, 5, tenant="alice")
    other = await asyncio.to_thread(put, rig, tools, 5, start=500, tenant="bob")
    keys, parents = tools.make_keys(3, start=9000)
    scheduler, rank = rig.scheduler(), rig.rank()
    body = {"tenant": "alice"}
    grant = await asyncio.to_thread(lambda: scheduler.start_write("s", 1, keys, parents, **body))
    assert grant is not None
    sums = rank.write(grant, keys, 1)
    assert await control.remove(tenant="alice") == 5
    rank.report(grant, [True] * 3, sums)
    assert rank.delivered(10.0)
    assert len(await control.match(keys)) == 0
    assert len(await control.match(other)) == 5
    assert node.slots()["writing"] == node.slots()["quarantined"] == 0
    assert [use.tenant for use in await control.tenants()] == ["bob"]


async def test_a_clear_is_done_in_slices_and_look_ups_are_answered_between_them(
    rig: Any, tools: Any, control: AsyncStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "BLOCKS_LISTED_MAX", 2)
    node = rig.node()
    keys = await asyncio.to_thread(put, rig, tools, 40)
    seen: list[int] = []

    async def clear_and_look() -> None:
        clearing = asyncio.ensure_future(node.node._desk.answer(Clear(), None))
        while not clearing.done():
            seen.append(len(node.node.store))
            await asyncio.sleep(0)
        assert (await clearing).count == 40

    from interlock.wire.store_messages import Clear

    await asyncio.to_thread(node.run, clear_and_look())
    assert len(set(seen)) > 10
    assert await control.match(keys) == []


async def test_verification_finds_the_one_bad_block_and_forgets_it(
    rig: Any, tools: Any, control: AsyncStoreClient
) -> None:
    node = rig.node()
    keys = await asyncio.to_thread(put, rig, tools, 20)
    assert [(page.checked, page.bad) async for page in control.verify()] == [(20, [])]
    slot = node.look(lambda n: n.store.shelf.get(keys[7]).slot)
    node.look(lambda n: n._memory.view.__setitem__(slot * 4096 + 100, 255))
    assert [page.bad async for page in control.verify()] == [[keys[7]]]
    assert len(await control.match(keys)) == 7
    assert (await control.stats())["interlock_store_verified_bad_blocks_total"] == 1


async def test_removing_nothing_in_particular_is_refused(rig: Any, control: AsyncStoreClient) -> None:
    rig.node()
    with pytest.raises(ChannelFault, match="name keys"):
        await control.remove()


async def test_only_who_can_be_proven_gone_may_pin(rig: Any, tools: Any) -> None:
    rig.node()
    with pytest.raises(ChannelFault, match="attach"):
        await asyncio.to_thread(rig.channel().request, Pin("p", [b"k" * 32], 1.0), 5.0)


def test_a_dead_owners_pins_are_released(rig: Any, tools: Any) -> None:
    node = rig.node()
    keys = put(rig, tools, 4)
    rank = rig.rank(engine="pinner")
    rank.pin(keys, 600.0)
    assert node.look(lambda n: n.store.shelf.pins.bytes) == 4 * 4096
    rank.kill()
    tools.eventually(lambda: node.look(lambda n: n.store.shelf.pins.bytes) == 0, "the pins ended")


# --- changes -----------------------------------------------------------------------------------------------------


async def test_a_mirror_follows_stores_evictions_and_removals(
    rig: Any, tools: Any, control: AsyncStoreClient
) -> None:
    node = rig.node()
    mirror = IndexMirror(control)
    await mirror.follow(0.0)
    for turn in range(12):
        await asyncio.to_thread(put, rig, tools, 9, start=turn * 1000)
    await control.remove(prefix="a")
    while await mirror.follow(0.0):
        pass
    assert set(mirror.parents) == set(node.look(lambda n: [b.key for b in n.store.shelf]))
    assert mirror.resyncs == 1


async def test_a_mirror_that_missed_more_than_is_kept_lists_again_and_is_right(
    rig: Any, tools: Any, control: AsyncStoreClient
) -> None:
    node = rig.node()
    node.look(lambda n: setattr(n.store.shelf.changes, "_ring", [None] * 8))
    mirror = IndexMirror(control)
    await mirror.follow(0.0)
    keys = await asyncio.to_thread(put, rig, tools, 30)
    await mirror.follow(0.0)
    assert mirror.resyncs == 2
    assert mirror.prefix(keys) == 30
    more = await asyncio.to_thread(put, rig, tools, 3, start=5000)
    await mirror.follow(0.0)
    assert (mirror.resyncs, mirror.prefix(more)) == (2, 3)


async def test_a_mirror_of_a_restarted_node_starts_anew(
    rig: Any, tools: Any, control: AsyncStoreClient
) -> None:
    node = rig.node()
    mirror = IndexMirror(control)
    await mirror.follow(0.0)
    await asyncio.to_thread(put, rig, tools, 5)
    await mirror.follow(0.0)
    assert len(mirror.parents) == 5
    await asyncio.to_thread(node.close)
    rig._things.remove(node)
    rig.node()
    async with asyncio.timeout(10):
        while mirror.resyncs < 2:
            with contextlib.suppress(ConnectionError):  # the old connection may be found to be over only now
                await mirror.follow(0.0)
    assert len(mirror.parents) == 0


async def test_a_watcher_waits_for_the_change_and_not_for_its_deadline(
    rig: Any, tools: Any, control: AsyncStoreClient
) -> None:
    rig.node()
    mirror = IndexMirror(control)
    await mirror.follow(0.0)
    waiting = asyncio.ensure_future(mirror.follow(20.0))
    async with asyncio.timeout(10):
        await asyncio.to_thread(put, rig, tools, 2)
        assert await waiting > 0


async def test_a_notice_rings_for_all_who_wait_and_nobody_later() -> None:
    notice = Notice()
    notice.ring()
    waits = [asyncio.ensure_future(notice.wait(5.0)) for _ in range(3)]
    await asyncio.sleep(0)
    notice.ring()
    assert await asyncio.gather(*waits) == [True] * 3
    assert await notice.wait(0.01) is False


def test_changes_hold_no_more_than_their_ring() -> None:
    log = changes_module.ChangeLog(kept_max=3)
    for number in range(100):
        log.append(changes_module.Change(changes_module.ChangeKind.STORED, bytes([number]) * 32, b"", 1))
    assert len(log._ring) == 3
    assert (log.oldest, log.last) == (98, 100)


# --- frozen writers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [True, False])
def test_a_frozen_writer_above_the_share_is_ended_where_that_is_allowed_and_its_slots_return(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    monkeypatch.setattr(quarantine_module, "FROZEN_WRITER_SECONDS", 0.2)
    node = rig.node(join_s=0.3)
    node.look(lambda n: setattr(n._witness, "_end_frozen_writers", ends))
    keys, parents = tools.make_keys(40)
    frozen, other = rig.rank(), rig.rank(engine="other")
    scheduler = rig.scheduler()
    assert len(scheduler.start_write("s", 1, keys, parents).grants) == 40
    frozen.signal(signal.SIGSTOP)
    if ends:
        frozen.process.wait(10)
        tools.eventually(lambda: node.slots()["quarantined"] == 0, "its exit freed its slots")
        assert rig.stats()["interlock_store_frozen_writers_ended_total"] == 1
    else:
        tools.eventually(lambda: rig.stats()["interlock_store_frozen_writers"] == 1, "it is named")
        assert node.slots()["quarantined"] == 40
        assert frozen.process.poll() is None
    assert other.process.poll() is None


def test_a_slow_writer_below_the_share_is_left_alone(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine_module, "FROZEN_WRITER_SECONDS", 0.0)
    node = rig.node(join_s=0.1)
    node.look(lambda n: setattr(n._witness, "_end_frozen_writers", True))
    keys, parents = tools.make_keys(10)
    rank, scheduler = rig.rank(), rig.scheduler()
    grant = scheduler.start_write("s", 1, keys, parents)
    tools.eventually(lambda: node.slots()["quarantined"] == 10, "its session ended without it")
    node.run(asyncio.sleep(0.1))
    assert rank.process.poll() is None
    rank.report(grant, [False] * 10, [[]] * 10)
    tools.eventually(lambda: node.slots()["quarantined"] == 0, "it promised after all")


def test_an_engine_that_died_whole_leaves_neither_slot_nor_session_nor_key(rig: Any, tools: Any) -> None:
    node = rig.node()
    keys, parents = tools.make_keys(6)
    ranks = [rig.rank(0, 2), rig.rank(1, 2)]
    scheduler = rig.scheduler_process(2)
    grant = scheduler.start_write("s", 1, keys, parents)
    assert len(grant["grants"]) == 6
    for process in (scheduler, *ranks):
        process.signal(signal.SIGKILL)
    tools.eventually(lambda: node.slots()["writing"] == node.slots()["quarantined"] == 0, "all exits seen")
    assert node.look(lambda n: (n.store.writes.sessions_live, n.store.count_under_way(keys))) == (0, 0)
    other = rig.rank(engine="other")
    tools.save(rig.scheduler(engine="other"), [other], "s", keys, parents)
    assert node.slots()["published"] == 6

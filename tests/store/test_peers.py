"""Two nodes on two hosts: what one has published the other reads straight into its staging, verifies, and serves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from interlock.core import limits
from interlock.core.errors import ChannelFault
from interlock.core.layouts import KVLayout
from interlock.core.prefixes import KeySalt, chain_keys
from interlock.host.real import RealHost
from interlock.membership.directory import StaticDirectory
from interlock.store import filling, peers
from interlock.store.checksums import Binding, block_checksums, verify_block
from interlock.store.main import slab_number
from interlock.store.node import Node
from interlock.transfer.engine import LaneOptions, TransferEngine
from interlock.wire.channel import Channel, connect_channel
from interlock.wire.identity import Identity, passing_identity
from interlock.wire.locations import Location
from interlock.wire.store_messages import Done, Match, Matched, NodeMessage, Remove

LAYOUT = KVLayout(layers=2, heads=4, block_tokens=4, content=32, dtype="float32")
SALT = KeySalt(model="m", dtype="float32", layout_digest=LAYOUT.digest())
SLOTS = 64


def keys_of(start: int, count: int) -> list[bytes]:
    return chain_keys(range(start, start + LAYOUT.block_tokens * count), LAYOUT.block_tokens, SALT)


class Host:
    """A node with its engine, as one host would have them."""

    def __init__(
        self,
        name: str,
        life: int,
        directory: Path,
        addresses: StaticDirectory,
        quotas: dict[str, int] | None = None,
    ) -> None:
        self.quotas = quotas
        self.name, self.host = name, RealHost()
        self.me = Identity(name, life, f"{name}{life}".encode())
        self.memory = self.host.create_memory("test-slab", SLOTS * LAYOUT.block_bytes)
        self.slab = slab_number(name, life)
        self.path = directory / f"{name}{life}"
        self.path.mkdir(mode=0o700)
        self.engine = TransferEngine(
            self.host,
            self.me,
            "tcp:127.0.0.1:0",
            directory=addresses,
            token=b"fleet",
            lanes=LaneOptions(kinds=("tcp",)),
        )
        self.addresses = addresses
        self.node: Node
        self.channel: Channel

    async def start(self, others: list[str]) -> None:
        await self.engine.start()
        self.addresses.update(self.name, self.engine.address)
        self.node = Node(
            self.host,
            self.me,
            self.memory,
            self.slab,
            tick_s=0.02,
            quotas=self.quotas,
            peers=(self.engine, others),
        )
        address = f"unix:{self.path}/store.sock"
        await self.node.start(address)
        me = passing_identity(self.host, "client")
        self.channel = await connect_channel(
            self.host, address, me=me, role="test", accept=NodeMessage, deadline_s=5
        )

    def save(self, keys: list[bytes], fill: int, tenant: str = "") -> None:
        """Published as a rank's save would be, without the rank."""
        store = self.node.store
        parents = [b"", *keys[:-1]]
        number = store.layout(LAYOUT)
        for key, slot in zip(keys, store.begin_promotion(number, keys, parents, tenant), strict=True):
            data = bytes((fill + slot + i) % 251 for i in range(LAYOUT.block_bytes))
            start = slot * 4096
            self.memory.view[start : start + LAYOUT.block_bytes] = data
            store.end_promotion(
                key, block_checksums(Binding(key, slot, self.me.incarnation, self.slab), LAYOUT, data)
            )

    async def match(self, keys: list[bytes]) -> Matched:
        return await self.channel.request(Match(keys), 5.0)

    async def match_all(self, keys: list[bytes]) -> list[Location]:
        """Asks again as long as blocks are coming, as a scheduler does; then what there is."""
        async with asyncio.timeout(10):
            while True:
                found = await self.match(keys)
                if len(found.locations) == len(keys) or not found.coming:
                    return found.locations
                await asyncio.sleep(0.005)

    def good(self, key: bytes, location: Location) -> bool:
        start = location.slot * 4096
        data = self.memory.view[start : start + LAYOUT.block_bytes]
        binding = Binding(key, location.slot, self.me.incarnation, self.slab)
        return verify_block(binding, LAYOUT, data, location.checksums)

    async def close(self) -> None:
        self.node.check_integrity()
        await self.channel.close()
        await self.node.close()
        await self.engine.close()
        self.engine.check_integrity()
        self.host.close()


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[tuple[Host, Host]]:
    addresses = StaticDirectory()
    one, other = Host("one", 1, tmp_path, addresses), Host("two", 1, tmp_path, addresses)
    await one.start(["two"])
    await other.start(["one"])
    yield one, other
    await one.close()
    await other.close()


async def known(host: Host, keys: list[bytes]) -> None:
    """Until the host has heard that its peer has these."""
    async with asyncio.timeout(10):
        while not set(keys) <= set(host.node.peers._where):
            await asyncio.sleep(0.005)


async def test_a_block_of_another_host_is_served_here_with_the_bytes_it_was_saved_with(
    two: tuple[Host, Host],
) -> None:
    one, other = two
    keys = keys_of(0, 8)
    one.save(keys, 7)
    await known(other, keys)
    found = await other.match_all(keys)
    assert len(found) == len(keys)
    assert all(other.good(key, at) for key, at in zip(keys, found, strict=True))
    (there,) = [await one.match(keys)]
    for mine, theirs in zip(found, there.locations, strict=True):
        begin, origin = mine.slot * 4096, theirs.slot * 4096
        size = LAYOUT.block_bytes
        assert other.memory.view[begin : begin + size] == one.memory.view[origin : origin + size]
    assert other.node.peers.stats()["interlock_store_peers_promoted_blocks_total"] == 8


async def test_a_peers_block_counts_here_for_the_tenant_that_stored_it_there(tmp_path: Path) -> None:
    addresses = StaticDirectory()
    one = Host("one", 1, tmp_path, addresses)
    quotas = {"ann": 2 * LAYOUT.block_bytes, "out": 0}
    other = Host("two", 1, tmp_path, addresses, quotas)
    await one.start(["two"])
    await other.start(["one"])
    ann, bob, out = keys_of(0, 4), keys_of(1000, 3), keys_of(2000, 2)
    one.save(ann, 1, "ann")
    one.save(bob, 2, "bob")
    one.save(out, 3, "out")
    await known(other, [*ann, *bob, *out])
    assert [len(await other.match_all(keys)) for keys in (ann, bob, out)] == [2, 3, 0]
    orders = other.node.store.shelf.orders
    used = {tenant: orders.used_bytes(tenant) // LAYOUT.block_bytes for tenant in ("ann", "bob", "out", "")}
    assert used == {"ann": 2, "bob": 3, "out": 0, "": 0}
    assert all(other.node.store.shelf.get(key).tenant == "bob" for key in bob)
    await one.close()
    await other.close()


async def test_two_nodes_read_from_each_other_at_once(two: tuple[Host, Host]) -> None:
    one, other = two
    mine, theirs = keys_of(0, 16), keys_of(1000, 16)
    one.save(mine, 1)
    other.save(theirs, 2)
    await asyncio.gather(known(one, theirs), known(other, mine))
    for_one, for_other = await asyncio.gather(one.match_all(theirs), other.match_all(mine))
    assert len(for_one) == len(for_other) == 16
    assert all(one.good(key, at) for key, at in zip(theirs, for_one, strict=True))
    assert all(other.good(key, at) for key, at in zip(mine, for_other, strict=True))


async def test_bytes_that_fail_their_check_are_a_miss_and_take_no_slot(two: tuple[Host, Host]) -> None:
    one, other = two
    keys = keys_of(0, 4)
    one.save(keys, 3)
    await known(other, keys)
    (there,) = [await one.match(keys)]
    one.memory.view[there.locations[2].slot * 4096 + 5] ^= 1
    found = await other.match_all(keys)
    assert len(found) == 2, "a block whose bytes were changed, or one behind it, was served"
    await asyncio.sleep(0.05)
    assert other.node.peers.stats()["interlock_store_peers_bad_blocks_total"] == 1
    other.node.check_integrity()


async def test_what_a_peer_forgets_is_no_hit_here(two: tuple[Host, Host]) -> None:
    one, other = two
    keys = keys_of(0, 4)
    one.save(keys, 3)
    await known(other, keys)
    for key in reversed(keys):
        block = one.node.store.shelf.get(key)
        assert block is not None
        one.node.store.shelf.withdraw(key, block.slot)
    async with asyncio.timeout(10):
        while other.node.peers._where:
            await asyncio.sleep(0.005)
    assert not (await other.match(keys)).coming


async def test_a_peer_that_is_gone_and_back_is_followed_again(tmp_path: Path) -> None:
    addresses = StaticDirectory()
    one, other = Host("one", 1, tmp_path, addresses), Host("two", 1, tmp_path, addresses)
    await one.start(["two"])
    await other.start(["one"])
    keys = keys_of(0, 4)
    one.save(keys, 3)
    await known(other, keys)
    await one.close()
    async with asyncio.timeout(10):
        while other.node.peers._where:
            await asyncio.sleep(0.005)
    assert not await other.match_all(keys)
    again = Host("one", 2, tmp_path, addresses)
    await again.start(["two"])
    again.save(keys, 9)
    await known(other, keys)
    found = await other.match_all(keys)
    assert len(found) == 4
    assert all(other.good(key, at) for key, at in zip(keys, found, strict=True))
    await again.close()
    await other.close()


async def remove(host: Host, **what: str) -> Done:
    return await host.channel.request(Remove(**what), 10.0)


async def test_a_tenant_removed_at_one_node_is_gone_at_its_peers_and_does_not_come_back(
    two: tuple[Host, Host],
) -> None:
    one, other = two
    ann, bob = keys_of(0, 6), keys_of(1000, 4)
    one.save(ann, 1, "ann")
    one.save(bob, 2, "bob")
    await known(other, [*ann, *bob])
    assert len(await other.match_all(ann[:3])) == 3, "it is at both nodes now"
    done = await remove(other, tenant="ann")
    assert (done.count, done.missed) == (9, [])
    for host in two:
        assert not await host.match_all(ann)
    assert len(await other.match_all(bob)) == 4, "another's blocks still come up"
    one.save(ann, 5, "ann")
    await known(other, ann)
    assert len(await other.match_all(ann)) == 6, "what is stored after a removal is served like anything else"


async def test_a_block_that_is_coming_while_its_tenant_is_removed_does_not_arrive_after_the_broom(
    two: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    ann = keys_of(0, 4)
    one.save(ann, 1, "ann")
    await known(other, ann)
    begun, go_on = threading.Event(), threading.Event()
    rebind_all = filling._rebind_all

    def slowly(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return rebind_all(*args)

    monkeypatch.setattr(filling, "_rebind_all", slowly)
    assert (await other.match(ann)).coming == 4
    assert await asyncio.to_thread(begun.wait, 10)
    removing = asyncio.create_task(remove(other, tenant="ann"))
    async with asyncio.timeout(10):
        while len(one.node.store):
            await asyncio.sleep(0.005)
    assert (await removing).missed == []
    go_on.set()
    async with asyncio.timeout(10):
        while other.node.peers._coming:
            await asyncio.sleep(0.005)
    assert not await other.match_all(ann)
    assert len(other.node.store) == 0


async def test_a_peer_that_was_away_while_a_tenant_was_deleted_never_gives_his_blocks_to_anybody(
    two: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    ann, bob = keys_of(0, 4), keys_of(1000, 2)
    one.save(ann, 1, "ann")
    one.save(bob, 2, "bob")
    await known(other, [*ann, *bob])

    back = asyncio.Event()

    async def deaf(_: Any) -> None:
        await back.wait()
        raise OSError("it was away")

    with monkeypatch.context() as away:
        away.setattr(one.node.removals, "_learn", deaf)
        away.setattr(limits, "PEER_REMOVE_SECONDS_MAX", 0.3)
        assert (await remove(other, tenant="ann")).missed == ["one"]
        assert len(one.node.store) == 6, "it has heard nothing"
        assert not await other.match_all(ann)
        async with asyncio.timeout(10):
            while other.node.peers._coming:
                await asyncio.sleep(0.005)
        assert not await other.match_all(ann), "however often it is asked for"
        await known(other, bob)
        assert len(await other.match_all(bob)) == 2, "another's blocks come up"
        back.set()
    async with asyncio.timeout(20):
        while len(one.node.store) > 2:
            await asyncio.sleep(0.02)
    assert not await one.match_all(ann), "they met again, and it has carried it out"
    one.save(ann, 5, "ann")
    await known(other, ann)
    assert len(await other.match_all(ann)) == 4, (
        "what was stored after the removal is served like anything else"
    )


async def test_a_block_that_a_peer_named_before_the_removal_is_not_published_after_it(
    two: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow read outlasts any hold with a deadline: it is the epoch that keeps it out."""
    one, other = two
    ann = keys_of(0, 4)
    one.save(ann, 1, "ann")
    await known(other, ann)
    begun, go_on = threading.Event(), threading.Event()
    verify = peers._verify

    def slowly(*args: Any) -> Any:
        good = verify(*args)
        begun.set()
        assert go_on.wait(10)
        return good

    monkeypatch.setattr(peers, "_verify", slowly)
    assert (await other.match(ann)).coming == 4
    assert await asyncio.to_thread(begun.wait, 10)
    assert (await remove(one, tenant="ann")).missed == []
    assert not other.node.removals.book.pending()
    go_on.set()
    async with asyncio.timeout(10):
        while other.node.peers._coming:
            await asyncio.sleep(0.005)
    assert len(other.node.store) == 0


async def test_a_removal_by_the_first_digits_of_keys_reaches_peers_and_one_of_single_keys_does_not(
    two: tuple[Host, Host],
) -> None:
    one, other = two
    keys = keys_of(0, 4)
    one.save(keys, 1)
    await known(other, keys)
    assert (await other.channel.request(Remove(keys=keys), 10.0)).count == 0
    assert len(one.node.store) == 4
    assert (await remove(other, prefix=keys[1].hex()[:20])).count == 1
    assert keys[1] not in one.node.store.shelf
    assert len(one.node.store) == 3


async def test_a_removal_by_nothing_is_refused_before_any_peer_is_asked(two: tuple[Host, Host]) -> None:
    one, other = two
    one.save(keys_of(0, 2), 1)
    with pytest.raises(ChannelFault, match="name keys, a tenant"):
        await remove(other)
    assert len(one.node.store) == 2


async def test_a_peer_that_names_a_block_twice_or_under_no_key_is_read_from_none_the_less(
    two: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    keys = keys_of(0, 4)
    one.save(keys, 1)
    await known(other, keys)
    locate = one.node.peers._locate

    def oddly(asked: Any) -> Any:
        found = locate(asked)
        *whole, last = found.blocks
        odd = msgspec.structs.replace(last, parent=b"of no block")
        return msgspec.structs.replace(found, blocks=[*whole, odd, *whole])

    monkeypatch.setattr(one.node.peers, "_locate", oddly)
    found = await other.match_all(keys)
    assert len(found) == 3
    assert all(other.good(key, at) for key, at in zip(keys[:3], found, strict=True))


async def test_a_defect_while_a_peer_is_read_from_ends_no_reader_and_its_blocks_are_counted(
    two: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    tier = other.node.peers

    async def fails(*_: Any) -> None:
        tier.counters["promoted"] += 5  # the other reader's
        raise RuntimeError("a defect")

    with monkeypatch.context() as broken:
        broken.setattr(tier, "_fetch", fails)
        for number in range(peers.READS_AT_ONCE):
            keys = keys_of(1000 * number, 2)
            one.save(keys, 1)
            await known(other, keys)
            assert await other.match_all(keys) == []
    assert other.node.store.counters["internal_errors"] == peers.READS_AT_ONCE
    failed = "interlock_store_peers_promotions_failed_blocks_total"
    assert tier.stats()[failed] == 2 * peers.READS_AT_ONCE
    keys = keys_of(9000, 2)
    one.save(keys, 1)
    await known(other, keys)
    assert len(await other.match_all(keys)) == 2


async def test_a_peer_that_holds_the_slab_does_not_keep_the_rest_of_a_node_from_closing(
    two: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = two

    async def held(_: Any) -> None:
        raise TimeoutError("it is still read by 1 peers; keep its memory")

    with monkeypatch.context() as stuck:
        stuck.setattr(one.engine, "unregister", held)
        await one.node.close()
    assert not one.node._tasks
    assert one.memory._fd is None

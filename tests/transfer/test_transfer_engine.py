"""The asynchronous face over each lane: bytes, bounds, lives, outcome and release."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from interlock.core.errors import LocalProtocolError
from interlock.core.limits import PIECES_PER_TRANSFER_MAX
from interlock.host.memory import create_memory
from interlock.transfer.engine import LaneOptions, Part, TransferFailed
from interlock.transfer.segments import RemoteSegment

from .conftest import BOTH, SHM, TCP, Yard, random_bytes, until

LANES = [
    pytest.param(TCP, id="tcp"),
    pytest.param(SHM, id="shm"),
    pytest.param(LaneOptions(kinds=("shm",), read_processes=False, map_segments=False), id="shm-by-socket"),
    pytest.param(BOTH, id="both"),
]


@pytest.mark.parametrize("lanes", LANES)
async def test_scattered_pieces_arrive_where_they_were_wanted(yard: Yard, lanes: LaneOptions) -> None:
    a, b = await yard.pair(lanes)
    source, here = random_bytes(8 << 20), np.zeros(4 << 20, np.uint8)
    b.register(source, "kv")
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    order = np.random.default_rng(1).permutation(2048)
    rows = np.stack([order * 4096, np.arange(2048) * 1024, np.full(2048, 1000)], axis=1)
    transfer = a.read([Part(segment, here, rows)], timeout_s=5)
    outcome = (await transfer.outcome()).check()
    await transfer.release()
    assert outcome.size_bytes == 2048 * 1000
    wanted = source.reshape(2048, 4096)[order, :1000]
    assert (here.reshape(-1, 1024)[:2048, :1000] == wanted).all()
    assert not here.reshape(-1, 1024)[:2048, 1000:].any(), "bytes were written beside the pieces"


@pytest.mark.parametrize("lanes", LANES)
async def test_a_large_read_is_whole(yard: Yard, lanes: LaneOptions) -> None:
    a, b = await yard.pair(lanes)
    source, here = random_bytes(48 << 20), np.zeros(48 << 20, np.uint8)
    b.register(source, "kv")
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    for _ in range(2):  # the second goes over two connections
        here[:] = 0
        transfer = a.read([Part(segment, here)], timeout_s=10)
        (await transfer.outcome()).check()
        await transfer.release()
        assert (here == source).all()


async def test_a_slab_is_mapped_and_a_tensor_is_read_by_its_process(yard: Yard, tmp_path: Path) -> None:
    a, b = await yard.pair(SHM)
    slab = create_memory("test-slab", 1 << 20)
    try:
        slab.view[:5] = b"slab!"
        tensor = torch.arange(1000, dtype=torch.bfloat16)
        b.register(slab, "slab")
        b.register(tensor, "tensor")
        (mapped,), (other,) = [await a.segments_of("b", label, timeout_s=5) for label in ("slab", "tensor")]
        here = torch.zeros(1000, dtype=torch.bfloat16)
        word = bytearray(5)
        await _read(a, Part(mapped, word, [(0, 0, 5)]))
        await _read(a, Part(other, here))
        assert bytes(word) == b"slab!"
        assert torch.equal(here, tensor)
        said = "\n".join(a.explain("b"))
        assert f"segment {mapped.number} of b is read by way of mapped" in said
        assert f"segment {other.number} of b is read by way of process_vm_readv" in said
    finally:
        for name in ("a", "b"):
            await yard.end(name)
        slab.close()


async def _read(engine, part: Part, timeout_s: float = 5.0):
    transfer = engine.read([part], timeout_s=timeout_s)
    outcome = await transfer.outcome()
    await transfer.release()
    return outcome.check()


@pytest.mark.parametrize("lanes", LANES)
async def test_the_owner_refuses_what_is_out_of_bounds_revoked_or_of_another_life(
    yard: Yard, lanes: LaneOptions
) -> None:
    a, b = await yard.pair(lanes)
    source, here = random_bytes(10_000), np.zeros(20_000, np.uint8)
    held = b.register(source, "kv")
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    await _read(a, Part(segment, here))
    lie = RemoteSegment("b", segment.incarnation, segment.number, 1 << 40)
    for name, wrong, row in (
        ("bounds", lie, (9_999, 0, 2)),
        ("bounds", lie, (1 << 39, 0, 1)),
        ("stale", RemoteSegment("b", segment.incarnation + 1, segment.number, 10_000), (0, 0, 1)),
    ):
        with pytest.raises(TransferFailed) as refused:
            await _read(a, Part(wrong, here, [row]), timeout_s=2)
        assert refused.value.code == name, refused.value
    await b.unregister(held)
    with pytest.raises(TransferFailed, match="not registered any more") as gone:
        await _read(a, Part(segment, here))
    assert gone.value.code == "revoked"


async def test_pieces_that_cannot_be_are_refused_before_anything_happens(yard: Yard) -> None:
    a, _ = await yard.pair()
    segment = RemoteSegment("b", 1, 1, 100)
    here = bytearray(100)
    for wrong in (
        [],
        [(0, 0, 0)],
        [(0, 0, 101)],
        [(-1, 0, 1)],
        [(0, 1, 100)],
        [(99, 0, 2)],
        [(0, 0)],
        [(0.5, 0, 1)],
        [(0, 0, 1)] * (PIECES_PER_TRANSFER_MAX + 1),
        [(1 << 63, 0, 1)],
    ):
        with pytest.raises(LocalProtocolError):
            a.read([Part(segment, here, wrong)], timeout_s=1)
    with pytest.raises(LocalProtocolError, match="read-only"):
        a.read([Part(segment, bytes(100))], timeout_s=1)
    with pytest.raises(LocalProtocolError, match="two transfers"):
        a.read([Part(segment, here), Part(RemoteSegment("c", 1, 1, 100), here)], timeout_s=1)


async def test_many_who_open_at_once_share_one_handshake(yard: Yard) -> None:
    a, b = await yard.pair()
    await asyncio.gather(*(a.open("b", timeout_s=5) for _ in range(100)), *(b.open("a") for _ in range(100)))
    assert a.stamps("b") == b.stamps("a")[::-1]
    assert a.stamps("b")[0].attempt % 1_000_000 == 0, "a handshake was begun twice"


async def test_a_peer_that_restarts_is_read_from_again_without_anybodys_help(yard: Yard) -> None:
    a, _b = await yard.pair()
    here = np.zeros(1000, np.uint8)
    for life in range(1, 4):
        source = random_bytes(1000, life)
        yard.engines["b"].register(source, "kv")
        (segment,) = await a.segments_of("b", "kv", timeout_s=5)
        assert segment.incarnation == life
        await _read(a, Part(segment, here))
        assert (here == source).all()
        await yard.end("b")
        await yard.make("b")
        with pytest.raises(TransferFailed) as old:
            await _read(a, Part(segment, here))
        assert old.value.code == "stale", "the segments of the life before were read"


async def test_an_unknown_peer_and_one_that_is_not_there_fail_by_name(yard: Yard) -> None:
    a = await yard.make("a")
    with pytest.raises(TransferFailed, match="no address of nobody"):
        await a.open("nobody", timeout_s=1)
    yard.directory.update("gone", f"unix:{yard.path}/gone.sock")
    with pytest.raises(TransferFailed, match="nobody listens there"):
        await a.open("gone", timeout_s=0.5)
    transfer = a.read([Part(RemoteSegment("gone", 1, 1, 10), bytearray(10))], timeout_s=0.3)
    outcome = await transfer.outcome()
    assert outcome.code == "deadline"
    assert "nobody listens" in outcome.message
    await transfer.release()


async def test_a_transfer_that_is_cancelled_is_released_and_its_connection_lives(yard: Yard) -> None:
    a, b = await yard.pair()
    source, here = random_bytes(64 << 20), np.zeros(64 << 20, np.uint8)
    b.register(source, "kv")
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    await _read(a, Part(segment, here))
    stamps = a.stamps("b")
    for _ in range(5):
        transfer = a.read([Part(segment, here)], timeout_s=5)
        await asyncio.sleep(0.002)
        transfer.cancel()
        assert (await transfer.outcome()).code in ("cancelled", "")
        async with asyncio.timeout(1.0):
            await transfer.release()
        here[:] = 7
        await asyncio.sleep(0.02)
        assert (here == 7).all(), "bytes landed after the release"
    await _read(a, Part(segment, here))
    assert (here == source).all()
    assert a.stamps("b") == stamps, "the endpoint was lost by a cancel"


@pytest.mark.parametrize("lanes", [TCP, SHM])
async def test_unregistering_returns_at_release_and_ends_who_takes_nothing(
    yard: Yard, lanes: LaneOptions
) -> None:
    a, b = await yard.pair(lanes)
    source, here = random_bytes(64 << 20), np.zeros(64 << 20, np.uint8)
    segment = b.register(source, "kv")
    (remote,) = await a.segments_of("b", "kv", timeout_s=5)
    await _read(a, Part(remote, here, [(0, 0, 1)]))
    transfer = a.read([Part(remote, here)], timeout_s=5)
    await b.unregister(segment, timeout_s=2)
    assert not segment.readers
    source[:] = 0
    outcome = await transfer.outcome()
    await transfer.release()
    assert not outcome.ok or here.any(), "an outcome was good and its bytes were the successor's"


async def test_a_write_is_a_pull_by_the_owner_where_the_owner_allows_it(yard: Yard) -> None:
    a, b = await yard.pair()
    target, source = np.zeros(10_000, np.uint8), random_bytes(5_000)
    b.register(target, "open", takes_writes=True)
    b.register(bytearray(100), "shut")
    mine = a.register(source)
    (door,), (wall,) = [await a.segments_of("b", label, timeout_s=5) for label in ("open", "shut")]
    write = a.write(door, mine, [(1000, 0, 5_000)], timeout_s=5)
    assert (await write.outcome()).check().size_bytes == 5_000
    await write.release()
    assert (target[1000:6000] == source).all()
    assert not target[:1000].any()
    with pytest.raises(LocalProtocolError, match="takes no writes"):
        a.write(wall, mine, [(0, 0, 1)])
    forged = RemoteSegment("b", wall.incarnation, wall.number, 100, takes_writes=True)
    refused = a.write(forged, mine, [(0, 0, 1)], timeout_s=5)
    assert (await refused.outcome()).code == "refused"


async def test_a_write_to_an_owner_that_is_gone_ends_by_its_deadline_and_keeps_its_memory(yard: Yard) -> None:
    a, _ = await yard.pair()
    yard.engines["b"].register(bytearray(100), "kv", takes_writes=True)
    (target,) = await a.segments_of("b", "kv", timeout_s=5)
    await yard.end("b")
    write = a.write(target, a.register(bytearray(100)), timeout_s=0.3)
    assert (await write.outcome()).code == "deadline"
    assert not write.released, "nobody said that the owner reads no more"
    reborn = await yard.make("b")
    await reborn.open("a", timeout_s=5)
    await until(lambda: write.released)


async def test_notifications_are_acknowledged_and_delivered_once(yard: Yard) -> None:
    a, b = await yard.pair()
    await asyncio.gather(*(a.notify("b", str(n).encode(), timeout_s=5) for n in range(200)))
    heard = []
    notices = b.notices()
    for _ in range(200):
        heard.append(int((await anext(notices)).payload))
    assert sorted(heard) == list(range(200))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await anext(notices)


async def test_the_least_used_endpoint_goes_when_there_are_too_many(yard: Yard) -> None:
    hub = await yard.make("hub", endpoints_max=4)
    for n in range(8):
        await yard.make(f"p{n}")
        await hub.open(f"p{n}", timeout_s=5)
        await hub.open("p0", timeout_s=5)
    assert len(hub.peers()) == 4
    assert "p0" in hub.peers(), "the one that was used all the time was evicted"
    assert hub.is_connected("p7")
    await hub.open("p1", timeout_s=5)  # an evicted one comes back, with a stamp above all before


async def test_engines_over_tcp_need_the_token_and_close_without_a_trace(
    nothing_left: None, tmp_path: Path
) -> None:
    yard = Yard(tmp_path)
    a = await yard.make("a", address="tcp:127.0.0.1:0")
    b = await yard.make("b", address="tcp:127.0.0.1:0")
    await asyncio.gather(a.open("b", timeout_s=5), b.open("a", timeout_s=5))
    stranger = await yard.make("stranger", address="tcp:127.0.0.1:0")
    stranger._meeting._token = b"another"
    with pytest.raises(TransferFailed):
        await stranger.open("a", timeout_s=0.3)
    assert not a.is_connected("stranger")
    await yard.close()

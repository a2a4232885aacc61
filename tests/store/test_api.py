"""What a program sees: arrays in, the same bytes out, typed errors, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interlock.core.errors import LocalProtocolError
from interlock.host.blocking import monotonic_s
from interlock.store.api import Store, StoreAway, StoreRefused
from interlock.store.async_api import AsyncStore
from interlock.wire.store_messages import StartWrite

Open = Callable[..., Store]


@pytest.fixture
def open_store(rig: Any, tools: Any) -> Iterator[Open]:
    stores: list[Store] = []

    def make(**more: Any) -> Store:
        stores.append(Store.open(rig.address, more.pop("layout", tools.LAYOUT), **more))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def blocks(layout: Any, count: int, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, layout.block_bytes), dtype=np.uint8)


def test_what_was_put_is_what_is_got_by_another_program(rig: Any, tools: Any, open_store: Open) -> None:
    rig.node()
    keys, _ = tools.make_keys(20)
    data = blocks(tools.LAYOUT, 20)
    result = open_store().put(keys, data)
    assert (result.stored, result.present, result.under_way, result.left) == (20, 0, 0, 0)
    other = open_store()
    assert other.match(keys) == 20
    assert np.array_equal(other.get(keys), data)
    assert other.put(keys, data).present == 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_torch_tensors_go_in_and_out_with_their_own_bytes(
    rig: Any, tools: Any, open_store: Open, dtype: str
) -> None:
    torch = pytest.importorskip("torch")
    rig.node()
    store = open_store()
    keys, _ = tools.make_keys(3)
    items = tools.LAYOUT.block_bytes // torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    source = torch.randn(3, items).to(getattr(torch, dtype))
    assert store.put(keys, [source[0], source[1], source[2]]).stored == 3
    out = torch.zeros_like(source)
    assert len(store.get(keys, out)) == 3
    assert torch.equal(out.view(torch.uint8), source.view(torch.uint8))


def test_strided_and_read_only_arrays_are_put_and_refused_as_targets(
    rig: Any, tools: Any, open_store: Open
) -> None:
    rig.node()
    store = open_store()
    keys, _ = tools.make_keys(1)
    wide = np.arange(2 * tools.LAYOUT.block_bytes, dtype=np.uint16).astype(np.uint8)[::2]
    assert store.put(keys, [wide]).stored == 1
    assert np.array_equal(store.get(keys)[0], wide)
    for target in (wide, bytes(tools.LAYOUT.block_bytes)):
        with pytest.raises(LocalProtocolError, match=r"contiguous|read-only"):
            store.get(keys, [target])


@pytest.mark.parametrize("wrong", [b"short", object(), np.array([object()])])
def test_arrays_that_do_not_fit_the_layout_are_refused_before_anything_is_asked(
    rig: Any, tools: Any, open_store: Open, wrong: Any
) -> None:
    node = rig.node()
    store = open_store()
    with pytest.raises(LocalProtocolError):
        store.put(tools.make_keys(1)[0], [wrong])
    with pytest.raises(LocalProtocolError, match="32 bytes"):
        store.put([b"short"], blocks(tools.LAYOUT, 1))
    with pytest.raises(LocalProtocolError, match="do not go together"):
        store.put(tools.make_keys(2)[0], [bytes(tools.LAYOUT.block_bytes)])
    assert node.slots()["writing"] == 0


def test_a_batch_beyond_the_room_is_stored_as_far_as_it_goes(rig: Any, tools: Any, open_store: Open) -> None:
    rig.node(slab_bytes=16 * 4096)
    keys, _ = tools.make_keys(30)
    store = open_store()
    result = store.put(keys, blocks(tools.LAYOUT, 30))
    assert (result.stored, result.left) == (16, 14)
    assert store.match(keys) == 16


def test_a_batch_larger_than_one_session_is_cut_and_whole_at_the_end(
    rig: Any, tools: Any, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.store.api.SESSION_BLOCKS_MAX", 7)
    rig.node()
    keys, _ = tools.make_keys(30)
    data = blocks(tools.LAYOUT, 30)
    store = open_store()
    assert store.put(keys, data).stored == 30
    assert np.array_equal(store.get(keys), data)


def test_bytes_that_changed_in_the_slot_are_a_miss_and_leave_the_index(
    rig: Any, tools: Any, open_store: Open
) -> None:
    node = rig.node()
    keys, _ = tools.make_keys(4)
    data = blocks(tools.LAYOUT, 4)
    store = open_store()
    store.put(keys, data)
    slot = node.look(lambda n: n.store.shelf.get(keys[2]).slot)
    node.look(lambda n: n._memory.view.__setitem__(slot * 4096, n._memory.view[slot * 4096] ^ 1))
    assert np.array_equal(store.get(keys), data[:2])
    assert store.counts()["bad_blocks"] == 1
    tools.eventually(lambda: store.match(keys) == 2, "the node forgot it")


def test_no_store_reads_and_never_writes(rig: Any, tools: Any, open_store: Open) -> None:
    node = rig.node()
    keys, _ = tools.make_keys(2)
    data = blocks(tools.LAYOUT, 2)
    reader = open_store(no_store=True)
    assert reader.put(keys, data).left == 2
    writer = open_store()
    assert writer.put(keys, data, no_store=True).left == 2
    assert node.slots()["published"] == 0
    writer.put(keys, data)
    assert np.array_equal(reader.get(keys), data)


def test_keys_that_another_writes_are_left_to_him_or_waited_for(
    rig: Any, tools: Any, open_store: Open
) -> None:
    rig.node()
    keys, parents = tools.make_keys(2)
    data = blocks(tools.LAYOUT, 2)
    scheduler, rank = rig.scheduler(), rig.rank()
    grant = scheduler.start_write("slow", 1, keys, parents)
    store = open_store()
    assert store.put(keys, data).under_way == 2
    begun_s = monotonic_s()
    assert store.put(keys, data, wait_s=0.3).under_way == 2
    assert monotonic_s() - begun_s >= 0.3
    rank.report(grant, [False, False], [[], []])
    result = store.put(keys, data, wait_s=5.0)
    assert result.stored == 2, result


def test_a_program_killed_in_the_middle_of_a_put_leaves_no_slot_behind(rig: Any, tools: Any) -> None:
    node = rig.node()
    program = (
        "import sys, numpy as np, msgspec\n"
        "from interlock.core.layouts import KVLayout\n"
        "from interlock.store import putting\n"
        "from interlock.store.api import Store\n"
        "layout = msgspec.json.decode(sys.argv[2], type=KVLayout)\n"
        "store = Store.open(sys.argv[1], layout)\n"
        "def stop(*_):\n"
        "    print('copying', flush=True); sys.stdin.read()\n"
        "putting.block_checksums = stop\n"
        "store.put([bytes([i]) * 32 for i in range(8)], np.zeros((8, layout.block_bytes), np.uint8))\n"
    )
    import msgspec

    layout = msgspec.json.encode(tools.LAYOUT).decode()
    process = subprocess.Popen(
        [sys.executable, "-c", program, rig.address, layout], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"copying\n"
        assert node.slots()["writing"] == 8
        os.kill(process.pid, signal.SIGKILL)
        tools.eventually(lambda: node.slots()["free"] == 8, "its exit freed its slots")
    finally:
        process.kill()
        process.wait(10)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def test_a_failure_in_the_copy_lets_go_of_the_slots_at_once(
    rig: Any, tools: Any, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = rig.node()
    store = open_store()

    def fail(*_: Any) -> list[int]:
        raise KeyboardInterrupt

    monkeypatch.setattr("interlock.store.putting.block_checksums", fail)
    with pytest.raises(KeyboardInterrupt):
        store.put(tools.make_keys(3)[0], blocks(tools.LAYOUT, 3))
    assert node.slots() == {"free": 4, "writing": 0, "published": 0, "quarantined": 0}


def test_a_node_that_is_away_is_an_error_at_once_and_the_store_works_again_when_it_is_back(
    rig: Any, tools: Any, open_store: Open
) -> None:
    node = rig.node()
    keys, _ = tools.make_keys(2)
    data = blocks(tools.LAYOUT, 2)
    store = open_store()
    store.put(keys, data)
    node.close()
    rig._things.remove(node)
    with pytest.raises(StoreAway):
        store.get(keys)
    begun_s = monotonic_s()
    with pytest.raises(StoreAway, match="not attached"):
        store.match(keys)
    assert monotonic_s() - begun_s < 1.0
    rig.node()

    def works() -> bool:
        try:
            return store.put(keys, data).stored == 2
        except StoreAway:
            return False

    tools.eventually(works, "attached to the new life")
    assert np.array_equal(store.get(keys), data)


def test_an_absent_node_is_named_when_a_store_is_opened(tmp_path: Path, tools: Any) -> None:
    with pytest.raises(StoreAway, match="no store at"):
        Store.open(f"unix:{tmp_path}/none.sock", tools.LAYOUT, timeout_s=0.3)


def test_what_the_node_refuses_is_typed_with_its_code(rig: Any, tools: Any, open_store: Open) -> None:
    rig.node()
    store = open_store()
    with pytest.raises(StoreRefused) as refused:
        store.pin(tools.make_keys(1)[0], 1e9)
    assert refused.value.code == "bad_pin"
    with pytest.raises(StoreRefused, match="name keys"):
        store.remove()


def test_removing_keys_a_prefix_and_everything(rig: Any, tools: Any, open_store: Open) -> None:
    rig.node()
    keys, _ = tools.make_keys(8)
    store = open_store()
    store.put(keys, blocks(tools.LAYOUT, 8))
    assert store.remove(keys[7:]) == 1
    assert store.remove(prefix=keys[6].hex()[:20]) == 1
    assert store.match(keys) == 6
    assert store.clear() == 6
    assert store.match(keys) == 0
    assert store.stats()["interlock_store_blocks"] == 0


async def test_the_asynchronous_store_says_the_same(rig: Any, tools: Any) -> None:
    rig.node()
    keys, _ = tools.make_keys(5)
    data = blocks(tools.LAYOUT, 5)
    async with await AsyncStore.open(rig.address, tools.LAYOUT) as store:
        assert (await store.put(keys, data)).stored == 5
        assert np.array_equal(await store.get(keys), data)
        assert await store.match(keys) == 5
        pin = await store.pin(keys, 30.0)
        assert pin.blocks == 5
        assert await store.unpin(pin) == 5
        assert (await store.stats())["interlock_store_blocks"] == 5
        assert await store.remove(keys[4:]) == 1
        assert await store.clear() == 4


def test_it_works_where_torch_is_not_installed(rig: Any, tools: Any) -> None:
    import msgspec

    rig.node()
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import numpy as np, msgspec\n"
        "from interlock.core.layouts import KVLayout\n"
        "from interlock.store.api import Store\n"
        "layout = msgspec.json.decode(sys.argv[2], type=KVLayout)\n"
        "with Store.open(sys.argv[1], layout) as store:\n"
        "    keys = [bytes([i]) * 32 for i in range(3)]\n"
        "    data = np.ones((3, layout.block_bytes), np.uint8)\n"
        "    assert store.put(keys, data).stored == 3\n"
        "    assert (store.get(keys) == data).all()\n"
    )
    layout = msgspec.json.encode(tools.LAYOUT).decode()
    done = subprocess.run(
        [sys.executable, "-c", program, rig.address, layout], capture_output=True, timeout=30
    )
    assert done.returncode == 0, done.stderr.decode()


def test_the_one_rank_of_several_cannot_be_the_scheduler_too(rig: Any, tools: Any) -> None:
    rig.node()
    channel = rig.channel()
    attach = rig.attach(0, 2, "two", 1, tools.LAYOUT, leads=True)
    from interlock.core.errors import ChannelFault

    with pytest.raises(ChannelFault, match="engine of one"):
        channel.request(attach, 5.0)
    with pytest.raises(ChannelFault, match="not attached"):
        channel.request(StartWrite("s", 1, [b"k" * 32], [b""]), 5.0)


def test_a_program_that_fills_the_slab_twenty_times_grows_nowhere(
    rig: Any, tools: Any, open_store: Open, descriptors: Callable[[], set[str]]
) -> None:
    node = rig.node(slab_bytes=16 * 4096)
    store = open_store()
    data = blocks(tools.LAYOUT, 4)
    opened: list[int] = []
    for turn in range(80):
        keys, _ = tools.make_keys(4, start=turn * 1000)
        assert store.put(keys, data).stored == 4
        assert len(store.get(keys)) == 4
        if turn % 20 in (0, 19):
            opened.append(len(descriptors()))
    assert max(opened) <= opened[0]
    assert node.slots() == {"free": 0, "writing": 0, "published": 16, "quarantined": 0}
    assert not store._keeper._promises
    assert node.look(
        lambda n: (len(n.store.writes._writing), len(n.store.writes._lives), n.store.writes.joins_open)
    ) == (0, 0, 0)
    assert all(len(order._ghosts[0]) < 100 for order in node.node.store.shelf.orders)

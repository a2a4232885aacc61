"""vLLM's own decoder understands what is published, and a subscriber that missed some asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from interlock.host.publisher import Publisher, check_endpoint
from interlock.store.api import Store
from interlock.store.changes import Change, ChangeKind
from interlock.store.kv_events import BlockRemoved, BlockStored, KVEvents, events_of

END = -1
pytestmark = pytest.mark.timeout(240)  # importing vllm takes half a minute on a busy machine


class Subscriber:
    """What a router does, with plain sockets and vLLM's own classes."""

    def __init__(self, endpoint: str, replay: str) -> None:
        from vllm.distributed.kv_events import KVEventBatch

        self.decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self.context = zmq.Context()
        self.sub, self.ask = self.context.socket(zmq.SUB), self.context.socket(zmq.DEALER)
        self.sub.setsockopt(zmq.SUBSCRIBE, b"")
        for socket, where in ((self.sub, endpoint), (self.ask, replay)):
            socket.setsockopt(zmq.RCVTIMEO, 10_000)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(where)

    def next(self) -> tuple[int, Any]:
        _, number, payload = self.sub.recv_multipart()
        return int.from_bytes(number, "big"), self.decoder.decode(payload)

    def replay(self, first: int) -> list[tuple[int, Any]]:
        self.ask.send_multipart([b"", first.to_bytes(8, "big")])
        batches = []
        while True:
            *_, number, payload = self.ask.recv_multipart()
            if int.from_bytes(number, "big", signed=True) == END:
                return batches
            batches.append((int.from_bytes(number, "big"), self.decoder.decode(payload)))

    def close(self) -> None:
        self.context.destroy(linger=0)


def keep(present: dict[bytes, Any], events: list[Any]) -> None:
    """A router's table after those events."""
    for event in events:
        match type(event).__name__:
            case "AllBlocksCleared":
                present.clear()
            case "BlockStored":
                parent = event.parent_block_hash
                for key in event.block_hashes:
                    present[key] = parent
                    parent = key
            case "BlockRemoved":
                for key in event.block_hashes:
                    present.pop(key, None)


@pytest.fixture
def published(rig: Any, tmp_path: Path) -> Iterator[Callable[[], tuple[Any, Subscriber]]]:
    things: list[Any] = []

    def make() -> tuple[Any, Subscriber]:
        node = rig.node()
        endpoint, replay = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"

        async def begin() -> None:
            publisher = Publisher(endpoint, replay)
            node.node._publisher = publisher
            events = KVEvents(node.host, node.node.store.shelf, publisher)
            node.node._spawn(events.run(), "kv events")
            node.node._spawn(events.serve_replays(), "replays")

        subscriber = Subscriber(endpoint, replay)
        things.append(subscriber)
        node.run(begin())
        return node, subscriber

    yield make
    for thing in things:
        thing.close()


def put(rig: Any, tools: Any, count: int, start: int = 0) -> list[bytes]:
    keys, _ = tools.make_keys(count, start=start)
    with Store.open(rig.address, tools.LAYOUT) as store:
        data = np.zeros((count, tools.LAYOUT.block_bytes), dtype=np.uint8)
        assert store.put(keys, data).stored == count
    return keys


def test_vllms_own_decoder_reads_what_is_stored_and_removed(rig: Any, tools: Any, published: Any) -> None:
    _, subscriber = published()
    first = subscriber.replay(0)
    assert [type(event).__name__ for event in first[0][1].events] == ["AllBlocksCleared"]
    keys = put(rig, tools, 5)
    present: dict[bytes, Any] = {}
    while len(present) < 5:
        for _, batch in subscriber.replay(0):
            keep(present, batch.events)
    assert present == dict(zip(keys, [None, *keys[:-1]], strict=True))
    stored = next(e for _, b in subscriber.replay(0) for e in b.events if type(e).__name__ == "BlockStored")
    assert (stored.block_size, stored.medium, stored.token_ids) == (4, "CPU", [])
    with Store.open(rig.address, tools.LAYOUT) as store:
        assert store.remove(keys[3:]) == 2

    def gone() -> bool:
        table: dict[bytes, Any] = {}
        for _, batch in subscriber.replay(0):
            keep(table, batch.events)
        return set(table) == set(keys[:3])

    tools.eventually(gone, "the removals were told of")


def test_a_subscriber_that_missed_a_batch_asks_for_it_and_has_the_nodes_index_again(
    rig: Any, tools: Any, published: Any
) -> None:
    node, subscriber = published()
    turns = iter(range(1000, 60_000, 1000))
    tools.eventually(
        lambda: put(rig, tools, 3, next(turns)) and subscriber.sub.poll(200), "it hears live batches"
    )
    known, batch = subscriber.next()
    present: dict[bytes, Any] = {}
    for number, each in subscriber.replay(0):
        if number <= known:
            keep(present, each.events)
    put(rig, tools, 3, next(turns))
    lost, dropped = subscriber.next()
    assert lost == known + 1
    put(rig, tools, 3, next(turns))
    last, batch = subscriber.next()
    assert last > known + 1, "a gap is seen by the number"
    again = subscriber.replay(known + 1)
    assert [number for number, _ in again][: last - known] == list(range(known + 1, last + 1))
    assert (again[0][1].events, again[last - lost][1].events) == (dropped.events, batch.events)
    for _, each in again:
        keep(present, each.events)

    def whole() -> bool:
        for _, each in subscriber.replay(last + 1):
            keep(present, each.events)
        return set(present) == set(node.look(lambda n: [b.key for b in n.store.shelf]))

    tools.eventually(whole, "the table is the node's")


def test_a_publisher_that_fell_behind_clears_and_tells_the_whole_index(
    rig: Any, tools: Any, published: Any
) -> None:
    node, subscriber = published()
    keys = put(rig, tools, 6)
    node.look(lambda n: setattr(n.store.shelf.changes, "_ring", [None] * 2))

    async def burst() -> None:
        """Changes that come faster than they are told: none of them leaves the loop to the publisher."""
        shelf = node.node.store.shelf
        for key in keys[4:]:
            shelf.withdraw(key, shelf.get(key).slot)
        for number in range(50):
            shelf.changes.append(Change(ChangeKind.REMOVED, bytes([number]) * 32, b"", 4))

    node.run(burst())

    def told_anew() -> bool:
        table: dict[bytes, Any] = {}
        names = []
        for _, batch in subscriber.replay(0):
            names += [type(event).__name__ for event in batch.events]
            keep(table, batch.events)
        return names.count("AllBlocksCleared") == 2 and set(table) == set(keys[:4])

    tools.eventually(told_anew, "the index was told again")


def test_questions_that_are_none_are_passed_over(rig: Any, tools: Any, published: Any) -> None:
    _, subscriber = published()
    other = subscriber.context.socket(zmq.DEALER)
    other.connect(subscriber.ask.getsockopt_string(zmq.LAST_ENDPOINT))
    other.send_multipart([b"", b"", b"", b"many frames"])
    other.send_multipart([b"", b"short"])
    assert subscriber.replay(0)


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://0.0.0.0:5557",
        "tcp://*:5557",
        "tcp://192.0.2.1:5557",
        "udp://127.0.0.1:1",
        "nonsense",
        "tcp://127.0.0.1",
    ],
)
def test_an_address_that_others_reach_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"reached by others|neither"):
        check_endpoint(endpoint)


def test_addresses_of_this_machine_are_taken() -> None:
    for endpoint in ("tcp://127.0.0.1:5557", "tcp://localhost:1", "tcp://[::1]:5", "ipc:///tmp/x"):
        check_endpoint(endpoint)


def test_chains_are_one_event_and_a_fork_begins_another() -> None:
    def stored(key: int, parent: int | None) -> Change:
        above = b"" if parent is None else bytes([parent]) * 32
        return Change(ChangeKind.STORED, bytes([key]) * 32, above, 16)

    changes = [stored(1, None), stored(2, 1), stored(3, 1), stored(4, 3)]
    changes += [Change(ChangeKind.REMOVED, bytes([n]) * 32, b"", 16) for n in (4, 3)]
    first, second, third = events_of(changes)
    assert isinstance(first, BlockStored)
    assert isinstance(second, BlockStored)
    assert isinstance(third, BlockRemoved)
    assert (len(first.block_hashes), first.parent_block_hash) == (2, None)
    assert (len(second.block_hashes), second.parent_block_hash) == (2, bytes([1]) * 32)
    assert len(third.block_hashes) == 2
    assert list(events_of([])) == []


async def test_a_taken_address_is_named(tmp_path: Path) -> None:
    one = Publisher("tcp://127.0.0.1:0", None)
    try:
        with pytest.raises(OSError, match="cannot be bound"):
            Publisher(one.endpoint, None)
    finally:
        one.close()
    await asyncio.sleep(0)

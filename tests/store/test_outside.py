"""Bytes from outside: whatever is sent, the node goes on serving, its books balance and its memory stays bounded."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interlock.core.errors import ChannelFault
from interlock.host.real import RealHost
from interlock.store.control import AsyncStoreClient
from interlock.wire.identity import passing_identity
from interlock.wire.store_messages import (
    AbortWrite,
    Clear,
    GetStats,
    GetTenants,
    ListBlocks,
    Match,
    Pin,
    Remove,
    Report,
    StartWrite,
    Unpin,
    VerifyBlocks,
    WatchChanges,
    Withdraw,
)

GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\xff\xff\xff\xff" + b"x" * 100,
    b"\x00\x00\x00\x00",
    b"\x00\x00\x00\x05hello",
    b"\x00\x00\x00\x06\x94\xdd\xff\xff\xff\xff",
    b"",
]


@pytest.mark.parametrize("data", GARBAGE)
def test_a_connection_that_speaks_nonsense_harms_nobody(rig: Any, tools: Any, data: bytes) -> None:
    node = rig.node()
    scheduler, rank = rig.scheduler(), rig.rank()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(rig.address.removeprefix("unix:"))
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(tools.PATIENCE_S)
        assert stranger.recv(1024) == b"", "who is not authenticated gets no answer"
    keys, parents = tools.make_keys(2)
    tools.save(scheduler, [rank], "s", keys, parents)
    assert len(scheduler.match(keys).locations) == 2
    assert node.slots()["published"] == 2


class Stranger(msgspec.Struct, tag="Match", frozen=True):
    keys: list[bytes]
    more: int = 1


@pytest.mark.parametrize(
    "body",
    [
        Match([b"short"]),
        Match([b"k" * 32] * 9000),
        Withdraw([b"k" * 32], [1, 2]),
        Stranger([]),
        Report("s", 1, 0, 1, 1, [True], [bytes(8 * 2000)]),
        StartWrite("s", 1, [b"k" * 31], [b""]),
    ],
)
def test_a_message_outside_the_limits_is_answered_with_a_fault(rig: Any, tools: Any, body: Any) -> None:
    rig.node()
    channel = rig.channel()
    channel.request(rig.attach(None, 1, "e", 1, tools.LAYOUT), 5)
    with pytest.raises(ChannelFault):
        channel.request(body, 5)
    assert channel.request(GetStats(), 5).values["interlock_store_blocks"] == 0


KEY = st.integers(0, 7).map(lambda n: bytes([n]) * 32)
SESSION = st.sampled_from(["", "s", "t", "\x00", "é" * 40])
SMALL = st.integers(-1, 3)
TENANT = st.sampled_from(["", "alice", "bob", "x" * 257])
MESSAGES = st.one_of(
    st.builds(Match, st.lists(KEY, max_size=5)),
    st.builds(
        StartWrite,
        SESSION,
        SMALL,
        st.lists(KEY, max_size=5),
        st.lists(st.one_of(KEY, st.binary(max_size=3)), max_size=5),
        TENANT,
        st.sampled_from([0.0, 0.01, -1.0, 1e9]),
    ),
    st.builds(
        Remove, st.none() | TENANT, st.sampled_from(["", "0", "07", "xyz", "ABC"]), st.lists(KEY, max_size=3)
    ),
    st.builds(
        Pin, st.sampled_from(["", "p", "q"]), st.lists(KEY, max_size=5), st.sampled_from([-1.0, 0.5, 9e9])
    ),
    st.builds(Unpin, st.sampled_from(["", "p", "q"])),
    st.builds(ListBlocks, SMALL, SMALL, st.none() | TENANT),
    st.builds(ListBlocks, st.just(1 << 62)),
    st.builds(VerifyBlocks, SMALL, SMALL),
    st.builds(WatchChanges, SMALL, SMALL, SMALL, st.sampled_from([0.0, 0.01, -1.0, 1e9])),
    st.builds(GetTenants),
    st.builds(AbortWrite, SESSION, SMALL, st.booleans()),
    st.builds(Withdraw, st.lists(KEY, max_size=3), st.lists(SMALL, max_size=3)),
    st.builds(Clear),
    st.builds(GetStats),
)
REPORTS = st.tuples(
    SESSION,
    SMALL,
    SMALL,
    st.lists(st.booleans(), max_size=5),
    st.lists(st.sampled_from([b"", bytes(8), bytes(16), bytes(32), b"odd"]), max_size=5),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.booleans(), MESSAGES | REPORTS), max_size=12))
def test_no_sequence_of_well_formed_messages_unbalances_the_books(talk: Any, steps: list[Any]) -> None:
    talk(steps)


@pytest.fixture
def talk(rig: Any, tools: Any) -> Any:
    """Says each message on the scheduler's or the rank's channel; every one is answered, the node stays sound."""
    node = rig.node()
    scheduler, rank = rig.channel(), rig.channel()
    scheduler.request(rig.attach(None, 1, "e", 1, tools.LAYOUT), 5)
    rank.request(rig.attach(0, 1, "e", 1, tools.LAYOUT), 5)
    slab = node.look(lambda n: n.store.slab)

    def say(steps: list[Any]) -> None:
        for by_rank, step in steps:
            body = step
            if isinstance(step, tuple):
                session, attempt, who, good, sums = step
                body = Report(session, attempt, who, slab.node_incarnation, slab.slab, good, sums)
            try:
                (rank if by_rank else scheduler).request(body, 5)
            except ChannelFault as fault:
                assert fault.code  # noqa: PT017
        assert node.look(lambda n: n.store.counters["internal_errors"]) == 0

    return say


def test_a_node_filled_ten_times_over_grows_neither_memory_nor_descriptors(rig: Any, tools: Any) -> None:
    process = rig.node_process(slab_bytes=512 * 4096)
    scheduler, rank = rig.scheduler(), rig.rank()
    pid = process.process.pid

    def fill(turns: range) -> None:
        for turn in turns:
            keys, parents = tools.make_keys(128, start=turn * 10_000)
            tools.save(scheduler, [rank], f"s{turn}", keys, parents)
            assert len(scheduler.match(keys).locations) == 128

    def private_kib() -> int:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private"))

    fill(range(8))
    memory, descriptors = private_kib(), len(os.listdir(f"/proc/{pid}/fd"))
    fill(range(8, 48))
    assert len(os.listdir(f"/proc/{pid}/fd")) <= descriptors
    stats = rig.stats()
    assert stats["interlock_store_published_blocks_total"] == 48 * 128
    assert stats["interlock_store_blocks"] == 512
    assert stats["interlock_store_evicted_blocks_total"] == 48 * 128 - 512
    assert stats["interlock_store_slots_free"] + stats["interlock_store_slots_published"] == 512
    assert private_kib() < memory + 4096


async def test_commands_ask_a_node_without_blocking_and_after_its_restart(rig: Any, tools: Any) -> None:
    first = rig.node()
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(3)
    tools.save(scheduler, [rank], "s", keys, parents)
    host = RealHost()
    client = AsyncStoreClient(host, rig.address, passing_identity(host, "ctl"), timeout_s=5.0)
    try:
        assert len(await client.match(keys)) == 3
        assert (await client.stats())["interlock_store_blocks"] == 3
        assert await client.clear() == 3
        assert await client.match(keys) == []
        first.run(first.node.close())
        with pytest.raises(ConnectionError):
            for _ in range(2):
                await client.stats()
        rig.node()
        assert (await client.stats())["interlock_store_blocks"] == 0
    finally:
        await client.close()
        host.close()


def test_every_metric_has_its_unit_last(rig: Any, tools: Any) -> None:
    rig.node()
    names = rig.stats()
    assert all(name.startswith("interlock_store_") for name in names)
    for state in ("free", "writing", "published", "quarantined"):
        assert {f"interlock_store_slots_{state}", f"interlock_store_slots_{state}_bytes"} <= set(names)
    assert "interlock_store_refused_total" in names

"""The synchronous face: reads carried by the calling thread, by many threads at once, and their deadlines."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interlock.core.errors import LocalProtocolError
from interlock.host.real import RealHost
from interlock.membership.directory import StaticDirectory
from interlock.transfer.blocking import BlockingTransferEngine
from interlock.transfer.engine import LaneOptions, Part, TransferEngine, TransferFailed
from interlock.transfer.outcomes import Transfer
from interlock.transfer.segments import RemoteSegment
from interlock.wire.identity import Identity

from .conftest import Bytes, random_bytes

Pair = tuple[BlockingTransferEngine, BlockingTransferEngine, Bytes]


@pytest.fixture(params=["tcp", "shm"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    tmp_path.chmod(0o700)
    host = RealHost()
    addresses = {name: f"unix:{tmp_path}/{name}.sock" for name in "ab"}

    def engine(name: str) -> BlockingTransferEngine:
        return BlockingTransferEngine(
            lambda: TransferEngine(
                host,
                Identity(name, 1, os.urandom(8)),
                addresses[name],
                directory=StaticDirectory(addresses),
                lanes=LaneOptions(kinds=(request.param,)),
            )
        )

    source = random_bytes(8 << 20)
    with engine("a") as a, engine("b") as b:
        b.register(source, "kv", takes_writes=True)
        yield a, b, source
    host.close()


def test_a_read_returns_at_its_release_with_the_bytes(pair: Pair) -> None:
    a, _, source = pair
    (segment,) = a.segments_of("b", "kv", 5)
    here = np.zeros(len(source), np.uint8)
    for _ in range(3):
        here[:] = 0
        assert a.read([Part(segment, here)], 5).size_bytes == len(source)
        assert (here == source).all()


def test_many_threads_read_at_once_and_each_gets_its_own(pair: Pair) -> None:
    a, _, source = pair
    (segment,) = a.segments_of("b", "kv", 5)
    wrong: list[int] = []

    def work(number: int) -> None:
        here = np.zeros(64 * 1024, np.uint8)
        at = number * 64 * 1024
        for _ in range(20):
            here[:] = 0
            a.read([Part(segment, here, [(at, 0, 64 * 1024)])], 10)
            if not (here == source[at : at + 64 * 1024]).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_a_failed_read_raises_by_name_and_the_next_works(pair: Pair) -> None:
    a, _, source = pair
    (segment,) = a.segments_of("b", "kv", 5)
    here = np.zeros(10, np.uint8)
    with pytest.raises(TransferFailed) as refused:
        a.read([Part(RemoteSegment("b", 1, segment.number + 1, 10), here)], 5)
    assert refused.value.code == "revoked"
    with pytest.raises(TransferFailed, match="no address of nobody"):
        a.open("nobody", 1)
    a.read([Part(segment, here, [(5, 0, 10)])], 5)
    assert (here == source[5:15]).all()


def test_writes_and_notices_pass_through_the_loop(pair: Pair) -> None:
    a, b, source = pair
    (segment,) = a.segments_of("b", "kv", 5)
    mine = a.register(random_bytes(1000, 9))
    assert a.write(segment, mine, [(100, 0, 1000)], 5).size_bytes == 1000
    assert (source[100:1100] == random_bytes(1000, 9)).all()
    a.notify("b", b"done", 5)
    assert b.next_notice(5).payload == b"done"
    assert a.ping("b", 5) > 0


def test_who_would_wait_inside_a_callback_is_told_so_and_may_close_outside(pair: Pair) -> None:
    """The thread in a callback may be the one that everybody else, and so the close, would wait for."""
    a, _, source = pair
    (segment,) = a.segments_of("b", "kv", 5)
    here = np.zeros(len(source), np.uint8)
    a.read([Part(segment, here)], 5)
    told: list[object] = []

    def released() -> None:
        for wait in (
            a.close,
            lambda: a.read([Part(segment, bytearray(10), [(0, 0, 10)])], 5),
            lambda: a.ping("b"),
        ):
            with pytest.raises(LocalProtocolError, match="must not wait") as refused:
                wait()
            told.append(refused.value)

    transfer = Transfer(a.prepare([Part(segment, here)]).plan, [], 0.0, lambda: None)
    transfer.when_released(released)
    transfer.cancel()
    assert len(told) == 3
    a.close()
    a.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        a.ping("b")


def test_a_read_that_is_begun_when_the_loop_is_gone_is_closed(pair: Pair) -> None:
    a, _, _ = pair
    (segment,) = a.segments_of("b", "kv", 5)
    readings, peer = a._engine.loop_bound, a._engine._peers.look("b")
    assert peer is not None
    a.close()
    transfer = readings.begin(peer, [Part(segment, bytearray(4096), [(0, 0, 4096)])], 5.0)
    assert transfer.wait_outcome(1.0).code == "closed"
    transfer.wait_release(1.0)


def test_an_engine_that_two_threads_close_is_closed_when_either_returns(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _, _ = pair
    begun, whole, closed = threading.Event(), a._engine._pulls.close, threading.Event()

    async def slowly() -> None:
        begun.set()
        await asyncio.sleep(0.1)
        await whole()
        closed.set()

    monkeypatch.setattr(a._engine._pulls, "close", slowly)
    first = threading.Thread(target=a.close)
    first.start()
    assert begun.wait(5)
    a.close()
    assert closed.is_set(), "the second ended the loop under the first"
    first.join(5)
    assert not first.is_alive()


@pytest.mark.parametrize("pair", ["tcp"], indirect=True)
def test_memory_of_a_read_that_its_user_interrupted_is_touched_no_more(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TCP: through shared memory nothing waits for the peer."""
    a, _, source = pair
    (segment,) = a.segments_of("b", "kv", 5)
    here, other = np.zeros(100_000, np.uint8), np.zeros(100_000, np.uint8)
    prepared = a.prepare([Part(segment, here, [(0, 0, 100_000)])])
    a.read(prepared, 5)
    lane = a._engine._peers.look("b").driver.usable[0]  # type: ignore[union-attr]
    for pull in lane.pulls:  # type: ignore[attr-defined]
        receive = pull.sock.receive_pieces

        def interrupted(pieces: Any, *, patient: bool, receive: Any = receive) -> int:
            got: int = receive(pieces[:1], patient=patient)
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return got

        monkeypatch.setattr(pull.sock, "receive_pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):  # while a thread of the pool has the turn, it is carried there
            a.read(prepared, 5)
    monkeypatch.undo()
    here[:] = 0
    a.read([Part(segment, other, [(0, 0, 100_000)])], 5)
    assert (other == source[:100_000]).all()
    assert not here.any()
    assert not a._engine.loop_bound.under_way

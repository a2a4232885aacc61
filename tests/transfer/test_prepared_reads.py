"""Reads that were prepared: the same bytes and the same refusals as any read, at every call, whatever happened since the one before."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from interlock.core.errors import LocalProtocolError
from interlock.host.bulk_pool import NOTHING
from interlock.host.foreign import COPY_LOOK_BYTES, VIEW_BYTES_MAX, VIEWS_MAX, PieceCopies, address_of
from interlock.host.memory import MappedMemory, create_memory
from interlock.host.real import RealHost
from interlock.membership.directory import StaticDirectory
from interlock.transfer import outcomes
from interlock.transfer.blocking import BlockingTransferEngine
from interlock.transfer.engine import LaneOptions, Part, PreparedRead, TransferEngine, TransferFailed
from interlock.transfer.lanes.serving import ServeConnection
from interlock.transfer.lanes.sockets import SocketLane
from interlock.transfer.reading import Readings
from interlock.transfer.segments import RemoteSegment
from interlock.wire.identity import Identity

from .conftest import random_bytes

SIZE = 4 << 20
WAYS = {
    "mapped": LaneOptions(kinds=("shm",)),
    "process": LaneOptions(kinds=("shm",), map_segments=False),
    "socket": LaneOptions(kinds=("shm",), map_segments=False, read_processes=False),
    "tcp": LaneOptions(kinds=("tcp",)),
}


class Pair:
    """A reader and an owner, each on a loop of its own; the owner's segment in shared memory."""

    def __init__(self, directory: Path, lanes: LaneOptions) -> None:
        self._directory, self._lanes, self._life = directory, lanes, 0
        self.host = RealHost()
        self.memory: MappedMemory = create_memory("prepared", SIZE)
        self.source = np.frombuffer(self.memory.view, np.uint8)
        self.source[:] = random_bytes(SIZE)
        self.here = np.zeros(SIZE, np.uint8)
        self.a, self.b = self.engine("a"), self.engine("b")
        self.held = self.b.register(self.memory, "kv")
        (self.segment,) = self.a.segments_of("b", "kv", 5)

    def engine(self, name: str) -> BlockingTransferEngine:
        self._life += 1
        me = Identity(name, self._life, os.urandom(8))
        addresses = {each: f"unix:{self._directory}/{each}.sock" for each in "ab"}
        return BlockingTransferEngine(
            lambda: TransferEngine(
                self.host, me, addresses[name], directory=StaticDirectory(addresses), lanes=self._lanes
            )
        )

    def prepare(self, rows: Any = None) -> PreparedRead:
        return self.a.prepare([Part(self.segment, self.here, rows)])

    def close(self) -> None:
        self.a.close()
        self.b.close()
        self.host.close()
        del self.source
        self.memory.close()


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(way: str, tmp_path: Path) -> Iterator[Pair]:
    tmp_path.chmod(0o700)
    made = Pair(tmp_path, WAYS[way])
    yield made
    made.close()


def scattered(size: int, count: int) -> np.ndarray:
    at = np.random.default_rng(1).permutation(SIZE // (2 * size))[:count] * 2 * size
    return np.stack([at, at[::-1], np.full(len(at), size)], axis=1)


@pytest.mark.parametrize(("size", "count"), [(1, 1), (999, 500), (64 << 10, 32), (100_000, 20)])
def test_each_call_reads_what_stands_there_now_and_nothing_beside_it(
    pair: Pair, way: str, size: int, count: int
) -> None:
    rows = scattered(size, count)
    prepared = pair.prepare(rows)
    for turn in range(4):
        pair.source[:] = random_bytes(SIZE, turn)
        pair.here[:] = 0
        outcome = pair.a.read(prepared, 5)
        assert outcome.ok
        assert outcome.size_bytes == size * len(rows)
        assert outcome.lanes == {"tcp" if way == "tcp" else "shm": size * len(rows)}
        wanted = np.zeros(SIZE, np.uint8)
        for remote, local, length in rows.tolist():
            wanted[local : local + length] = pair.source[remote : remote + length]
        assert (pair.here == wanted).all()
    assert (prepared.way is not None) == (way in ("mapped", "process")), "the short way was not taken"


def test_a_segment_that_was_unregistered_is_refused_at_the_next_call_and_its_successor_is_not_read(
    pair: Pair,
) -> None:
    prepared = pair.prepare([(0, 0, 1000)])
    for _ in range(2):
        pair.a.read(prepared, 5)
    pair.b.unregister(pair.held)
    pair.b.register(pair.memory, "kv")
    pair.here[:] = 0
    with pytest.raises(TransferFailed) as gone:
        pair.a.read(prepared, 5)
    assert gone.value.code == "revoked"
    pair.source[:] = 1
    (pair.segment,) = pair.a.segments_of("b", "kv", 5)
    pair.a.read(pair.prepare([(0, 0, 1000)]), 5)
    assert (pair.here[:1000] == 1).all()


def test_an_owner_in_another_life_is_told_apart_though_its_segment_has_the_same_number(pair: Pair) -> None:
    prepared = pair.prepare([(0, 0, 1000)])
    for _ in range(2):
        pair.a.read(prepared, 5)
    pair.b.close()
    pair.b = pair.engine("b")
    pair.held = pair.b.register(pair.memory, "kv")
    assert pair.held.remote.number == pair.segment.number
    pair.a.open("b", 5)
    for _ in range(2):
        with pytest.raises(TransferFailed) as old:
            pair.a.read(prepared, 5)
        assert old.value.code == "stale"


def test_a_retired_endpoint_is_opened_again_and_the_way_found_anew(pair: Pair) -> None:
    prepared = pair.prepare()
    for turn in range(3):
        pair.source[:] = turn + 1
        for _ in range(2):
            pair.a.read(prepared, 5)
        assert (pair.here == turn + 1).all()
        pair.a._thread.loop.call_soon_threadsafe(pair.a._engine.retire, "b")


def test_a_deadline_of_nothing_a_lie_and_a_closed_engine_are_named(pair: Pair) -> None:
    prepared = pair.prepare()
    pair.a.read(prepared, 5)
    for here in (pair.a.read, lambda what, left_s: pair.a.begin_read(what, left_s).wait_outcome(5).check()):
        with pytest.raises(TransferFailed) as late:
            here(prepared, 0.0)  # type: ignore[operator]
        assert late.value.code == "deadline"
    lie = RemoteSegment("b", pair.segment.incarnation, pair.segment.number, SIZE + 1)
    for _ in range(2):
        with pytest.raises(TransferFailed) as beyond:
            pair.a.read(pair.a.prepare([Part(lie, bytearray(2), [(SIZE - 1, 0, 2)])]), 5)
        assert beyond.value.code == "bounds"
    for wrong in ([], [(0, 0, 0)], [(0, SIZE, 1)]):
        with pytest.raises(LocalProtocolError):
            pair.prepare(wrong)
    with pytest.raises(LocalProtocolError):
        pair.a.prepare([])
    pair.a.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        pair.a.read(prepared, 5)
    pair.a = pair.engine("a")


def test_threads_share_one_prepared_read_while_its_endpoint_is_retired_again_and_again(pair: Pair) -> None:
    prepared = pair.prepare(scattered(5000, 100))
    wrong: list[BaseException] = []
    until_s = time.monotonic() + 1.5

    def work() -> None:
        try:
            while time.monotonic() < until_s:
                pair.a.read(prepared, 10)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until_s:
        time.sleep(0.05)
        pair.a._thread.loop.call_soon_threadsafe(pair.a._engine.retire, "b")
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong, wrong


def test_an_owner_that_registers_and_unregisters_all_the_time_is_never_read_as_something_else(
    pair: Pair,
) -> None:
    wrong: list[str] = []
    counted = {"good": 0, "revoked": 0}
    current = pair.held
    stop = threading.Event()

    def churn() -> None:
        nonlocal current
        value, dice = 0, np.random.default_rng(3)
        while not stop.is_set():
            pair.b.unregister(current)
            pair.source[:] = 0  # of nobody now
            value = value % 250 + 1
            pair.source[:] = value
            current = pair.b.register(pair.memory, str(value))
            time.sleep(0.03 * dice.random())  # some reads are through by then

    churning = threading.Thread(target=churn)
    churning.start()
    end_s = time.monotonic() + 20
    while min(counted.values()) < 15 and time.monotonic() < end_s:
        for segment in pair.a.segments_of("b", "", 5):
            if segment.label == "kv":
                continue
            prepared = pair.a.prepare([Part(segment, pair.here, [(0, 0, 300_000), (SIZE - 7, 300_000, 7)])])
            for _ in range(3):
                try:
                    pair.a.read(prepared, 5)
                except TransferFailed as failed:
                    counted[failed.code] = counted.get(failed.code, 0) + 1
                    break
                counted["good"] += 1
                if not (pair.here[:300_007] == int(segment.label)).all():
                    wrong.append(segment.label)
    stop.set()
    churning.join(20)
    pair.held = current
    assert not wrong, f"bytes of others, {len(wrong)} times"
    assert counted.keys() == {"good", "revoked"}
    assert min(counted.values()) >= 15, counted


def test_pieces_of_every_size_are_copied_and_a_stop_is_heeded() -> None:
    source, here = random_bytes(8 << 20), np.zeros(8 << 20, np.uint8)
    sizes = [1, VIEW_BYTES_MAX, VIEW_BYTES_MAX + 1, COPY_LOOK_BYTES, 3] * 4
    at = np.cumsum([0, *sizes[:-1]])
    origins = (at + address_of(memoryview(source))).astype(np.uint64)
    into = np.stack([at + address_of(memoryview(here)), sizes], axis=1).astype(np.uint64)
    copies = PieceCopies(into, origins)
    assert copies.run(lambda: False)
    assert (here[: sum(sizes)] == source[: sum(sizes)]).all()
    assert not here[sum(sizes) :].any()
    here[:] = 0
    assert not copies.run(lambda: True), "it went on to the end"
    small = np.stack([np.arange(VIEWS_MAX + 5) + into[0, 0], np.ones(VIEWS_MAX + 5)], axis=1).astype(
        np.uint64
    )
    assert PieceCopies(small, small[:, 0] - into[0, 0] + origins[0]).run(lambda: False)
    assert (here[: VIEWS_MAX + 5] == source[: VIEWS_MAX + 5]).all()


class Held:
    """The owner's end of the connection that is read over first, which answers when it is told to."""

    def __init__(self, pair: Pair) -> None:
        (peer,) = pair.a._engine._peers
        lane = peer.driver.usable[0]
        assert isinstance(lane, SocketLane)
        self.pull = lane.pulls[0]
        _wait(lambda: self.pull.is_idle and not self.pull._turn.locked())  # whoever carried before has gone
        mine = self.pull.sock._sock.getsockname()
        (peer,) = pair.b._engine._peers
        serves = [serve for lane in peer.driver.usable for serve in cast("SocketLane", lane).serves]
        (self.serve,) = [serve for serve in serves if serve.sock._sock.getpeername() == mine]
        assert self.serve._turn.acquire(timeout=5)

    def answer(self) -> None:
        self.serve._turn.release()
        self.serve.look()


@pytest.fixture
def tcp(tmp_path: Path) -> Iterator[Pair]:
    tmp_path.chmod(0o700)
    made = Pair(tmp_path, WAYS["tcp"])
    yield made
    made.close()


def _wait(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def _makes_no_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: Any, **__: Any) -> Any:
        raise AssertionError("an ordinary transfer was made")

    monkeypatch.setattr(Readings, "begin", begin)


@pytest.mark.parametrize("is_prepared", [True, False])
def test_the_calling_thread_reads_over_an_idle_connection_without_an_ordinary_transfer(
    tcp: Pair, monkeypatch: pytest.MonkeyPatch, is_prepared: bool
) -> None:
    parts = [Part(tcp.segment, tcp.here, scattered(5000, 300))]
    what = tcp.a.prepare(parts) if is_prepared else parts
    tcp.a.read(what, 5)
    Held(tcp).answer()
    _makes_no_transfer(monkeypatch)
    tcp.here[:] = 0
    tcp.a.read(what, 5)
    for remote, local, size in scattered(5000, 300).tolist():
        assert (tcp.here[local : local + size] == tcp.source[remote : remote + size]).all()


@pytest.mark.parametrize("comes_first", [0, 500_000])
def test_an_answer_after_the_deadline_touches_no_buffer_and_the_connection_is_good_for_the_next(
    tcp: Pair, monkeypatch: pytest.MonkeyPatch, comes_first: int
) -> None:
    prepared = tcp.prepare([(0, 0, 1_000_000)])
    tcp.a.read(prepared, 5)
    held = Held(tcp)
    may_go_on, send = threading.Event(), held.serve.sock.send_pieces

    def trickle(pieces: Any, *, patient: bool) -> int:
        if len(pieces) == 2:  # the header and the piece
            first = pieces.copy()
            first[1, 1] = comes_first
            return send(first if comes_first else first[:1], patient=patient)
        if may_go_on.is_set():
            return send(pieces, patient=patient)
        time.sleep(0.001)
        return 0

    monkeypatch.setattr(held.serve.sock, "send_pieces", trickle)
    if comes_first:
        held.answer()
    begun_s = time.monotonic()
    with pytest.raises(TransferFailed) as late:
        tcp.a.read(prepared, 0.3)
    assert late.value.code == "deadline"
    assert 0.25 < time.monotonic() - begun_s < 2.0
    tcp.here[:] = 0
    if not comes_first:
        held.answer()
    may_go_on.set()
    _wait(lambda: held.pull.is_idle)
    assert not tcp.here.any(), "bytes came after the release"
    monkeypatch.undo()
    tcp.a.read(prepared, 5)
    assert (tcp.here[:1_000_000] == tcp.source[:1_000_000]).all()
    assert not held.pull.is_ending


@pytest.mark.parametrize("is_prepared", [True, False])
def test_an_owner_that_sends_slowly_but_all_the_time_does_not_keep_its_reader_beyond_the_deadline(
    tcp: Pair, monkeypatch: pytest.MonkeyPatch, is_prepared: bool
) -> None:
    parts = [Part(tcp.segment, tcp.here)]
    what = tcp.a.prepare(parts) if is_prepared else parts
    tcp.a.read(what, 5)
    held = Held(tcp)
    send = held.serve.sock.send_pieces

    def slowly(pieces: Any, *, patient: bool) -> int:
        time.sleep(0.01)
        some = pieces[-1:].copy()
        some[0, 1] = min(80_000, some[0, 1])  # enough that the reader goes on waiting in the kernel
        return send(pieces[:1] if len(pieces) == 2 else some, patient=patient)

    monkeypatch.setattr(held.serve.sock, "send_pieces", slowly)
    held.answer()
    begun_s = time.monotonic()
    with pytest.raises(TransferFailed) as late:
        tcp.a.read(what, 0.2)
    took_s = time.monotonic() - begun_s
    monkeypatch.undo()
    assert late.value.code == "deadline"
    assert took_s < 0.45, "all of it takes 0.5 s at least"


def test_a_connection_that_breaks_under_a_read_costs_the_caller_no_more_than_time(tcp: Pair) -> None:
    prepared = tcp.prepare([(0, 0, 1_000_000)])
    tcp.a.read(prepared, 5)
    held = Held(tcp)
    tcp.here[:] = 0
    reader = threading.Thread(target=tcp.a.read, args=(prepared, 10))
    reader.start()
    _wait(lambda: held.pull.waiting)
    held.serve.sock.shutdown()
    held.answer()
    reader.join(15)
    assert not reader.is_alive()
    assert (tcp.here[:1_000_000] == tcp.source[:1_000_000]).all()


def test_a_read_whose_connection_breaks_late_still_ends_by_its_own_deadline(
    tcp: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = tcp.prepare([(0, 0, 1000)])
    tcp.a.read(prepared, 5)
    held = Held(tcp)
    monkeypatch.setattr(ServeConnection, "advance", lambda _: NOTHING)  # nobody answers any more
    held.answer()
    breaking = threading.Timer(0.8, held.pull.sock.shutdown)
    breaking.start()
    begun_s = time.monotonic()
    with pytest.raises(TransferFailed) as late:
        tcp.a.read(prepared, 1.2)
    breaking.join()
    assert late.value.code == "deadline"
    assert 1.1 < time.monotonic() - begun_s < 1.8
    monkeypatch.undo()


def test_in_a_callback_a_read_that_would_wait_for_a_peer_is_refused_though_a_connection_is_idle(
    tcp: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = tcp.prepare([(0, 0, 1000)])
    tcp.a.read(prepared, 5)
    Held(tcp).answer()
    monkeypatch.setattr(outcomes._calling, "back", True, raising=False)
    tcp.here[:] = 0
    with pytest.raises(LocalProtocolError, match="must not wait"):
        tcp.a.read(prepared, 5)
    monkeypatch.undo()
    assert not tcp.here.any()


def test_what_an_owner_remembers_of_the_last_question_keeps_no_memory_alive(tcp: Pair) -> None:
    prepared = tcp.prepare(scattered(5000, 20))
    for _ in range(3):
        tcp.a.read(prepared, 5)
    held = weakref.ref(tcp.held)
    tcp.b.unregister(tcp.held)
    del tcp.held
    gc.collect()
    assert held() is None

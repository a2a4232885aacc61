"""Where a peer, a caller or a moment is worse than usual: each of these was wrong once, or could be."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from interlock.core.errors import LocalProtocolError
from interlock.host.threads import monotonic_s
from interlock.membership.directory import StaticDirectory
from interlock.transfer import pulling
from interlock.transfer.engine import LaneOptions, Part, TransferEngine, TransferFailed
from interlock.transfer.lanes.pulling import PullConnection
from interlock.transfer.lanes.sockets import SocketLane
from interlock.transfer.outcomes import Outcome, Transfer
from interlock.transfer.pieces import make_plan
from interlock.transfer.pulling import Pulls
from interlock.transfer.segments import RemoteSegment, SegmentTable
from interlock.wire.identity import Identity
from interlock.wire.transfer_messages import Pull, Pulled

from .conftest import BOTH, SHM, TCP, Yard, random_bytes, until

LANES = [pytest.param(TCP, id="tcp"), pytest.param(SHM, id="shm")]


async def read(engine: TransferEngine, part: Part, timeout_s: float = 5.0) -> Outcome:
    transfer = engine.read([part], timeout_s=timeout_s)
    outcome = await transfer.outcome()
    await transfer.release()
    return outcome


# --- an owner that closes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", LANES)
async def test_an_engine_that_was_closed_gives_nothing_for_its_buffers_may_be_anything_now(
    yard: Yard, lanes: LaneOptions
) -> None:
    """A reader on the same machine copies without asking: the board must say that the segment is gone before `close` returns."""
    a, b = await yard.pair(lanes)
    source, here = random_bytes(1000), np.zeros(1000, np.uint8)
    b.register(source, "kv")
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    assert (await read(a, Part(segment, here))).ok
    peer = a._peers.look("b")
    assert peer is not None
    lane = peer.driver.usable[0]
    closing = asyncio.ensure_future(yard.engines.pop("b").close())
    while not closing.done():
        await asyncio.sleep(0)
    source[:] = 0  # its owner uses it for something else
    transfer = Transfer(make_plan([Part(segment, here)]), [], 0.0, lambda: None)
    transfer._pending.extend(transfer.plan.chunks(1))
    lane.carry_here(transfer)  # as a thread that found the lane a moment ago
    assert not (transfer.over and transfer.wait_outcome(0).ok), "bytes of a closed engine's buffer were given"


async def test_closing_while_a_retired_endpoint_is_still_being_taken_down_waits_for_its_lanes(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await yard.pair(TCP)
    await a.open("b", timeout_s=5)
    peer = a._peers.look("b")
    assert peer is not None
    (lane, *_) = peer.driver.usable
    ended, whole = asyncio.Event(), type(lane).destroy

    async def slow(self: Any) -> None:
        await whole(self)
        for _ in range(50):
            await asyncio.sleep(0)
        ended.set()

    monkeypatch.setattr(type(lane), "destroy", slow)
    a.retire("b")
    await yard.end("a")
    assert ended.is_set(), "close returned while a lane was still being destroyed"
    assert b.name == "b"


async def test_an_evicted_endpoint_is_taken_down_before_close_returns(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = await yard.make("hub", endpoints_max=1)
    await yard.make("p0")
    await yard.make("p1")
    await hub.open("p0", timeout_s=5)
    peer = hub._peers.look("p0")
    assert peer is not None
    ended, whole = asyncio.Event(), peer.close

    async def slow() -> None:
        await whole()
        for _ in range(50):
            await asyncio.sleep(0)
        ended.set()

    monkeypatch.setattr(peer, "close", slow)
    hub._meeting.get("p1")
    await yard.end("hub")
    assert ended.is_set()


# --- segments of others ------------------------------------------------------------------------------------------


async def test_a_segment_of_another_engine_is_neither_unregistered_nor_written_from(yard: Yard) -> None:
    a, b = await yard.pair()
    mine, theirs = a.register(random_bytes(100)), b.register(bytearray(100), "kv", takes_writes=True)
    assert mine.remote.number == theirs.remote.number, "the test is about equal numbers"
    with pytest.raises(LocalProtocolError, match="another engine"):
        await a.unregister(theirs)
    (target,) = await a.segments_of("b", "kv", timeout_s=5)
    with pytest.raises(LocalProtocolError, match="not registered"):
        a.write(target, theirs, timeout_s=1)
    a.check_integrity()
    assert (await read(b, Part(mine.remote, bytearray(100)))).ok, "the segment of that number was lost"
    await a.unregister(mine)
    await a.unregister(mine)  # once more changes nothing
    with pytest.raises(LocalProtocolError, match="not registered"):
        a.write(target, mine, timeout_s=1)


# --- connections that end in the wrong moment --------------------------------------------------------------------


async def test_a_transfer_that_comes_in_the_moment_its_connection_ends_is_left_and_goes_elsewhere(
    yard: Yard,
) -> None:
    a, b = await yard.pair()
    here = np.zeros(100, np.uint8)
    b.register(random_bytes(100), "kv")
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    assert (await read(a, Part(segment, here))).ok
    peer = a._peers.look("b")
    assert peer is not None
    pull: PullConnection = peer.driver.usable[0].pulls[0]  # type: ignore[attr-defined]
    left_ran, may_close, whole = threading.Event(), threading.Event(), pull.left

    def left(reason: str) -> None:
        whole(reason)
        left_ran.set()
        may_close.wait(5)

    pull.left = left  # type: ignore[method-assign]
    stranded = threading.Event()
    plan = make_plan([Part(segment, here)])
    transfer = Transfer(plan, plan.chunks(1), math.inf, stranded.set)
    join = transfer.join

    def join_late(carrier: Any) -> bool:
        ender.start()
        assert left_ran.wait(5)
        return join(carrier)

    transfer.join = join_late  # type: ignore[method-assign]
    ender = threading.Thread(target=pull.end, args=("the test ends it",))
    await asyncio.to_thread(pull.carry, transfer)
    may_close.set()
    await asyncio.to_thread(ender.join, 5)
    assert stranded.wait(1), "a closed connection kept the transfer: it is neither carried nor released"
    assert transfer.is_stranded()


async def test_no_lane_carries_a_transfer_of_another_life_than_the_one_it_was_paired_with(
    yard: Yard,
) -> None:
    """A thread may find the endpoint in one life and its lanes in the next, where numbers of segments begin anew."""
    a, b = await yard.pair(BOTH)
    b.register(random_bytes(100), "kv")
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    here = np.zeros(100, np.uint8)
    assert (await read(a, Part(segment, here))).ok
    peer = a._peers.look("b")
    assert peer is not None
    before = RemoteSegment("b", segment.incarnation - 1, segment.number, 100)
    plan = make_plan([Part(before, here)])
    for lane in peer.driver.usable:
        transfer = Transfer(plan, plan.chunks(1), math.inf, lambda: None)
        assert not lane.carry(transfer), f"{lane.name} took a transfer of the life before"
        assert not lane.carry_here(transfer)
        assert lane.read_now(a.prepare([Part(before, here)]), math.inf) is None
        assert transfer.is_stranded()


# --- deadlines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", LANES)
async def test_a_deadline_of_nothing_ends_at_once_by_name_and_what_is_no_time_is_refused(
    yard: Yard, lanes: LaneOptions
) -> None:
    a, b = await yard.pair(lanes)
    b.register(random_bytes(8 << 20), "kv", takes_writes=True)
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    here = np.zeros(8 << 20, np.uint8)
    mine = a.register(bytearray(100))
    for timeout_s in (0.0, -1.0):
        async with asyncio.timeout(2):
            assert (await read(a, Part(segment, here), timeout_s)).code in ("deadline", "")
            assert (await a.write(segment, mine, timeout_s=timeout_s).outcome()).code in ("deadline", "")
            with pytest.raises(TransferFailed):
                await a.notify("b", b"", timeout_s=timeout_s)
            with pytest.raises(TransferFailed):
                await a.segments_of("b", timeout_s=timeout_s)
    for timeout_s in (math.nan, math.inf):
        with pytest.raises(LocalProtocolError, match="seconds"):
            a.read_now(a.prepare([Part(segment, here)]), timeout_s)
        with pytest.raises(LocalProtocolError, match="seconds"):
            a.read([Part(segment, here)], timeout_s=timeout_s)
        with pytest.raises(LocalProtocolError, match="seconds"):
            a.write(segment, mine, timeout_s=timeout_s)


class Silent(StaticDirectory):
    """A directory that never answers."""

    async def address_of(self, peer: str) -> str:
        await asyncio.Event().wait()
        return peer


async def test_a_directory_that_does_not_answer_costs_no_more_than_the_deadline(yard: Yard) -> None:
    a = await yard.make("a")
    a._meeting._directory = Silent()
    for call in (a.open, a.ping, a.segments_of):
        async with asyncio.timeout(2):
            with pytest.raises(TransferFailed, match="b"):
                await call("b", timeout_s=0.1)
    async with asyncio.timeout(2):
        with pytest.raises(TransferFailed, match="b"):
            await a.notify("b", b"x", timeout_s=0.1)


# --- what peers ask for ------------------------------------------------------------------------------------------


def rows(*each: tuple[int, int, int, int, int]) -> bytes:
    return np.array(each, "<i8").tobytes()


ODD_PULLS = {
    "no rows": b"",
    "half a row": b"x" * 39,
    "a number below nothing": rows((-1, 0, 1, 0, 1)),
    "number nought": rows((0, 0, 1, 0, 1)),
    "an offset below nothing": rows((1, -1, 1, 0, 1)),
    "a length of nothing": rows((1, 0, 1, 0, 0)),
    "a length that wraps": rows((1, 0, 1, (1 << 63) - 1, (1 << 63) - 1)),
    "beyond the target": rows((1, 0, 1, 50, 51)),
    "many segments": rows(*((n, 0, 1, 0, 1) for n in range(1, 5000))),
}


@pytest.mark.parametrize("what", ODD_PULLS)
@pytest.mark.parametrize("seconds", [1.0, math.nan, -1.0, 1e300])
async def test_whatever_a_peer_wants_pulled_it_is_answered(yard: Yard, what: str, seconds: float) -> None:
    a, b = await yard.pair()
    target = b.register(bytearray(100), "kv", takes_writes=True)
    a.register(random_bytes(100))
    await a.open("b", timeout_s=5)
    answers: list[Pulled] = []
    sender = Identity("a", 1, b"")
    b._pulls.asked(sender, Pull(1, target.remote.incarnation, seconds, ODD_PULLS[what]), answers.append)
    await until(lambda: bool(answers), 5.0)
    assert not answers[0].ok
    assert answers[0].message
    assert not any(target.memory.holder[0])


async def test_seconds_that_are_none_do_not_keep_a_pull_for_ever(yard: Yard) -> None:
    _, b = await yard.pair()
    target = b.register(bytearray(100), "kv", takes_writes=True)
    answers: list[Pulled] = []
    for number, seconds in enumerate((math.nan, math.inf, -1.0), 1):
        pull = Pull(number, target.remote.incarnation, seconds, rows((1, 0, 1, 0, 1)))
        b._pulls.asked(Identity("nobody", 1, b""), pull, answers.append)
    await until(lambda: len(answers) == 3, 5.0)


async def test_a_pull_that_is_asked_for_again_after_others_came_is_not_done_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its writer was told that it is over, and may have put something else there."""
    monkeypatch.setattr(pulling, "REMEMBERED_MAX", 4)
    table = SegmentTable("b")
    table.incarnation = 1
    table.register(bytearray(100), takes_writes=True)
    done: list[int] = []

    def reads(_: str, parts: list[Part], __: float) -> Transfer:
        plan = make_plan(parts)
        transfer = Transfer(plan, [], 0.0, lambda: None)
        done.append(int(plan.requests[0, 1]))
        transfer.fail("cancelled", "the test reads nothing")
        return transfer

    pulls = Pulls(table, reads)
    answers: list[Pulled] = []
    sender = Identity("a", 1, b"")
    for number in range(1, 11):
        pulls.asked(sender, Pull(number, 1, 1.0, rows((1, number, 1, 0, 1))), answers.append)
        await until(lambda n=number: len(answers) == n)  # type: ignore[misc]
    assert done == list(range(1, 11))
    for number in range(1, 11):
        pulls.asked(sender, Pull(number, 1, 1.0, rows((1, number, 1, 0, 1))), answers.append)
    await until(lambda: len(answers) == 20)
    assert done == list(range(1, 11)), "a pull that was over was done again"
    pulls.asked(Identity("a", 2, b""), Pull(1, 1, 1.0, rows((1, 77, 1, 0, 1))), answers.append)
    await until(lambda: len(answers) == 21)
    assert done[-1] == 77, "the writer's next life begins anew"
    await pulls.close()


# --- peers that are needed ---------------------------------------------------------------------------------------


async def test_a_peer_to_which_a_write_or_a_notification_is_under_way_is_not_evicted(yard: Yard) -> None:
    hub = await yard.make("hub", endpoints_max=2)
    for name in ("p0", "p1", "p2"):
        await yard.make(name)
    yard.engines["p0"].register(bytearray(100), "kv", takes_writes=True)
    (target,) = await hub.segments_of("p0", "kv", timeout_s=5)
    await hub.open("p0", timeout_s=5)
    there = hub._peers.look("p0")
    yard.engines["p0"]._pulls.asked = lambda *_: None  # type: ignore[method-assign]
    write = hub.write(target, hub.register(bytearray(100)), timeout_s=0.5)
    for name in ("p1", "p2"):
        await hub.open(name, timeout_s=5)
    assert hub._peers.look("p0") is there, "the write's peer was evicted under it"
    assert (await write.outcome()).code == "deadline"


async def test_a_peer_that_is_asked_for_a_write_is_needed_from_that_moment_on(yard: Yard) -> None:
    """Its task begins later, and nobody would ever say that the write's memory is free again."""
    hub = await yard.make("hub", endpoints_max=1)
    owner = await yard.make("p0")
    owner.register(bytearray(100), "kv", takes_writes=True)
    (target,) = await hub.segments_of("p0", "kv", timeout_s=5)
    await hub.open("p0", timeout_s=5)
    write = hub.write(target, hub.register(bytearray(100)), timeout_s=5)
    with pytest.raises(LocalProtocolError, match="are in use"):
        hub._meeting.get("p1")
    assert (await write.outcome()).ok
    await write.release()


async def test_a_read_of_a_peer_that_was_evicted_under_it_does_not_wait_for_its_deadline(yard: Yard) -> None:
    a, b = await yard.pair()
    b.register(random_bytes(4096), "kv")
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    await a.open("b", timeout_s=5)
    peer = a._peers.look("b")
    assert peer is not None
    await a._meeting._evict(peer)
    transfer = a.loop_bound.begin(peer, [Part(segment, bytearray(4096))], 5.0)
    async with asyncio.timeout(2):
        outcome = await transfer.outcome()
        await transfer.release()
    assert outcome.code == "unreachable"
    with pytest.raises(TransferFailed, match="it was closed") as failed:
        outcome.check()
    assert failed.value.retryable


async def test_a_read_that_another_thread_begins_while_its_engine_closes_is_closed_at_once(
    yard: Yard,
) -> None:
    a, b = await yard.pair()
    b.register(random_bytes(4096), "kv")
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    readings, peer = a.loop_bound, a._peers.look("b")
    assert peer is not None
    await yard.end("a")
    transfer = readings.begin(peer, [Part(segment, bytearray(4096))], 5.0)
    async with asyncio.timeout(2):
        assert (await transfer.outcome()).code == "closed"
        await transfer.release()


async def test_who_closes_an_engine_a_second_time_waits_for_the_first(yard: Yard) -> None:
    a, _ = await yard.pair()
    await a.open("b", timeout_s=5)
    first = asyncio.create_task(a.close())
    await asyncio.sleep(0)
    await a.close()
    assert first.done(), "close returned while threads were still in buffers"


async def test_whoever_only_finds_a_connection_busy_does_not_lose_a_word_that_was_left_meanwhile(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer has come, and the thread that was woken for it could not have the turn: nobody would look any more."""
    a, b = await yard.pair()
    b.register(random_bytes(4096), "kv")
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    await a.open("b", timeout_s=5)
    peer = a._peers.look("b")
    assert peer is not None
    lane = peer.driver.usable[0]
    assert isinstance(lane, SocketLane)
    (pull, *_) = lane.pulls

    def busy(connection: PullConnection) -> bool:
        connection.look()  # as the pool does
        return False

    prepared = a.prepare([Part(segment, bytearray(4096))])
    transfer = Transfer(prepared.plan, prepared.plan.chunks(1), monotonic_s() + 5, lambda: None)
    with monkeypatch.context() as asked:
        asked.setattr(PullConnection, "is_idle", property(busy))
        assert not pull.carry_here(transfer)
        assert not pull._again
        assert pull.read_now(prepared, monotonic_s() + 5) is None
        assert not pull._again


async def test_a_channel_that_is_dialled_while_its_link_closes_is_closed_too(yard: Yard) -> None:
    """Whoever would close it is cancelled before it has begun."""
    a, _ = await yard.pair()
    link = a._meeting.get("b").link

    class Dialled:
        silent_for_s, peer_process = 0.0, None

        def __init__(self, meanwhile: Callable[[], object]) -> None:
            self.closed, self._meanwhile = "", meanwhile

        async def close(self) -> None:
            if not self.closed:
                self.closed = "closed"
                self._meanwhile()

    late: Any = Dialled(lambda: None)
    late.closed = None

    def arrives() -> None:
        link._adopt(late, dialled=True)
        link._spawn(link._follow(late))

    early: Any = Dialled(arrives)
    link._channels.append((early, False))
    await link.close()
    assert late.closed == "closed"


async def test_a_link_that_was_closed_dials_nobody(yard: Yard) -> None:
    a, _ = await yard.pair()
    await a.open("b", timeout_s=5)
    peer = a._peers.look("b")
    assert peer is not None
    await peer.close()
    peer.link.post(Pull(1, 1, 1.0, b""))
    peer.link.dial()
    await asyncio.sleep(0)
    assert not peer.link._tasks
    assert not peer.link.is_up


# --- registering while others read -------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [*LANES, pytest.param(BOTH, id="both")])
async def test_a_peer_that_registers_and_unregisters_all_the_time_is_never_read_as_something_else(
    yard: Yard, lanes: LaneOptions
) -> None:
    """What a reader gets is whole and of the segment that it named, or a refusal; never its successor's bytes."""
    a, b = await yard.pair(lanes)
    memory, here = np.zeros(256 << 10, np.uint8), np.zeros(256 << 10, np.uint8)
    counted = {"good": 0, "revoked": 0}
    stop = False

    async def churn() -> None:
        for value in range(1, 10**9):
            if stop:
                return
            memory[:] = value % 251
            held = b.register(memory, f"v{value % 251}")
            await asyncio.sleep(0.002)
            await b.unregister(held)
            memory[:] = 255

    churning = asyncio.ensure_future(churn())
    try:
        async with asyncio.timeout(20):
            while min(counted.values()) < 20:
                for segment in await a.segments_of("b", timeout_s=5):
                    here[:] = 0
                    outcome = await read(a, Part(segment, here, [(0, 1, 1000), (5000, 1001, 200_000)]))
                    if outcome.ok:
                        counted["good"] += 1
                        assert (here[1:201_001] == int(segment.label[1:])).all(), "another's bytes"
                    else:
                        assert outcome.code == "revoked", outcome
                        counted["revoked"] += 1
    finally:
        stop = True
        await churning


# --- pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", LANES)
async def test_pieces_may_overlap_at_the_owner_and_lie_at_both_ends_of_a_segment(
    yard: Yard, lanes: LaneOptions
) -> None:
    a, b = await yard.pair(lanes)
    source, here = random_bytes(10_000), np.zeros(10_000, np.uint8)
    b.register(source, "kv")
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    pieces = [(0, 0, 1), (9_999, 1, 1), (0, 2, 5_000), (2_500, 5_002, 4_000), (9_999, 9_999, 1)]
    assert (await read(a, Part(segment, here, pieces))).check().size_bytes == 9_003
    for remote, local, count in pieces:
        assert (here[local : local + count] == source[remote : remote + count]).all()
    assert not here[9_002:9_999].any()
    for wrong in ([(10_000, 0, 1)], [(0, 10_000, 1)], [(0, 0, 0)], [(9_999, 0, 2)]):
        with pytest.raises(LocalProtocolError):
            a.read([Part(segment, here, wrong)])


# --- callbacks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", LANES)
async def test_an_engine_may_be_closed_and_a_read_begun_from_inside_a_callback(
    yard: Yard, lanes: LaneOptions
) -> None:
    a, b = await yard.pair(lanes)
    b.register(random_bytes(1 << 20), "kv")
    (segment,) = await a.segments_of("b", "kv", timeout_s=5)
    here = np.zeros(1 << 20, np.uint8)
    assert (await read(a, Part(segment, here))).ok
    loop, closed, more = asyncio.get_running_loop(), asyncio.Event(), []

    async def close() -> None:
        await yard.end("a")
        closed.set()

    def released() -> None:
        more.append(a.read_here([Part(segment, np.zeros(10, np.uint8), [(0, 0, 10)])], 5.0))
        loop.call_soon_threadsafe(lambda: asyncio.ensure_future(close()))
        raise RuntimeError("a callback that fails must not hurt others")

    transfer = a.read([Part(segment, here)], timeout_s=5)
    transfer.when_released(released)
    after: list[Callable[[], None]] = []
    transfer.when_released(lambda: after.append(released))
    async with asyncio.timeout(10):
        await transfer.release()
        await closed.wait()
    assert after, "the callback after a failing one was not called"
    assert more[0] is not None
    assert more[0].released

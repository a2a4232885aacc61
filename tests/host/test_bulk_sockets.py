"""Sockets for bulk bytes and their threads: what the kernel refuses is never asked, what is ended wakes, what is closed receives no more."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from interlock.core.limits import BULK_PATIENCE_SECONDS, PIECES_PER_CALL_MAX
from interlock.host.bulk import BulkSocket
from interlock.host.bulk_pool import HANGUP, READABLE, BulkPool
from interlock.host.foreign import COPY_LOOK_BYTES, Iovecs, advance, copy_pieces

Pair = tuple[BulkSocket, BulkSocket]
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


@pytest.fixture(params=["unix", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    if request.param == "unix":
        one, two = socket.socketpair()
    else:
        listener = socket.create_server(("127.0.0.1", 0))
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
        listener.close()
    made = BulkSocket(one, "one"), BulkSocket(two, "two")
    for each in made:
        each.to_threads()
    yield made
    for each in made:
        each.close()


def pieces_of(memory: Bytes, count: int) -> Iovecs:
    """`count` pieces that together are all of it."""
    size = len(memory) // count
    found = np.empty((count, 2), np.uint64)
    found[:, 0] = memory.ctypes.data + np.arange(count, dtype=np.uint64) * np.uint64(size)
    found[:, 1] = size
    return found


def test_the_kernel_takes_1024_pieces_and_not_one_more() -> None:
    """hazards x6: that is why PIECES_PER_CALL_MAX is what it is."""
    one, two = socket.socketpair()
    with one, two:
        assert one.sendmsg([b"x"] * PIECES_PER_CALL_MAX) == PIECES_PER_CALL_MAX
        with pytest.raises(OSError) as refused:
            one.sendmsg([b"x"] * (PIECES_PER_CALL_MAX + 1))
        assert refused.value.errno == errno.EMSGSIZE


def test_three_thousand_pieces_arrive_in_their_places(pair: Pair) -> None:
    one, two = pair
    data = np.random.default_rng(1).integers(0, 256, 300_000, dtype=np.uint8)
    here = np.zeros_like(data)

    def send() -> None:
        left = pieces_of(data, 3000)
        while len(left):
            left = np.ascontiguousarray(advance(left, one.send_pieces(left, patient=True)))

    sender = threading.Thread(target=send)
    sender.start()
    left, end_s = pieces_of(here, 1500), time.monotonic() + 10
    while len(left) and time.monotonic() < end_s:
        left = np.ascontiguousarray(advance(left, two.receive_pieces(left, patient=True)))
    sender.join()
    assert (here == data).all()


def test_shutdown_wakes_who_receives_and_a_descriptor_of_the_same_number_gets_none_of_the_bytes(
    pair: Pair,
) -> None:
    """hazards x6: a mere close does not wake it, and its late bytes go wherever the number leads by then."""
    one, two = pair
    here = np.zeros(1000, np.uint8)
    ended = threading.Event()

    def receive() -> None:
        try:
            while True:
                two.receive_pieces(pieces_of(here, 1), patient=True)
        except (EOFError, ConnectionError):
            ended.set()

    thread = threading.Thread(target=receive)
    thread.start()
    two.shutdown()
    assert ended.wait(10 * BULK_PATIENCE_SECONDS + 1.0), "it was not woken"
    thread.join()
    number = two.fileno()
    two.close()
    third, fourth = socket.socketpair()
    with third, fourth:
        assert number in (third.fileno(), fourth.fileno()), "the number was not given again"
        with pytest.raises((ConnectionError, BrokenPipeError)):
            for _ in range(3):
                one.send_pieces(pieces_of(np.ones(1000, np.uint8), 1), patient=True)
        fourth.setblocking(False)
        with pytest.raises(BlockingIOError):
            fourth.recv(1)
    assert not here.any()


def test_nobody_waits_longer_than_its_patience(pair: Pair) -> None:
    _, two = pair
    begun_s = time.monotonic()
    assert two.receive_pieces(pieces_of(np.zeros(10, np.uint8), 1), patient=True) == 0
    assert time.monotonic() - begun_s < 100 * BULK_PATIENCE_SECONDS
    assert two.receive_pieces(pieces_of(np.zeros(10, np.uint8), 1), patient=False) == 0


@pytest.fixture
def pool() -> Iterator[BulkPool]:
    made = BulkPool(2)
    yield made
    made.close()


def test_a_connection_that_waits_for_its_end_alone_is_not_woken_by_bytes(pair: Pair, pool: BulkPool) -> None:
    """Were it, each answer to a thread that carries by itself would wake a thread of the pool besides."""
    one, two = pair
    woken = threading.Semaphore(0)
    pool.add(two.fileno(), lambda: woken.release())
    pool.arm(two.fileno(), HANGUP)
    one.send(memoryview(b"bytes"))
    assert not woken.acquire(timeout=0.1)
    one.shutdown()
    assert woken.acquire(timeout=5)
    pool.arm(two.fileno(), READABLE)
    assert woken.acquire(timeout=5)
    pool.remove(two.fileno())


def test_a_copy_that_is_stopped_stops_between_pieces_and_says_so() -> None:
    source = np.ones(4 * COPY_LOOK_BYTES, np.uint8)
    here = np.zeros_like(source)
    looked = 0

    def stopped() -> bool:
        nonlocal looked
        looked += 1
        return looked == 2

    origins = np.ascontiguousarray(pieces_of(source, 8)[:, 0])
    assert not copy_pieces(pieces_of(here, 8), origins, stopped)
    assert int(here.sum()) == 2 * COPY_LOOK_BYTES
    assert copy_pieces(pieces_of(here, 8), origins, lambda: False)
    assert here.all()

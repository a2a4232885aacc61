"""The owner's end of a connection, asked by hand: however the questions come, each is answered by what stands then."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from interlock.host.bulk import BulkSocket
from interlock.host.bulk_pool import borrow_pool, return_pool
from interlock.transfer.lanes import frames
from interlock.transfer.lanes.serving import ServeConnection
from interlock.transfer.segments import SegmentTable

from .conftest import Bytes, open_descriptors, random_bytes

LIFE = 7


class Asker:
    """The other end: raw bytes."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(5)
        self.sock = ours
        self.segments = SegmentTable("owner")
        self.segments.incarnation = LIFE
        self.ended = threading.Event()
        self.why = ""
        self.serve = ServeConnection(
            BulkSocket(theirs, "unix:asker"), borrow_pool(), self._end, self.segments
        )
        self.serve.is_listed = True
        self.serve.begin()
        self._number = 0

    def _end(self, _: object, reason: str) -> None:
        self.why = reason
        self.ended.set()

    def question(self, rows: list[tuple[int, int, int]], life: int = LIFE) -> bytes:
        self._number += 1
        return frames.request(frames.READ, self._number, life, np.array(rows, np.uint64))

    def hear(self, count: int) -> bytes:
        heard = b""
        while len(heard) < count:
            data = self.sock.recv(count - len(heard))
            assert data, "the owner hung up"
            heard += data
        return heard

    def answer(self) -> bytes:
        """The pieces. Raises `ValueError` with the owner's code."""
        status, detail, _, total = frames.HEADER.unpack(self.hear(frames.HEADER.size))
        if status == frames.REFUSED:
            raise ValueError(frames.read_refusal(self.hear(detail)).code)
        return self.hear(total)

    def close(self) -> None:
        self.serve.end("the test is over")
        self.serve.closed.result(5)
        self.sock.close()
        return_pool()


@pytest.fixture
def asker() -> Iterator[Asker]:
    made = Asker()
    yield made
    made.close()


def _register(asker: Asker, seed: int) -> tuple[int, Bytes]:
    source = random_bytes(100_000, seed)
    return asker.segments.register(source).remote.number, source


@pytest.mark.parametrize("cut", [1, 23, 24, 25, 71, 10_000])
def test_a_question_may_come_in_any_cuts_and_two_at_once(asker: Asker, cut: int) -> None:
    number, source = _register(asker, 1)
    first = asker.question([(number, 5, 10), (number, 90_000, 10_000)])
    both = first + asker.question([(number, 0, 3)])
    for at in range(0, len(both), cut):
        asker.sock.sendall(both[at : at + cut])
    assert asker.answer() == source[5:15].tobytes() + source[90_000:].tobytes()
    assert asker.answer() == source[:3].tobytes()
    many = [(number, at, 1) for at in range(0, 60_000, 20)]  # more than one call takes in, or sends
    asker.sock.sendall(asker.question(many))
    assert asker.answer() == source[:60_000:20].tobytes()


def test_a_question_asked_again_is_judged_again(asker: Asker) -> None:
    number, source = _register(asker, 1)
    for _ in range(3):
        asker.sock.sendall(asker.question([(number, 0, 100)]))
        assert asker.answer() == source[:100].tobytes()
    source[:] = 0
    asker.sock.sendall(asker.question([(number, 0, 100)]))
    assert asker.answer() == bytes(100)
    asker.sock.sendall(asker.question([(number, 0, 100)], LIFE - 1))
    with pytest.raises(ValueError, match="stale"):
        asker.answer()
    asker.sock.sendall(asker.question([(number, 0, 100_001)]))
    with pytest.raises(ValueError, match="bounds"):
        asker.answer()


def test_of_two_segments_asked_again_one_that_went_is_refused_and_the_other_is_not_held(asker: Asker) -> None:
    one, _ = _register(asker, 1)
    other, _ = _register(asker, 2)
    for _ in range(2):
        asker.sock.sendall(asker.question([(one, 0, 10), (other, 0, 10)]))
        asker.answer()
    gone = asker.segments.get(other)
    assert gone is not None
    asker.segments.revoke(gone)
    gone.released.result(5)
    asker.sock.sendall(asker.question([(one, 0, 10), (other, 0, 10)]))
    with pytest.raises(ValueError, match="revoked"):
        asker.answer()
    asker.segments.check_integrity()


def test_while_a_repeated_answer_is_on_its_way_its_segment_is_held(asker: Asker) -> None:
    source = random_bytes(16 << 20)  # more than the socket takes
    segment = asker.segments.register(source)
    for turn in range(2):
        asker.sock.sendall(asker.question([(segment.remote.number, 0, len(source))]))
        if turn:
            assert asker.hear(1000)
            assert asker.segments.revoke(segment), "nobody holds what is being sent"
            assert not segment.released.done()
            asker.hear(frames.HEADER.size + len(source) - 1000)
        else:
            assert asker.answer() == source.tobytes()
    segment.released.result(5)


def test_descriptors_that_nobody_asked_for_are_closed_and_end_the_connection(asker: Asker) -> None:
    number, _ = _register(asker, 1)
    reading, writing = os.pipe()
    before = len(open_descriptors())
    socket.send_fds(asker.sock, [asker.question([(number, 0, 10)])], [writing])
    assert asker.ended.wait(5)
    assert "descriptors" in asker.why
    assert len(open_descriptors()) < before, "one was kept, or the connection is still open"
    os.close(writing)
    assert os.read(reading, 1) == b"", "somebody still holds the pipe's other end"
    os.close(reading)


def test_a_mapping_for_which_there_is_no_descriptor_is_refused_and_the_connection_goes_on(
    asker: Asker,
) -> None:
    number, source = _register(asker, 1)

    def full(*_: int) -> tuple[bytes, int | None]:
        raise OSError(errno.EMFILE, "too many open files")

    asker.serve._mapper = full
    asker.sock.sendall(frames.request(frames.MAP, 0, LIFE, np.array([[number, 0, 1]], np.uint64)))
    with pytest.raises(ValueError, match="refused"):
        asker.answer()
    asker.sock.sendall(asker.question([(number, 0, 100)]))
    assert asker.answer() == source[:100].tobytes()

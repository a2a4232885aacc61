"""Segments: memory that this process offers to peers for reading, who reads it now, and when it may be used for something else.

The owner checks each piece that a peer asks for: the segment must be of this life, not revoked, and hold the piece. Readers on this
machine copy by themselves, so they look at the *board*, a page that the owner alone can write: it says for each place which segment
stands there now. They look before and after the copy; what was revoked in between is thrown away.

Unregistering revokes at once and returns at release: when no connection sends from the segment any more. A reader that holds a
connection up loses it. (hazards M3: an offered segment is used again only after its lanes' release.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from interlock.core.errors import InterlockError, LocalProtocolError
from interlock.core.limits import LABEL_CHARS_MAX, SEGMENTS_MAX
from interlock.host.foreign import Iovecs
from interlock.host.threads import Lock
from interlock.transfer.memory import Memory, memory_of

Requests = npt.NDArray[np.uint64]
"""Shape (n, 3): segment number, offset, length in bytes."""
REQUEST_COLUMNS = 3


class RemoteSegment(msgspec.Struct, frozen=True, array_like=True):
    """A segment as its readers name it: of one life of its owner. May be sent to anybody who shall read it."""

    owner: str
    incarnation: int
    number: int
    size_bytes: int
    label: str = ""
    takes_writes: bool = False


class PieceRefused(InterlockError):  # noqa: N818 - it is an answer to the peer, not a failure here
    """A piece that the owner does not give. `code`: "stale", "revoked", "bounds"; `index`: which piece."""

    def __init__(self, code: str, message: str, index: int = 0) -> None:
        super().__init__(message, code=code, index=index)
        self.code, self.index, self.message = code, index, message


class Reader(Protocol):
    """Whoever sends from a segment at the moment."""

    def end(self, reason: str) -> None: ...


class Segment:
    """Made by `SegmentTable.register`."""

    def __init__(self, remote: RemoteSegment, memory: Memory) -> None:
        self.remote, self.memory = remote, memory
        self.revoked = False
        self.readers: set[Reader] = set()
        self.released: Future[None] = Future()

    def __repr__(self) -> str:
        return f"segment {self.remote.number} ({self.remote.label or 'no label'}) of {self.remote.owner}"


class SegmentTable:
    """Used from the loop and from the threads that serve peers."""

    def __init__(self, owner: str, board: memoryview | None = None) -> None:
        self._owner = owner
        self.incarnation = 0
        self._lock = Lock()
        self._numbers = itertools.count(1)
        self._segments: dict[int, Segment] = {}
        self._places: dict[int, int] = {}
        self._board = board
        self.on_revoke: list[Callable[[int], None]] = []
        """Told of each segment's number when it is not found here any more, before `released`."""

    def show_on(self, board: memoryview) -> None:
        """`board`: SEGMENTS_MAX words of 8 bytes that readers on this machine can see."""
        with self._lock:
            self._board = board
            for place, number in self._places.items():
                board[place] = number

    def register(self, buffer: Any, label: str = "", *, takes_writes: bool = False) -> Segment:
        """Raises `LocalProtocolError`: no memory, too many segments, a label that is too long, not writable though it takes writes."""
        memory = memory_of(buffer)
        if len(label) > LABEL_CHARS_MAX:
            raise LocalProtocolError(
                f"a label of {len(label)} characters is too long, {LABEL_CHARS_MAX} are allowed"
            )
        if takes_writes and not memory.writable:
            raise LocalProtocolError("a segment that takes writes must be writable memory")
        with self._lock:
            if len(self._segments) >= SEGMENTS_MAX:
                raise LocalProtocolError(
                    f"{SEGMENTS_MAX} segments are registered, no more can be",
                    hint="register larger ones: a segment holds any number of pieces",
                )
            number = next(self._numbers)
            while number % SEGMENTS_MAX in self._places:
                number = next(self._numbers)
            remote = RemoteSegment(
                self._owner, self.incarnation, number, memory.size_bytes, label, takes_writes
            )
            segment = self._segments[number] = Segment(remote, memory)
            self._places[number % SEGMENTS_MAX] = number
            if self._board is not None:
                self._board[number % SEGMENTS_MAX] = number
        return segment

    def revoke(self, segment: Segment) -> list[Reader]:
        """From now on no piece of it is given. Who still sends from it, is returned; `released` is set after the last.

        Idempotent. Raises `LocalProtocolError` for a segment of another table: its number means another one here.
        """
        number = segment.remote.number
        with self._lock:
            if segment.revoked:
                return list(segment.readers)
            if not self.has(segment):
                raise LocalProtocolError(
                    f"{segment} was registered with another engine", hint="unregister it there"
                )
            segment.revoked = True
            del self._segments[number], self._places[number % SEGMENTS_MAX]
            if self._board is not None:
                self._board[number % SEGMENTS_MAX] = 0
        for tell in self.on_revoke:
            tell(number)
        with self._lock:
            if not segment.readers and not segment.released.done():
                segment.released.set_result(None)
            return list(segment.readers)

    def revoke_all(self) -> None:
        """Nothing is given any more: the engine ends, and its buffers may be used for something else."""
        for segment in list(self._segments.values()):
            self.revoke(segment)

    def get(self, number: int) -> Segment | None:
        """The segment of that number, if it is registered."""
        return self._segments.get(number)

    def has(self, segment: Segment) -> bool:
        """Is that very segment registered here now?"""
        return self._segments.get(segment.remote.number) is segment

    def named(self, number: int, incarnation: int) -> Segment:
        """Raises `PieceRefused` unless it is registered, in that life of ours."""
        if incarnation != self.incarnation:
            raise PieceRefused(
                "stale", f"{self._owner} is in its life {self.incarnation}, asked was its life {incarnation}"
            )
        segment = self._segments.get(number)
        if segment is None:
            raise PieceRefused("revoked", f"segment {number} of {self._owner} is not registered any more")
        return segment

    def find(self, label: str) -> list[RemoteSegment]:
        """Those of that label, all for an empty one."""
        with self._lock:
            return [s.remote for s in self._segments.values() if not label or s.remote.label == label]

    def acquire(self, requests: Requests, incarnation: int, reader: Reader) -> tuple[Iovecs, list[Segment]]:
        """Where those pieces lie; their segments stay until `let_go`. Raises `PieceRefused`, and nothing was acquired."""
        if incarnation != self.incarnation:
            raise PieceRefused(
                "stale", f"{self._owner} is in its life {self.incarnation}, asked was its life {incarnation}"
            )
        with self._lock:
            pieces = np.empty((len(requests), 2), np.uint64)
            used: list[Segment] = []
            numbers = requests[:, 0]
            first = int(numbers[0])
            if len(requests) == 1 or (numbers == numbers[0]).all():
                used.append(self._place(requests, first, None, pieces))
            else:
                for number in np.unique(numbers):
                    used.append(self._place(requests, int(number), numbers == number, pieces))
            for segment in used:
                segment.readers.add(reader)
        return pieces, used

    def acquire_again(self, numbers: tuple[int, ...], reader: Reader) -> list[Segment]:
        """As `acquire`, of segments in which it placed the same pieces before: a number means one segment for all of a life.

        Empty: one of them is revoked, and none was acquired.
        """
        with self._lock:
            used = [segment for number in numbers if (segment := self._segments.get(number)) is not None]
            if len(used) < len(numbers):
                return []
            for segment in used:
                segment.readers.add(reader)
            return used

    def _place(
        self, requests: Requests, number: int, rows: npt.NDArray[np.bool_] | None, pieces: Iovecs
    ) -> Segment:
        """`rows`: those of this segment; None: all."""
        segment = self._segments.get(number)
        first = 0 if rows is None else int(np.argmax(rows))
        if segment is None:
            raise PieceRefused(
                "revoked", f"segment {number} of {self._owner} is not registered any more", first
            )
        if segment.memory.device != "cpu":
            raise PieceRefused(
                "refused", f"{segment} is on {segment.memory.device}, which only NIXL lanes reach", first
            )
        mine = requests if rows is None else requests[rows]
        offsets, lengths = mine[:, 1], mine[:, 2]
        size = np.uint64(segment.memory.size_bytes)
        bad = (offsets >= size) | (
            lengths - np.uint64(1) >= size - np.minimum(offsets, size)
        )  # 0 - 1: the most
        if bad.any():
            at = int(np.argmax(bad))
            index = at if rows is None else int(np.flatnonzero(rows)[at])
            raise PieceRefused(
                "bounds",
                f"{int(lengths[at])} bytes at {int(offsets[at])} do not lie in {segment} of {int(size)} bytes",
                index,
            )
        where: Any = slice(None) if rows is None else rows
        pieces[where, 0] = offsets + np.uint64(segment.memory.address)
        pieces[where, 1] = lengths
        return segment

    def hold(self, segments: list[Segment], reader: Reader) -> bool:
        """As `acquire` for whole segments; False: one is revoked, and none is held."""
        with self._lock:
            if any(segment.revoked for segment in segments):
                return False
            for segment in segments:
                segment.readers.add(reader)
            return True

    def let_go(self, used: list[Segment], reader: Reader) -> None:
        """The reader touches them no more."""
        with self._lock:
            for segment in used:
                segment.readers.discard(reader)
                if segment.revoked and not segment.readers and not segment.released.done():
                    segment.released.set_result(None)

    def check_integrity(self) -> None:
        """At idle: nobody reads. Raises `AssertionError`."""
        with self._lock:
            for segment in self._segments.values():
                assert not segment.readers, f"{segment} is still read by {len(segment.readers)}"
            assert sorted(self._places.values()) == sorted(self._segments), "the board does not balance"

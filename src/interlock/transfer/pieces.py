"""Thousands of scattered pieces as arrays: checked, joined where they touch, cut into chunks that one connection carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from interlock.core.errors import LocalProtocolError
from interlock.core.limits import (
    CHUNK_BYTES,
    PIECES_PER_REQUEST_MAX,
    PIECES_PER_TRANSFER_MAX,
)
from interlock.host.foreign import Iovecs
from interlock.transfer.memory import Memory, memory_of
from interlock.transfer.segments import RemoteSegment, Requests

CHUNK_BYTES_MIN = 512 * 1024


class Part(msgspec.Struct, frozen=True):
    """Pieces of one remote segment, and one local buffer.

    `pieces`: rows of (remote offset, local offset, bytes), as an integer array of shape (n, 3) or any sequence of triples;
    None: all of the segment, to the beginning of the buffer.
    """

    segment: RemoteSegment
    local: Any
    pieces: Any = None


class Chunk(msgspec.Struct, frozen=True):
    """What one connection carries before it asks for more."""

    requests: Requests
    into: Iovecs
    size_bytes: int

    def rest(self, moved_bytes: int) -> Chunk:
        """What is left when the first `moved_bytes` arrived. A piece that arrived in part is asked for anew."""
        ends = np.cumsum(self.into[:, 1])
        whole = int(np.searchsorted(ends, moved_bytes, side="right"))
        done = int(ends[whole - 1]) if whole else 0
        return Chunk(self.requests[whole:], self.into[whole:], self.size_bytes - done)


class Plan(msgspec.Struct, frozen=True):
    """All pieces of one transfer from one life of one owner."""

    owner: str
    incarnation: int
    requests: Requests
    into: Iovecs
    size_bytes: int
    count: int
    """Pieces as they were asked for, before those that touch were joined."""
    holders: tuple[Memory, ...]
    """The local memory."""

    @property
    def is_on_host(self) -> bool:
        """All local memory is ordinary memory."""
        return all(memory.device == "cpu" for memory in self.holders)

    def chunks(self, ways: int) -> list[Chunk]:
        """For so many connections at a time."""
        each = min(CHUNK_BYTES, max(CHUNK_BYTES_MIN, -(-self.size_bytes // max(1, ways))))
        if self.size_bytes <= each and len(self.requests) <= PIECES_PER_REQUEST_MAX:
            return [Chunk(self.requests, self.into, self.size_bytes)]
        requests, into = _cut(self.requests, self.into, each)
        ends = np.cumsum(into[:, 1])
        chunks, start, before = [], 0, 0
        while start < len(requests):
            stop = int(np.searchsorted(ends, np.uint64(before + each), side="right"))
            stop = max(start + 1, min(stop, start + PIECES_PER_REQUEST_MAX))
            after = int(ends[stop - 1])
            chunks.append(Chunk(requests[start:stop], into[start:stop], after - before))
            start, before = stop, after
        return chunks


def make_plan(parts: Sequence[Part]) -> Plan:
    """Raises `LocalProtocolError`: no pieces or too many, several owners or lives, outside of segment or buffer, not writable."""
    if not parts:
        raise LocalProtocolError("a transfer of nothing is no transfer", hint="give at least one part")
    owner, incarnation = parts[0].segment.owner, parts[0].segment.incarnation
    requests, intos, holders, count = [], [], [], 0
    for part in parts:
        if (part.segment.owner, part.segment.incarnation) != (owner, incarnation):
            raise LocalProtocolError(
                f"parts of {owner}@{incarnation} and of {part.segment.owner}@{part.segment.incarnation} are two transfers"
            )
        memory = memory_of(part.local)
        if not memory.writable:
            raise LocalProtocolError("the local buffer is read-only: nothing can be read into it")
        rows = as_rows(part)
        check_rows(rows, part.segment, memory)
        count += len(rows)
        request = np.empty((len(rows), 3), np.uint64)
        request[:, 0] = part.segment.number
        request[:, 1], request[:, 2] = rows[:, 0], rows[:, 2]
        into = np.empty((len(rows), 2), np.uint64)
        into[:, 0] = rows[:, 1] + memory.address
        into[:, 1] = rows[:, 2]
        requests.append(request)
        intos.append(into)
        holders.append(memory)
    if count > PIECES_PER_TRANSFER_MAX:
        raise LocalProtocolError(
            f"{count} pieces are too many for one transfer, {PIECES_PER_TRANSFER_MAX} are allowed"
        )
    request, into = _join(
        np.concatenate(requests) if len(requests) > 1 else requests[0],
        np.concatenate(intos) if len(intos) > 1 else intos[0],
    )
    return Plan(owner, incarnation, request, into, int(into[:, 1].sum()), count, tuple(holders))


def as_rows(part: Part) -> npt.NDArray[np.int64]:
    """A part's pieces as int64 of shape (n, 3). Raises `LocalProtocolError`."""
    if part.pieces is None:
        return np.array([[0, 0, part.segment.size_bytes]], np.int64)
    try:
        rows = np.asarray(part.pieces)
        if rows.dtype != np.int64:
            if rows.dtype.kind not in "iu":
                raise TypeError(f"{rows.dtype} is no integer type")
            rows = rows.astype(np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"the pieces are no rows of integers: {error}") from error
    if rows.ndim != 2 or rows.shape[1] != 3 or not len(rows):
        raise LocalProtocolError(
            f"pieces of shape {rows.shape} are none: rows of (remote offset, local offset, bytes) are"
        )
    return rows


def check_rows(rows: npt.NDArray[np.int64], segment: RemoteSegment, memory: Memory) -> None:
    """Both sides' bounds, as far as they are known here; the owner checks its own again."""
    lengths = rows[:, 2]
    room = np.array((segment.size_bytes, memory.size_bytes)) - lengths[:, None]
    if int(rows.min()) >= 0 and int(lengths.min()) > 0 and not (rows[:, :2] > room).any():
        return
    for name, offsets, size in (
        (f"segment {segment.number} of {segment.owner}", rows[:, 0], segment.size_bytes),
        ("the local buffer", rows[:, 1], memory.size_bytes),
    ):
        bad = (lengths <= 0) | (offsets < 0) | (offsets > size - lengths)
        if bad.any():
            at = int(np.argmax(bad))
            raise LocalProtocolError(
                f"piece {at}, {int(lengths[at])} bytes at {int(offsets[at])}, does not lie in {name} of {size} bytes"
            )


def _join(requests: Requests, into: Iovecs) -> tuple[Requests, Iovecs]:
    """Pieces that touch on both sides are one."""
    if len(requests) == 1:
        return requests, into
    touch = into[1:, 0] == into[:-1, 0] + into[:-1, 1]
    if touch.any():
        touch &= requests[1:, 0] == requests[:-1, 0]
        touch &= requests[1:, 1] == requests[:-1, 1] + requests[:-1, 2]
    if not touch.any():
        return requests, into
    starts = np.flatnonzero(np.concatenate(([True], ~touch)))
    lengths = np.add.reduceat(into[:, 1], starts)
    requests, into = requests[starts], into[starts]
    requests[:, 2] = lengths
    into[:, 1] = lengths
    return requests, into


def _cut(requests: Requests, into: Iovecs, most: int) -> tuple[Requests, Iovecs]:
    """No piece longer than `most`."""
    lengths = into[:, 1].astype(np.int64)
    if int(lengths.max()) <= most:
        return requests, into
    parts = -(-lengths // most)
    at = np.repeat(np.arange(len(lengths)), parts)
    first = np.repeat(np.cumsum(parts) - parts, parts)
    skip = (np.arange(len(at)) - first) * most
    requests, into = requests[at], into[at]
    size = np.minimum(lengths[at] - skip, most).astype(np.uint64)
    requests[:, 1] += skip.astype(np.uint64)
    requests[:, 2] = size
    into[:, 0] += skip.astype(np.uint64)
    into[:, 1] = size
    return requests, into

"""The owner's end of a connection: hears what is asked, checks each piece, sends it straight from the segment.

The segment cannot go while this end sends from it (`SegmentTable.acquire`); who takes nothing loses the connection when the owner
wants its memory back.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec
import numpy as np

from interlock.core.errors import RemoteProtocolError
from interlock.host.bulk import BulkSocket
from interlock.host.bulk_pool import NOTHING, READABLE, WRITABLE, BulkPool
from interlock.host.foreign import Iovecs, address_of, advance
from interlock.host.threads import monotonic_s
from interlock.transfer.lanes import frames
from interlock.transfer.lanes.connection import Connection
from interlock.transfer.segments import PieceRefused, Segment, SegmentTable

WINDOW = 1024
TURN_BYTES = 64 * 1024 * 1024
"""After so much another connection gets the thread."""
HEAR_BYTES = 4096
"""Asked of the socket at a time at least: a request of up to 169 pieces comes with its header."""
Mapper = Callable[[int, int], tuple[bytes, int | None]]
"""(segment number, incarnation) -> what its reader must know, and a descriptor that is closed after it was sent."""


class _Placed(msgspec.Struct, frozen=True):
    """Where the pieces of a request lie (the answer's header before them): addresses, good while their segments are registered."""

    rows: bytes
    incarnation: int
    numbers: tuple[int, ...]
    pieces: Iovecs
    size_bytes: int


class ServeConnection(Connection):
    """`is_listed`: until then no byte is given (core/endpoints: no lane carries bytes before it was listed)."""

    def __init__(
        self,
        sock: BulkSocket,
        pool: BulkPool,
        on_end: Callable[[Connection, str], None],
        segments: SegmentTable,
        mapper: Mapper | None = None,
    ) -> None:
        super().__init__(sock, pool, on_end)
        self.is_listed = False
        self._segments, self._mapper = segments, mapper
        self._heard = bytearray()
        self._wanted = frames.HEADER.size
        self._asked: tuple[int, int, int, int] | None = None
        self._head = memoryview(b"")
        self._header = bytearray(frames.HEADER.size)
        where = (address_of(memoryview(self._header)), frames.HEADER.size)
        self._header_piece: Iovecs = np.array([where], np.uint64)
        """It leaves in one call with the bytes that it announces: alone it would wake the reader for nothing."""
        self._fd: int | None = None
        self._pieces: Iovecs = np.empty((0, 2), np.uint64)
        self._window: Iovecs = self._pieces
        self._next = 0
        self._left_bytes = 0
        self._used: list[Segment] = []
        self._placed: _Placed | None = None
        """Of the last request, if it was no large one: readers that prepared a read ask the same again and again."""
        self.sent_bytes = 0

    def advance(self) -> int:
        moved = 0
        while moved < TURN_BYTES:
            if len(self._head):
                taken = self.sock.send(self._head, () if self._fd is None else (self._fd,))
                if not taken:
                    return WRITABLE
                self._drop_fd()
                self._head = self._head[taken:]
            elif len(self._window) or self._next < len(self._pieces):
                sent = self._send_pieces()
                if not sent:
                    return WRITABLE
                moved += sent
                if not self._left_bytes and not self._heard:
                    self._rest()
                    return READABLE  # the next question takes a round trip
            else:
                self._rest()
                if not self._hear():
                    return READABLE
        return WRITABLE

    def _rest(self) -> None:
        self.waiting = False
        if self._used:
            self._segments.let_go(self._used, self)
            self._used = []
            self._pieces = self._window = self._pieces[:0]
            self._next = 0

    def _send_pieces(self) -> int:
        if not len(self._window):
            self._window = np.ascontiguousarray(self._pieces[self._next : self._next + WINDOW])
            self._next += len(self._window)
        sent = self.sock.send_pieces(self._window, patient=self.patience())
        self.judge_pace(sent)
        if sent:
            self.sent_bytes += sent
            self._left_bytes -= sent
            if self._left_bytes:
                self._window = advance(self._window, sent)
            else:
                self._window, self._next = self._window[:0], len(self._pieces)
        return sent

    def _hear(self) -> bool:
        """Takes in what is asked; False: the rest of it has not come yet."""
        if len(self._heard) < self._wanted:
            data = self._receive(max(HEAR_BYTES, self._wanted - len(self._heard)))
            if data is None:
                return False
            self._heard += data
            if len(self._heard) < self._wanted:
                return True
        heard = bytes(memoryview(self._heard)[: self._wanted])
        del self._heard[: self._wanted]
        if self._asked is None:
            self._asked = frames.read_request(heard)
            self._wanted = self._asked[1] * frames.ROW_BYTES
            return True
        kind, _, number, incarnation = self._asked
        self._asked, self._wanted = None, frames.HEADER.size
        self.waiting, self.moved_s = True, monotonic_s()
        try:
            self._answer(kind, number, incarnation, heard)
        except PieceRefused as refused:
            self._head = memoryview(frames.refusal(number, refused))
        return True

    def _receive(self, count: int) -> bytes | None:
        """Raises `RemoteProtocolError` for descriptors, which no reader sends."""
        fds: list[int] = []
        try:
            data = self.sock.receive(count, fds)
        finally:
            for fd in fds:
                os.close(fd)
        if fds:
            raise RemoteProtocolError(f"{self.sock.peer.address} sent descriptors that nobody asked for")
        return data

    def _answer(self, kind: int, number: int, incarnation: int, heard: bytes) -> None:
        if not self.is_listed:
            raise PieceRefused("refused", "this lane was not listed by both sides")
        if kind == frames.MAP:
            if self._mapper is None:
                raise PieceRefused("refused", "this lane maps nothing")
            try:
                detail, self._fd = self._mapper(int(frames.read_rows(heard)[0, 0]), incarnation)
            except OSError as error:  # no descriptor left: its bytes are asked for over the connection
                raise PieceRefused("refused", f"no mapping can be handed over now: {error}") from error
            self._head = memoryview(frames.answer(number, 0, detail))
            return
        placed = self._place(heard, incarnation)
        frames.HEADER.pack_into(self._header, 0, frames.OK, 0, number, placed.size_bytes)
        self._pieces, self._next = placed.pieces, 0
        self._left_bytes = placed.size_bytes + frames.HEADER.size

    def _place(self, rows: bytes, incarnation: int) -> _Placed:
        """Acquires the segments. Raises `PieceRefused`."""
        placed = self._placed
        if placed is not None and placed.rows == rows and placed.incarnation == incarnation:
            self._used = self._segments.acquire_again(placed.numbers, self)
            if self._used:
                return placed
        self._placed = None
        pieces, self._used = self._segments.acquire(frames.read_rows(rows), incarnation, self)
        numbers = tuple(segment.remote.number for segment in self._used)
        whole = np.concatenate((self._header_piece, pieces))
        placed = _Placed(rows, incarnation, numbers, whole, int(pieces[:, 1].sum()))
        if len(whole) <= WINDOW:
            self._placed = placed
        return placed

    def _drop_fd(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def left(self, reason: str) -> None:  # noqa: ARG002 - nobody waits for the reason here
        self._drop_fd()
        self._rest()


__all__ = ["NOTHING", "Mapper", "ServeConnection"]

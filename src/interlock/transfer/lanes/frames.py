"""What goes over a connection of a lane once it is admitted: requests of the reader, answers and bytes of the owner.

    Request   kind, count, number, the owner's incarnation; then `count` rows of (segment, offset, bytes), 8 bytes each
    Answer    status, detail bytes, number, total: OK: `total` bytes of the pieces follow, in order; else: why not, in `detail` bytes

Little-endian. One request at a time is under way on a connection.
"""

from __future__ import annotations

import struct

import msgspec
import numpy as np

from interlock.core.errors import RemoteProtocolError
from interlock.core.limits import PIECES_PER_REQUEST_MAX, REQUEST_BYTES_MAX
from interlock.transfer.segments import REQUEST_COLUMNS, PieceRefused, Requests

HEADER = struct.Struct("<IIQQ")
"""Of a request and of an answer."""
READ, MAP = 1, 2
OK, REFUSED = 0, 1
ROW_BYTES = 8 * REQUEST_COLUMNS
DETAIL_BYTES_MAX = 64 * 1024
"""An agent's metadata (NIXL) is the longest."""


class Refused(msgspec.Struct, frozen=True, array_like=True):
    """Why the owner does not give a piece."""

    code: str
    message: str
    index: int = 0


def request(kind: int, number: int, incarnation: int, rows: Requests) -> bytes:
    """A request's bytes; `rows` of (segment, offset, bytes)."""
    return HEADER.pack(kind, len(rows), number, incarnation) + np.ascontiguousarray(rows).tobytes()


def read_request(header: bytes) -> tuple[int, int, int, int]:
    """(kind, count, number, incarnation). Raises `RemoteProtocolError` before anything is allocated for it."""
    kind, count, number, incarnation = HEADER.unpack(header)
    if kind not in (READ, MAP) or not 0 < count <= PIECES_PER_REQUEST_MAX or (kind == MAP and count != 1):
        raise RemoteProtocolError(f"a request of kind {kind} for {count} pieces is none")
    return kind, count, number, incarnation


def read_rows(data: bytes | bytearray) -> Requests:
    """Raises `PieceRefused` for more than one request may ask."""
    rows = np.frombuffer(data, "<u8").astype(np.uint64, copy=False).reshape(-1, REQUEST_COLUMNS)
    if int(rows[:, 2].max()) > REQUEST_BYTES_MAX or int(rows[:, 2].sum()) > REQUEST_BYTES_MAX:
        raise PieceRefused("bounds", f"one request may ask for {REQUEST_BYTES_MAX} bytes at most")
    return rows


def answer(number: int, total: int, detail: bytes = b"") -> bytes:
    """An answer's head; `total` bytes of pieces follow it, or `detail`."""
    return HEADER.pack(OK, len(detail), number, total) + detail


def refusal(number: int, refused: PieceRefused) -> bytes:
    """A whole answer that says why not."""
    detail = msgspec.msgpack.encode(Refused(refused.code, refused.message[:1024], refused.index))
    return HEADER.pack(REFUSED, len(detail), number, 0) + detail


def read_answer(header: bytes, number: int) -> tuple[int, int, int]:
    """(status, detail bytes, total). Raises `RemoteProtocolError`."""
    status, detail, answered, total = HEADER.unpack(header)
    if status not in (OK, REFUSED) or detail > DETAIL_BYTES_MAX or answered != number:
        raise RemoteProtocolError(
            f"an answer of status {status} to request {answered} came, request {number} is under way"
        )
    return status, detail, total


_refusals = msgspec.msgpack.Decoder(Refused)


def read_refusal(detail: bytes) -> Refused:
    """Raises `RemoteProtocolError`."""
    try:
        return _refusals.decode(detail)
    except (msgspec.MsgspecError, ValueError) as error:
        raise RemoteProtocolError(f"a refusal without a reason came: {error}") from error

"""The checksums of a block as the bytes they are kept and sent in: unsigned 64-bit integers, little-endian, one after another.

A look-up answers with thousands of them. As integers each is an object to build, encode and decode; packed, those of a block
are one copy, and only a block whose bytes are checked has them unpacked.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

SUM_BYTES = 8


def pack_sums(sums: Sequence[int]) -> bytes:
    """Raises `struct.error` for a number that is no unsigned 64-bit integer."""
    return struct.pack(f"<{len(sums)}Q", *sums)


def unpack_sums(packed: bytes) -> tuple[int, ...]:
    """() for bytes that do not divide into integers: a block without its checksums fails its check, so it is a miss."""
    count, rest = divmod(len(packed), SUM_BYTES)
    return struct.unpack(f"<{count}Q", packed) if not rest else ()

"""Token ids as they travel and wait: packed, so that nobody on their way builds a list of them that he does not read.

A list of 8,000 integers costs a third of a megabyte and, made or walked by a collector, some hundred microseconds; packed it is
24 KB that are copied as a whole. Between a client's prompt and its engine nobody but the engine looks at the ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[int])


def pack_ids(ids: Sequence[int]) -> bytes:
    """Not looked at here: `unpack_ids` refuses what are no integers. Raises `OverflowError` above 64 bits."""
    return _encoder.encode(ids)


def unpack_ids(packed: bytes) -> list[int]:
    """Raises `ValueError` for what `pack_ids` has not made."""
    try:
        return _decoder.decode(packed)
    except (msgspec.MsgspecError, OverflowError) as error:
        raise ValueError(f"these are no packed token ids: {error}") from error

"""Which tokens a block stands for, as far as engines said: for KV events, whose readers name blocks by tokens and not by our keys.

A store needs no tokens, and prompts are nobody's business but their sender's: engines send them only to a node that was
told to publish them (`StoreConfig.kv_events_tokens`), with the write that stores the block. Kept apart from the index, and
longer than the block stays in RAM: it may come back from the disk or a peer, and is told of again then. Of blocks that were
saved in an earlier life of the node, or that programs put, nothing is known; their events have no tokens.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

from interlock.core.limits import KV_EVENT_TOKENS_BYTES_MAX

ENTRY_BYTES = 256
"""What the tables take beside a block's tokens, roughly."""
WORD_BYTES = 4


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Unsigned 32-bit integers, little-endian. Raises `OverflowError` for an id that is none."""
    words = array("I", token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """What `pack_tokens` packed."""
    words = array("I", packed)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tolist()


class TokenBook:
    """Packed tokens by block key; those learnt longest ago are forgotten beyond `bytes_max`."""

    def __init__(self, bytes_max: int = KV_EVENT_TOKENS_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._tokens: OrderedDict[bytes, tuple[bytes, str]] = OrderedDict()
        """With the tenant for whom the block was saved."""
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def learn(self, key: bytes, tokens: bytes, tenant: str = "") -> None:
        """What an engine said of a block; empty: nothing is known of it."""
        self._forget(key)
        if not tokens:
            return
        self._tokens[key] = tokens, tenant
        self.bytes += ENTRY_BYTES + len(tokens)
        while self.bytes > self._bytes_max:
            self._forget(next(iter(self._tokens)))

    def of(self, key: bytes) -> bytes:
        """Empty when they are not known."""
        return self._tokens.get(key, (b"", ""))[0]

    def forget(self, wanted: Callable[[bytes, str], bool]) -> None:
        """Those whose (key, tenant) are `wanted`: who is deleted leaves no prompt behind. Looks at everything."""
        for key in [key for key, (_, tenant) in self._tokens.items() if wanted(key, tenant)]:
            self._forget(key)

    def _forget(self, key: bytes) -> None:
        known = self._tokens.pop(key, None)
        self.bytes -= 0 if known is None else ENTRY_BYTES + len(known[0])

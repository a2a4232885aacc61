"""The canonical layout of a KV block, and the rectangles (shards) that tensor-parallel ranks hold of it.

A block lies in its slot as `[head][layer][token][K‖V]`: what one rank of any tensor-parallel degree holds is then one
contiguous range, and a block that two ranks saved can be loaded by one or by four (hazards W6).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from interlock.core.limits import HEADS_MAX, LAYERS_MAX

ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
    "int8": 1,
}
"""Bytes per element of the dtypes a KV cache can have."""


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The global shape of one KV block, whatever the number of ranks.

    `content` is the number of elements per token and head: K and V side by side, so twice the head size (for MLA: the
    latent size, with `heads` 1).
    """

    layers: int
    heads: int
    block_tokens: int
    content: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
        if not (0 < self.layers <= LAYERS_MAX and 0 < self.heads <= HEADS_MAX):
            raise ValueError(
                f"a KV block of {self.layers} layers and {self.heads} heads is outside the limits"
            )
        if self.block_tokens <= 0 or self.content <= 0:
            raise ValueError("a KV block has at least one token and one element")

    @property
    def head_bytes(self) -> int:
        """Bytes of one head in a slot, all layers: the unit of checksums."""
        return self.layers * self.block_tokens * self.content * ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.heads * self.head_bytes

    def digest(self) -> bytes:
        """Equal layouts, equal digest: part of every key's salt."""
        words = f"{self.layers},{self.heads},{self.block_tokens},{self.content},{self.dtype}"
        return hashlib.blake2b(words.encode(), digest_size=16).digest()


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """A rectangle of a block: layers [layer_start, layer_stop) × KV heads [head_start, head_stop). May be empty."""

    layer_start: int
    layer_stop: int
    head_start: int
    head_stop: int

    @property
    def area(self) -> int:
        return max(0, self.layer_stop - self.layer_start) * max(0, self.head_stop - self.head_start)

    def overlaps(self, other: Shard) -> bool:
        return (
            self.area > 0
            and other.area > 0
            and self.layer_start < other.layer_stop
            and other.layer_start < self.layer_stop
            and self.head_start < other.head_stop
            and other.head_start < self.head_stop
        )


EMPTY_SHARD = Shard(0, 0, 0, 0)


def tiles(shards: Sequence[Shard], *, layers: int, heads: int) -> bool:
    """Whether the shards cover every (layer, head) of a block exactly once."""
    inside = all(
        shard.area == 0
        or (
            0 <= shard.layer_start < shard.layer_stop <= layers
            and 0 <= shard.head_start < shard.head_stop <= heads
        )
        for shard in shards
    )
    disjoint = not any(a.overlaps(b) for i, a in enumerate(shards) for b in shards[i + 1 :])
    return inside and disjoint and sum(shard.area for shard in shards) == layers * heads


def shard_of_rank(rank: int, ranks: int, *, layers: int, heads: int) -> Shard:
    """What rank `rank` of `ranks` writes, by vLLM's rule: heads are split evenly, or replicated when there are fewer.

    Of ranks that hold the same head the lowest writes it; the others get an empty shard.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is not one of {ranks}")
    if heads % ranks == 0:
        share = heads // ranks
        return Shard(0, layers, rank * share, (rank + 1) * share)
    if ranks % heads == 0:
        copies = ranks // heads
        head, copy = divmod(rank, copies)
        return Shard(0, layers, head, head + 1) if copy == 0 else EMPTY_SHARD
    raise ValueError(f"{heads} KV heads can be neither split over nor replicated on {ranks} ranks")

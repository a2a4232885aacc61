"""The canonical layout of a KV block, and the rectangles (shards) that tensor-parallel ranks hold of it.

A block lies in its slot as `[head][layer]([token][K‖V] ‖ scales)`: what one rank of any tensor-parallel degree holds is
then one contiguous range, what one of a pipeline's stages holds is one range a head, and a block that two ranks saved can
be loaded by one or by four (hazards W6).

Checksums are per (layer group, head). The groups are cut where the *writers'* pipeline is (`cuts`), since each writer can
only sum up what it has; whoever loads reads every group that it needs a part of, checks it whole, and takes its part. So
the cuts go with the block, not into its key: any degree of either kind loads what any other saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from interlock.core.limits import HEADS_MAX, LAYER_GROUPS_MAX, LAYERS_MAX, SCALES_MAX

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
SCALE_BYTES = 4
"""A scale is a float32."""


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
    scales: int = 0
    """Quantised KV with scales per tensor or per head: how many float32 each (layer, head) carries, 2 for K and V. Scales
    per token are part of `content`, as engines that have them lay them out."""
    cuts: tuple[int, ...] = ()
    """Layers at which a further layer group begins, ascending; not part of `digest`."""

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
        if not (0 < self.layers <= LAYERS_MAX and 0 < self.heads <= HEADS_MAX):
            raise ValueError(
                f"a KV block of {self.layers} layers and {self.heads} heads is outside the limits"
            )
        if self.block_tokens <= 0 or self.content <= 0:
            raise ValueError("a KV block has at least one token and one element")
        if not 0 <= self.scales <= SCALES_MAX:
            raise ValueError(f"{self.scales} scales per layer and head are outside 0 to {SCALES_MAX}")
        edges = (0, *self.cuts, self.layers)
        if len(self.cuts) >= LAYER_GROUPS_MAX or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(
                f"the layer groups begin at {self.cuts}: between 0 and {self.layers}, ascending, and at most "
                f"{LAYER_GROUPS_MAX} of them"
            )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer of one head."""
        return self.content * ITEM_BYTES[self.dtype]

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one layer of one head; they lie behind its tokens."""
        return self.scales * SCALE_BYTES

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one head: its tokens and its scales."""
        return self.block_tokens * self.token_bytes + self.scale_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of one head in a slot, all layers."""
        return self.layers * self.layer_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one whole block, all layers and heads, its scales included."""
        return self.heads * self.head_bytes

    def digest(self) -> bytes:
        """Equal bytes, equal digest: part of every key's salt. How they are summed up (`cuts`) is not part of it."""
        words = f"{self.layers},{self.heads},{self.block_tokens},{self.content},{self.dtype},{self.scales}"
        return hashlib.blake2b(words.encode(), digest_size=16).digest()


Span = tuple[int, int]
"""Layers [start, stop)."""


def layer_groups(layers: int, cuts: Sequence[int]) -> tuple[Span, ...]:
    """The layer groups of a block, in order; a block's checksums are `[group][head]`."""
    edges = (0, *cuts, layers)
    return tuple(pairwise(edges))


def groups_within(layers: int, cuts: Sequence[int], start: int, stop: int) -> range:
    """The numbers of the groups that [start, stop) consists of. Raises `ValueError` when it cuts one in two."""
    edges = (0, *cuts, layers)
    if start not in edges or stop not in edges:
        raise ValueError(
            f"layers {start} to {stop} of {layers} cut a layer group in two: groups begin at {edges[:-1]}"
        )
    return range(edges.index(start), edges.index(stop))


def covering_span(layers: int, cuts: Sequence[int], start: int, stop: int) -> Span:
    """The layers of all groups that [start, stop) has a part of: what must be read to check them.

    Raises `ValueError` for cuts that are no cuts of so many layers: they come from outside, and decide what is read.
    """
    edges = (0, *cuts, layers)
    if any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"layer groups that begin at {tuple(cuts)} are none of {layers} layers")
    return max(edge for edge in edges if edge <= start), min(edge for edge in edges if edge >= stop)


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """A rectangle of a block: layers [layer_start, layer_stop) × KV heads [head_start, head_stop). May be empty."""

    layer_start: int
    layer_stop: int
    head_start: int
    head_stop: int

    @property
    def area(self) -> int:
        """In cells of (layer, head); an empty rectangle, also one turned inside out, has 0."""
        return max(0, self.layer_stop - self.layer_start) * max(0, self.head_stop - self.head_start)

    def overlaps(self, other: Shard) -> bool:
        """Whether they share a cell. An empty one shares none."""
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


def heads_of_rank(rank: int, ranks: int, heads: int) -> tuple[int, int]:
    """Heads [start, stop) that `rank` holds and loads; replicas hold what only the lowest of them writes."""
    start = rank * heads // ranks
    return start, start + max(1, heads // ranks)


def grid_shards(stages: Sequence[Span], tensor_ranks: int, *, heads: int) -> tuple[Shard, ...]:
    """What each rank of a pipeline of `stages` (their layers) times `tensor_ranks` writes.

    By rank in vLLM's and Megatron's order: all tensor-parallel ranks of the first stage, then of the second.
    Raises `ValueError` when the heads cannot be spread over the ranks.
    """
    shards = []
    for start, stop in stages:
        for rank in range(tensor_ranks):
            across = shard_of_rank(rank, tensor_ranks, layers=1, heads=heads)
            shards.append(Shard(start, stop, across.head_start, across.head_stop) if across.area else across)
    return tuple(shards)


def cuts_of(stages: Sequence[Span]) -> tuple[int, ...]:
    """The layer groups that writers of these pipeline stages can sum up."""
    return tuple(start for start, _ in stages if start)

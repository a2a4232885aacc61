"""The one checksum of a block's bytes: xxh3_64 per (layer group, KV head), seeded with what the bytes are *for*.

The writing rank computes it from the bytes it read out of the KV tensor; it travels with the rank's report and comes
back with the look-up, never from the slot. A sum that stands beside the bytes accepts a foreign block as soon as the
slot was reused, and a sum the node computes blesses whatever lies in the slot (hazards W3). Per head, because that is
the smallest piece that a rank of any tensor-parallel degree reads; per layer group, because a pipeline's stage has no
other layers to sum up (core/layouts): what two ranks saved, one or four can verify.

xxh3 finds accidents, not forgers: writers are processes of the same user. It lets go of the interpreter's lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import xxhash

from interlock.core.layouts import KVLayout, groups_within, layer_groups

Buffer = bytes | bytearray | memoryview

_HEAD_STEP, _LAYER_STEP, _SEED_MASK = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, (1 << 64) - 1
"""Odd, so that no two heads, and no two layers, of one block have the same seed."""


class Binding(msgspec.Struct, frozen=True):
    """What a block's bytes are for: this key, in this slot of this slab, in this life of the node."""

    key: bytes
    slot: int
    node_incarnation: int
    slab: int

    def base(self) -> int:
        """64 bits that no other block shares; the seeds of its pieces are made from them by `seed_of`."""
        words = (self.slot, self.node_incarnation, self.slab)
        data = self.key + b"".join(word.to_bytes(8, "little") for word in words)
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

    def seed(self, head: int, layer_start: int = 0) -> int:
        """The seed of `head`'s layer group that begins at `layer_start`, both counted in the *whole* block."""
        return seed_of(self.base(), head, layer_start)


def seed_of(base: int, head: int, layer_start: int) -> int:
    """One hash a block and not one a piece: with 32 heads the hashes would cost as much as the sums."""
    return (base + head * _HEAD_STEP + layer_start * _LAYER_STEP) & _SEED_MASK


class HeadHasher:
    """The checksum of one (layer group, head) whose bytes come in pieces: layer by layer, token by token."""

    def __init__(self, binding: Binding, head: int, layer_start: int = 0) -> None:
        self._hasher = xxhash.xxh3_64(seed=binding.seed(head, layer_start))

    def update(self, piece: Buffer) -> None:
        """The next bytes in canonical order `[layer]([token][content] ‖ scales)`; a piece is C-contiguous."""
        self._hasher.update(piece)

    def value(self) -> int:
        return int(self._hasher.intdigest())


def head_checksum(binding: Binding, head: int, data: Buffer, layer_start: int = 0) -> int:
    """The checksum of one head's layer group whose bytes are contiguous (a staging buffer, a slot)."""
    return int(xxhash.xxh3_64_intdigest(data, seed=binding.seed(head, layer_start)))


def block_checksums(
    binding: Binding,
    layout: KVLayout,
    data: Buffer,
    *,
    head_start: int = 0,
    head_stop: int | None = None,
    layer_start: int = 0,
    layer_stop: int | None = None,
    cuts: Sequence[int] | None = None,
) -> list[int]:
    """`[group][head]`: the sums of heads [head_start, head_stop) over the layer groups of [layer_start, layer_stop).

    Their bytes lie in `data` as `[head][layer]`. `cuts`: where groups begin, if not where `layout` says. Raises
    `ValueError` when `data` has not exactly that many bytes or the layers cut a group in two.
    """
    stop = layout.heads if head_stop is None else head_stop
    layers = (layer_start, layout.layers if layer_stop is None else layer_stop)
    return _sums(binding, layout, data, (head_start, stop), layers, layout.cuts if cuts is None else cuts)


def verify_block(
    binding: Binding,
    layout: KVLayout,
    data: Buffer,
    checksums: Sequence[int],
    *,
    head_start: int = 0,
    head_stop: int | None = None,
    layer_start: int = 0,
    layer_stop: int | None = None,
    cuts: Sequence[int] | None = None,
) -> bool:
    """Whether the loaded part is what was saved for this key. `checksums` are those of the *whole* block, from the look-up.

    The arguments, and `ValueError`, are those of `block_checksums`; `cuts` are the block's own, from the look-up too.
    """
    stop = layout.heads if head_stop is None else head_stop
    layers = (layer_start, layout.layers if layer_stop is None else layer_stop)
    where = layout.cuts if cuts is None else cuts
    if len(checksums) != layout.heads * (len(where) + 1):
        return False
    groups = groups_within(layout.layers, where, *layers)
    found = _sums(binding, layout, data, (head_start, stop), layers, where)
    return found == [checksums[g * layout.heads + head] for g in groups for head in range(head_start, stop)]


def _sums(
    binding: Binding,
    layout: KVLayout,
    data: Buffer,
    heads: tuple[int, int],
    layers: tuple[int, int],
    cuts: Sequence[int],
) -> list[int]:
    view = memoryview(data).cast("B")
    each = (layers[1] - layers[0]) * layout.layer_bytes
    if len(view) != (heads[1] - heads[0]) * each:
        raise ValueError(
            f"heads {heads[0]} to {heads[1]} of layers {layers[0]} to {layers[1]} take {(heads[1] - heads[0]) * each} "
            f"bytes, these are {len(view)}"
        )
    base, digest = binding.base(), xxhash.xxh3_64_intdigest
    return [
        digest(view[start:stop], seed=(base + step) & _SEED_MASK)
        for start, stop, step in _pieces(layout.layer_bytes, layout.layers, heads, layers, tuple(cuts))
    ]


@lru_cache(maxsize=64)
def _pieces(
    layer_bytes: int, total: int, heads: tuple[int, int], layers: tuple[int, int], cuts: tuple[int, ...]
) -> list[tuple[int, int, int]]:
    """Of each (layer group, head): where its bytes begin and end, and what `seed_of` adds for it. The same for every block."""
    spans, each, found = layer_groups(total, cuts), (layers[1] - layers[0]) * layer_bytes, []
    for group in groups_within(total, cuts, *layers):
        first, last = spans[group]
        for index, head in enumerate(range(*heads)):
            at = index * each + (first - layers[0]) * layer_bytes
            found.append((at, at + (last - first) * layer_bytes, seed_of(0, head, first)))
    return found

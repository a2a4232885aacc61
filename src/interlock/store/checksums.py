"""The one checksum of a block's bytes: xxh3_64 per KV head, seeded with what the bytes are *for*.

The writing rank computes it from the bytes it read out of the KV tensor; it travels with the rank's report and comes
back with the look-up, never from the slot. A sum that stands beside the bytes accepts a foreign block as soon as the
slot was reused, and a sum the node computes blesses whatever lies in the slot (hazards W3). Per head, because that is
the smallest piece that a rank of any tensor-parallel degree reads: what two ranks saved, one or four can verify.

xxh3 finds accidents, not forgers: writers are processes of the same user.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import xxhash

from interlock.core.layouts import KVLayout

Buffer = bytes | bytearray | memoryview


class Binding(msgspec.Struct, frozen=True):
    """What a block's bytes are for: this key, in this slot of this slab, in this life of the node."""

    key: bytes
    slot: int
    node_incarnation: int
    slab: int

    def seed(self, head: int) -> int:
        """The 64-bit seed for `head` of the canonical layout (0 is the first of *all* heads, not of the shard)."""
        words = (head, self.slot, self.node_incarnation, self.slab)
        data = self.key + b"".join(word.to_bytes(8, "little") for word in words)
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class HeadHasher:
    """The checksum of one head whose bytes come in pieces (a strided KV tensor): layer by layer, token by token."""

    def __init__(self, binding: Binding, head: int) -> None:
        self._hasher = xxhash.xxh3_64(seed=binding.seed(head))

    def update(self, piece: Buffer) -> None:
        """The next bytes in canonical order `[layer][token][content]`; a piece is C-contiguous."""
        self._hasher.update(piece)

    def value(self) -> int:
        return int(self._hasher.intdigest())


def head_checksum(binding: Binding, head: int, data: Buffer) -> int:
    """The checksum of one head whose bytes are contiguous (a staging buffer, a slot)."""
    return int(xxhash.xxh3_64_intdigest(data, seed=binding.seed(head)))


def block_checksums(
    binding: Binding, layout: KVLayout, data: Buffer, *, head_start: int = 0, head_stop: int | None = None
) -> list[int]:
    """One checksum per head of [head_start, head_stop), whose bytes lie back to back in `data`, `[head][layer][token]`.

    Raises `ValueError` when `data` has not exactly that many bytes.
    """
    stop = layout.heads if head_stop is None else head_stop
    view = memoryview(data).cast("B")
    size = layout.head_bytes
    if len(view) != (stop - head_start) * size:
        raise ValueError(
            f"heads {head_start} to {stop} take {(stop - head_start) * size} bytes, these are {len(view)}"
        )
    return [
        head_checksum(binding, head, view[i * size : (i + 1) * size])
        for i, head in enumerate(range(head_start, stop))
    ]


def verify_block(
    binding: Binding,
    layout: KVLayout,
    data: Buffer,
    checksums: Sequence[int],
    *,
    head_start: int = 0,
    head_stop: int | None = None,
) -> bool:
    """Whether the loaded heads are what was saved for this key. `checksums` are those of *all* heads, from the look-up."""
    stop = layout.heads if head_stop is None else head_stop
    if len(checksums) != layout.heads:
        return False
    found = block_checksums(binding, layout, data, head_start=head_start, head_stop=stop)
    return found == list(checksums[head_start:stop])

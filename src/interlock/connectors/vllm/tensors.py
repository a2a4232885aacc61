"""Where a rank's KV blocks lie, where their slots lie, and which of them move in one strided copy.

vLLM hands over one tensor a layer, `[block, head, token, content]`, for this rank's heads. On every backend that
allocates all layers together they are slices of one storage at equal distance, so that one view
`[layer, block, head, token, content]` holds them all and a block of all layers moves in one copy; elsewhere it takes
one copy a layer. A slot holds `[head][layer][token][content]` for *all* heads (`core/layouts`), so a rank's part of it
is one contiguous range whatever the number of ranks.

Consecutive slots and blocks at equal distances move together: a prefill chunk into fresh slots is one copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from interlock.core.layouts import KVLayout
from interlock.core.limits import SLOT_GRAIN_BYTES

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class UnknownTensorsError(ValueError):
    """vLLM registered KV tensors of a shape that the layout does not describe."""


class Run(msgspec.Struct, frozen=True):
    """Positions [start, stop) of two parallel lists that each advance by a constant step there (1 for a single one)."""

    start: int
    stop: int
    slot_step: int
    block_step: int

    def chosen(self, first_block: int) -> slice:
        """The run's blocks as a slice, its first one being `first_block`."""
        return slice(
            first_block, first_block + self.block_step * (self.stop - self.start - 1) + 1, self.block_step
        )


def runs(slots: Sequence[int], blocks: Sequence[int]) -> Iterator[Run]:
    """Strided runs that cover (slots, blocks) in order, each as long as it can be. Steps are positive."""
    start, total = 0, len(slots)
    while start < total:
        stop, slot_step, block_step = start + 1, 1, 1
        if stop < total:
            slot_step, block_step = slots[stop] - slots[start], blocks[stop] - blocks[start]
        if slot_step <= 0 or block_step <= 0:
            yield Run(start, start + 1, 1, 1)
            start += 1
            continue
        while (
            stop < total
            and slots[stop] - slots[stop - 1] == slot_step
            and blocks[stop] - blocks[stop - 1] == block_step
        ):
            stop += 1
        yield Run(start, stop, slot_step, block_step)
        start = stop


class KVBlocks:
    """All layers' KV blocks of one rank, as the fewest tensors that hold them."""

    def __init__(self, layers: Sequence[torch.Tensor], layout: KVLayout, heads: int) -> None:
        """`layers` in layer order; `heads` is how many this rank holds. Raises `UnknownTensorsError`."""
        if len(layers) != layout.layers:
            raise UnknownTensorsError(
                f"vLLM registered {len(layers)} KV tensors, the model has {layout.layers} layers"
            )
        wanted = (heads, layout.block_tokens, layout.content)
        for layer in layers:
            if layer.dim() != 4 or tuple(layer.shape[1:]) != wanted:
                raise UnknownTensorsError(
                    f"a KV tensor of shape {tuple(layer.shape)} is not (blocks, {', '.join(map(str, wanted))}); choose "
                    "another attention backend or block size"
                )
            if str(layer.dtype).removeprefix("torch.") != layout.dtype or layer.stride(3) != 1:
                raise UnknownTensorsError(
                    f"a KV tensor of {layer.dtype} with strides {layer.stride()} is not {layout.dtype}, densely packed"
                )
        self.heads = heads
        self.count = layers[0].shape[0]
        self.device = layers[0].device
        whole = stacked_view(layers)
        self.pieces: list[tuple[slice, torch.Tensor]] = (
            [(slice(0, len(layers)), whole)]
            if whole is not None
            else [(slice(i, i + 1), layer.unsqueeze(0)) for i, layer in enumerate(layers)]
        )
        """(layers, `[layer, block, head, token, content]`): one piece, or one a layer where they lie apart."""

    def byte_pieces(self) -> list[tuple[slice, Bytes]]:
        """The same memory as bytes, `[layer, block, head, token, byte]`; for tensors in host memory."""
        return [(layers, piece.view(torch.uint8).numpy()) for layers, piece in self.pieces]


def stacked_view(layers: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One tensor over all `layers` without copying, or None when they do not lie at equal distances in one storage."""
    first = layers[0]
    storage = first.untyped_storage().data_ptr()
    alike = all(
        layer.untyped_storage().data_ptr() == storage
        and (layer.stride(), layer.shape, layer.dtype) == (first.stride(), first.shape, first.dtype)
        for layer in layers
    )
    offsets = [layer.storage_offset() for layer in layers]
    distances = {b - a for a, b in pairwise(offsets)} or {1}
    if not alike or len(distances) != 1 or min(distances) <= 0:
        return None
    return torch.as_strided(
        first, (len(layers), *first.shape), (distances.pop(), *first.stride()), offsets[0]
    )


class SlotBytes:
    """A rank's heads in every slot of a slab, as arrays over the slab's own memory."""

    def __init__(self, memory: memoryview, layout: KVLayout, head_start: int, head_stop: int) -> None:
        self._memory: Bytes = np.frombuffer(memory, dtype=np.uint8)
        self._block_bytes = layout.block_bytes
        self._start = head_start * layout.head_bytes
        token = layout.content * (layout.head_bytes // (layout.layers * layout.block_tokens * layout.content))
        layer = token * layout.block_tokens
        self._shape = (head_stop - head_start, layout.layers, layout.block_tokens, token)
        self._strides = (layer * layout.layers, layer, token, 1)

    def of(self, slots: Sequence[int], run: Run) -> Bytes:
        """`[n, head, layer, token, byte]` over the slots of `run`. Raises `IndexError` outside the slab."""
        first, last = slots[run.start], slots[run.stop - 1]
        if first < 0 or last * SLOT_GRAIN_BYTES + self._block_bytes > len(self._memory):
            raise IndexError(f"slots {first} to {last} do not lie in the slab")
        return as_strided(
            self._memory[first * SLOT_GRAIN_BYTES + self._start :],
            (run.stop - run.start, *self._shape),
            (run.slot_step * SLOT_GRAIN_BYTES, *self._strides),
        )

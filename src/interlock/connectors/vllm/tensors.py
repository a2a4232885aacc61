"""Where vLLM keeps a rank's KV blocks: all layers as one strided view where they lie so.

vLLM hands over one tensor a layer, `[block, head, token, content]`, for this rank's heads. On every backend that
allocates all layers together they are slices of one storage at equal distance, so that one view
`[layer, block, head, token, content]` holds them all and a block of all layers moves in one copy; elsewhere it takes
one copy a layer. Latent attention (MLA) has the same four dimensions with one head; a backend that leaves the head out
(`[block, token, content]`) is given it back. A pipeline's stage has its own layers only. Quantised KV comes with the scales
of each layer, one for K and one for V, which vLLM keeps beside the cache. Where the slots lie, and which of them move
together: `store/rank_slots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from interlock.core.layouts import KVLayout, Span
from interlock.store.rank_slots import Bytes


class UnknownTensorsError(ValueError):
    """vLLM registered KV tensors of a shape that the layout does not describe."""


class KVBlocks:
    """All layers' KV blocks of one rank, as the fewest tensors that hold them."""

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        layout: KVLayout,
        heads: int,
        *,
        stage: Span | None = None,
        scales: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """`layers` in layer order; `heads` is how many this rank holds, `stage` which layers of the model they are.

        `scales[i]` are those of `layers[i]`, as many as the layout has. Raises `UnknownTensorsError`.
        """
        self.layers = stage or (0, layout.layers)
        if len(layers) != self.layers[1] - self.layers[0]:
            raise UnknownTensorsError(
                f"vLLM registered {len(layers)} KV tensors, and this rank has layers {self.layers[0]} to {self.layers[1]}"
            )
        layers = [layer.unsqueeze(1) if layer.dim() == 3 and heads == 1 else layer for layer in layers]
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
        self._scales = _scales_of(scales, layout, len(layers), heads)
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

    def scale_bytes(self) -> Bytes | None:
        """`[head, layer, byte]` as they stand in a slot; None where the layout has none."""
        return self._scales

    def byte_pieces(self) -> list[tuple[slice, Bytes]]:
        """The same memory as bytes, `[layer, block, head, token, byte]`; for tensors in host memory."""
        return [(layers, piece.view(torch.uint8).numpy()) for layers, piece in self.pieces]


def _scales_of(
    scales: Sequence[Sequence[float]] | None, layout: KVLayout, layers: int, heads: int
) -> Bytes | None:
    if not layout.scales:
        return None
    array = np.asarray(scales if scales is not None else [], dtype=np.float32)
    if array.shape != (layers, layout.scales) or not np.isfinite(array).all():
        raise UnknownTensorsError(
            f"this KV cache is quantised with {layout.scales} scales a layer, and vLLM names {array.tolist()} for "
            f"{layers} layers"
        )
    every_head = np.broadcast_to(array, (heads, *array.shape))
    return np.ascontiguousarray(every_head).view(np.uint8)


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

"""How vLLM's CPU kernels permute the elements of a block, asked of the kernels themselves.

On CPU a block of one head is no `[token][K‖V]`: keys and values lie one after the other, and keys in the order that the
instruction set likes (`cpu_attn_reshape_and_cache`, by "isa"). Read as the canonical layout it gives wrong keys with right
checksums, to every other engine and to a vLLM on another CPU. So the connector brings blocks into canonical order when it
saves and back when it loads; an order that it cannot find out goes into the salt instead, and nobody else reads them.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import numpy as np

from interlock.core.layouts import ITEM_BYTES, KVLayout

_log = logging.getLogger(__name__)

Order = np.ndarray[Any, np.dtype[np.int64]]
FIRST_NORMAL = 0x0400
"""Half-precision bit patterns from here on are ordinary numbers, which no copy changes."""


class Packing(msgspec.Struct, frozen=True, eq=False):
    """`order[i]` is where element i of canonical `[token][K‖V]` lies in vLLM's block; None: at i.

    `name` goes into the salt; empty where blocks are brought into canonical order.
    """

    name: str = ""
    order: Order | None = None


def packing_of(layout: KVLayout) -> Packing:
    """What this process's vLLM does to blocks of `layout` on this platform."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return Packing()
    isa = "unknown"
    try:
        import torch
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        dtype = getattr(torch, layout.dtype)
        isa = _get_attn_isa(dtype, layout.block_tokens, layout.content // 2)
        return Packing("", _asked(layout, isa))
    except Exception as error:
        _log.warning(
            "the order of KV blocks for CPU kernels %r cannot be told (%s: %s): they are shared with engines that have the "
            "same only",
            isa,
            type(error).__name__,
            error,
        )
        return Packing(f"cpu {isa}")


def _asked(layout: KVLayout, isa: str) -> Order | None:
    """Stores a block whose elements all differ, and looks where they are. Raises `ValueError` for no permutation."""
    import torch
    from vllm import _custom_ops

    if layout.scales or ITEM_BYTES[layout.dtype] == 1:
        raise ValueError("quantised KV is converted when it is stored")
    tokens, size = layout.block_tokens, layout.content // 2
    names = torch.arange(2 * tokens * size)
    if ITEM_BYTES[layout.dtype] == 2:
        told = (names + FIRST_NORMAL).to(torch.int16).view(getattr(torch, layout.dtype))
    else:
        told = names.to(torch.float32)
    keys, values = told.reshape(2, tokens, 1, size)
    block = torch.zeros((1, 1, 2 * tokens, size), dtype=told.dtype)
    key_cache, value_cache = block.chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(
        keys.contiguous(),
        values.contiguous(),
        key_cache,
        value_cache,
        torch.arange(tokens),
        isa,
    )
    flat = block.flatten()
    found = (
        flat.view(torch.int16).to(torch.int64) - FIRST_NORMAL if flat.itemsize == 2 else flat.to(torch.int64)
    )
    place = np.argsort(found.numpy())
    if not np.array_equal(found.numpy()[place], np.arange(len(place))):
        raise ValueError("the stored block is no permutation of what was given")
    # Element (K or V, token, n) of `place` to canonical (token, K or V, n).
    order: Order = place.reshape(2, tokens, size).transpose(1, 0, 2).reshape(-1).astype(np.int64)
    return None if np.array_equal(order, np.arange(len(order))) else order


def to_canonical(packed: np.ndarray[Any, Any], order: Order) -> None:
    """`[…, element]` in vLLM's order, in place to the canonical one."""
    packed[:] = packed[..., order]


def to_packed(canonical: np.ndarray[Any, Any], order: Order) -> None:
    """And back."""
    canonical[..., order] = canonical.copy()


def elements(whole: np.ndarray[Any, np.dtype[np.uint8]], layout: KVLayout) -> np.ndarray[Any, Any]:
    """Of `[block, head, layer, byte]` the tokens' elements, `[block, head, layer, element]`, without a copy."""
    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32}
    tokens = whole[..., : layout.block_tokens * layout.token_bytes]
    return tokens.view(kinds[ITEM_BYTES[layout.dtype]])

"""vLLM's CPU kernels permute a block; what is shared is in canonical order all the same."""

from __future__ import annotations

import numpy as np
import pytest

from interlock.connectors.vllm.packing import elements, packing_of, to_canonical, to_packed
from interlock.core.layouts import KVLayout

LAYOUT = KVLayout(layers=3, heads=2, block_tokens=32, content=128, dtype="float32")


def test_an_order_there_and_back_changes_nothing() -> None:
    random = np.random.default_rng(1)
    order = random.permutation(32 * 128)
    staged = random.integers(0, 256, (4, 2, 3, LAYOUT.layer_bytes), dtype=np.uint8)
    before = staged.copy()
    to_canonical(elements(staged, LAYOUT), order)
    assert not np.array_equal(staged, before)
    packed = before.view(np.uint32).reshape(4, 2, 3, -1)
    assert np.array_equal(staged.view(np.uint32).reshape(4, 2, 3, -1), packed[..., order])
    to_packed(elements(staged, LAYOUT), order)
    assert np.array_equal(staged, before)


@pytest.mark.vllm
@pytest.mark.timeout(120)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_order_is_that_of_vllms_own_kernels(dtype: str) -> None:
    """Random keys and values of several heads and blocks, stored by vLLM: in canonical order they are what they were."""
    import torch
    from vllm import _custom_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    layout = KVLayout(layers=1, heads=2, block_tokens=32, content=128, dtype=dtype)
    packing = packing_of(layout)
    assert packing.name == ""
    assert packing.order is not None, "were it none, the K of a CPU block would lie beside its V"
    kind = getattr(torch, dtype)
    keys = torch.randn(96, 2, 64, generator=torch.Generator().manual_seed(1)).to(kind)
    values = torch.randn(96, 2, 64, generator=torch.Generator().manual_seed(2)).to(kind)
    cache = torch.zeros((4, 2, 32, 128), dtype=kind)
    parts = cache.view(4, 2, 64, 64).chunk(2, dim=2)
    slots = torch.arange(32, 128)
    isa = _get_attn_isa(kind, 32, 64)
    _custom_ops.cpu_attn_reshape_and_cache(keys, values, *parts, slots, isa)
    number = {2: torch.int16, 4: torch.int32}[cache.itemsize]
    stored = cache[1:].view(number).reshape(3, 2, -1).numpy().copy()
    to_canonical(stored, packing.order)
    wanted = torch.cat([keys, values], dim=-1).reshape(3, 32, 2, 128).transpose(1, 2)
    assert np.array_equal(stored, wanted.contiguous().view(number).reshape(3, 2, -1).numpy())

"""Slots and KV tensors: what any number of ranks saves, any number loads, bit for bit, and every doubt is seen."""

from __future__ import annotations

import os

import msgspec
import numpy as np
import pytest
import torch

from interlock.connectors.vllm.config import EngineShape
from interlock.connectors.vllm.movers import GOOD, LATE, MISMATCH, CpuMover
from interlock.connectors.vllm.tensors import KVBlocks, UnknownTensorsError, runs, stacked_view
from interlock.core.layouts import KVLayout
from interlock.core.limits import SLOT_GRAIN_BYTES
from interlock.host.memory import create_memory
from interlock.store.mapping import MappedSlab
from interlock.wire.store_messages import Location

LAYOUT = KVLayout(layers=3, heads=4, block_tokens=8, content=16, dtype="float32")
BLOCKS = 12
PAGES = -(-LAYOUT.block_bytes // SLOT_GRAIN_BYTES)


def shape(ranks: int, layout: KVLayout = LAYOUT) -> EngineShape:
    return EngineShape(layout=layout, ranks=ranks, name="e", life="l", model="m", revision=None, variant=())


def slab(slots: int = 16, layout: KVLayout = LAYOUT) -> MappedSlab:
    size = slots * PAGES * SLOT_GRAIN_BYTES
    memory = create_memory("test-slab", size)
    fd = os.dup(memory.fd)
    memory.close()
    return MappedSlab(fd, slab=7, node_incarnation=9, size_bytes=size, layout=layout, writable=True)


def global_kv(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`[layer, block, head, token, content]` of the whole model."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(
        (LAYOUT.layers, BLOCKS, LAYOUT.heads, LAYOUT.block_tokens, LAYOUT.content), generator=generator
    )
    return full.to(dtype)


def rank_layers(full: torch.Tensor, rank: int, ranks: int, *, apart: bool = False) -> list[torch.Tensor]:
    """What vLLM gives one rank: a tensor a layer, slices of one storage unless `apart`."""
    start, stop = shape(ranks).heads_of(rank)
    mine = full[:, :, start:stop].contiguous()
    return [layer.clone() if apart else layer for layer in mine]


def mover(layers: list[torch.Tensor], rank: int, ranks: int) -> CpuMover:
    start, stop = shape(ranks).heads_of(rank)
    return CpuMover(KVBlocks(layers, LAYOUT, stop - start), LAYOUT, start)


KEYS = [bytes([n]) * 32 for n in range(1, 6)]
SLOTS = [n * PAGES for n in (0, 1, 2, 9, 5)]
FROM = [1, 2, 3, 10, 6]
INTO = [8, 4, 5, 6, 11]


def save(memory: MappedSlab, full: torch.Tensor, ranks: int, *, apart: bool = False) -> list[Location]:
    sums: list[list[int]] = [[] for _ in KEYS]
    for rank in range(ranks):
        layers = rank_layers(full, rank, ranks, apart=apart)
        for mine, whole in zip(mover(layers, rank, ranks).save(memory, KEYS, SLOTS, FROM), sums, strict=True):
            whole += mine
    return [Location(slot, tuple_) for slot, tuple_ in zip(SLOTS, sums, strict=True)]


@pytest.mark.parametrize("saving", [1, 2, 4])
@pytest.mark.parametrize("loading", [1, 2, 4])
def test_what_any_number_of_ranks_saved_any_number_loads_bit_for_bit(saving: int, loading: int) -> None:
    memory, full = slab(), global_kv()
    locations = save(memory, full, saving)
    for rank in range(loading):
        empty = torch.zeros_like(full)
        layers = rank_layers(empty, rank, loading)
        assert mover(layers, rank, loading).load(memory, KEYS, locations, INTO, lambda: True) == [GOOD] * 5
        start, stop = shape(loading).heads_of(rank)
        for source, target in zip(FROM, INTO, strict=True):
            for layer in range(LAYOUT.layers):
                assert torch.equal(layers[layer][target], full[layer, source, start:stop])
        untouched = set(range(BLOCKS)) - set(INTO)
        assert all(not layer[block].any() for layer in layers for block in untouched)


def test_a_mover_writes_into_the_slab_it_is_given_also_after_another_one() -> None:
    full, old, new = global_kv(), slab(), slab()
    one = mover(rank_layers(full, 0, 1), 0, 1)
    for memory in (old, new, old):
        memory.view[:] = bytes(len(memory.view))
        one.save(memory, KEYS, SLOTS, FROM)
        assert any(memory.block(SLOTS[0]))
    assert bytes(old.view) == bytes(new.view)


def test_layers_that_lie_apart_make_the_same_bytes_and_sums() -> None:
    full, one, other = global_kv(), slab(), slab()
    assert save(one, full, 2) == save(other, full, 2, apart=True)
    assert bytes(one.view) == bytes(other.view)


def test_a_slot_holds_head_layer_token_content() -> None:
    memory, full = slab(), global_kv()
    save(memory, full, 2)
    canonical = full[:, FROM[3]].permute(1, 0, 2, 3).contiguous().numpy().tobytes()
    assert bytes(memory.block(SLOTS[3])) == canonical


def test_a_flipped_byte_spoils_its_block_alone_and_only_for_the_rank_that_reads_it() -> None:
    memory, full = slab(), global_kv()
    locations = save(memory, full, 1)
    head_of_rank_1 = 3
    memory.view[memory.offset(SLOTS[2]) + head_of_rank_1 * LAYOUT.head_bytes + 5] ^= 1
    outcomes = []
    for rank in range(2):
        layers = rank_layers(torch.zeros_like(full), rank, 2)
        outcomes.append(mover(layers, rank, 2).load(memory, KEYS, locations, INTO, lambda: True))
        assert layers[0][INTO[2]].any() == (rank == 0), "a spoilt block never reaches the KV tensor"
    assert outcomes == [[GOOD] * 5, [GOOD, GOOD, MISMATCH, GOOD, GOOD]]


def test_good_bytes_under_an_other_key_are_a_mismatch() -> None:
    memory, full = slab(), global_kv()
    locations = save(memory, full, 1)
    foreign = [KEYS[1], *KEYS[1:]]
    layers = rank_layers(torch.zeros_like(full), 0, 1)
    outcomes = mover(layers, 0, 1).load(memory, foreign, locations, INTO, lambda: True)
    assert outcomes == [MISMATCH, GOOD, GOOD, GOOD, GOOD]


def test_after_the_deadline_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, full = slab(), global_kv()
    locations = save(memory, full, 1)
    monkeypatch.setattr("interlock.connectors.vllm.movers.STAGING_BYTES_MAX", 2 * LAYOUT.block_bytes)
    layers = rank_layers(torch.zeros_like(full), 0, 1)
    answers = iter([True, False])
    outcomes = mover(layers, 0, 1).load(memory, KEYS, locations, INTO, lambda: next(answers))
    assert outcomes == [GOOD, GOOD, LATE, LATE, LATE]
    assert not layers[0][INTO[2]].any()


def test_bfloat16_survives_the_way_through_a_slot() -> None:
    layout = msgspec.structs.replace(LAYOUT, dtype="bfloat16")
    memory = slab(layout=layout)
    full = global_kv(dtype=torch.bfloat16)
    layers = list(full.contiguous())
    sums = CpuMover(KVBlocks(layers, layout, 4), layout, 0).save(memory, KEYS, SLOTS, FROM)
    into = [torch.zeros_like(layer) for layer in layers]
    locations = [Location(slot, one) for slot, one in zip(SLOTS, sums, strict=True)]
    assert (
        CpuMover(KVBlocks(into, layout, 4), layout, 0).load(memory, KEYS, locations, INTO, lambda: True)
        == [GOOD] * 5
    )
    assert torch.equal(into[1][INTO[0]], layers[1][FROM[0]])


def test_a_slot_outside_the_slab_is_an_error_not_a_write() -> None:
    memory, full = slab(2), global_kv()
    with pytest.raises(IndexError, match="slab"):
        mover(rank_layers(full, 0, 1), 0, 1).save(memory, KEYS[:1], [2 * PAGES], [1])


def test_runs_are_long_where_steps_are_constant_and_cover_everything_in_order() -> None:
    random = np.random.default_rng(3)
    for _ in range(300):
        count = int(random.integers(1, 12))
        slots = [int(n) for n in random.integers(0, 9, count)]
        blocks = [int(n) for n in random.integers(0, 9, count)]
        covered = []
        for run in runs(slots, blocks):
            for n in range(run.stop - run.start):
                covered.append((slots[run.start] + n * run.slot_step, blocks[run.start] + n * run.block_step))
        assert covered == list(zip(slots, blocks, strict=True))
    assert len(list(runs([0, 2, 4, 6], [5, 6, 7, 8]))) == 1


def test_layers_of_one_storage_are_one_view_and_others_are_none() -> None:
    full = global_kv()
    view = stacked_view(list(full))
    assert view is not None
    assert view.data_ptr() == full.data_ptr()
    assert torch.equal(view, full)
    assert stacked_view([layer.clone() for layer in full]) is None
    assert stacked_view([full[0], full[2], full[1]]) is None


def test_tensors_that_the_layout_does_not_describe_are_refused() -> None:
    full = global_kv()
    with pytest.raises(UnknownTensorsError, match="3 layers"):
        KVBlocks(list(full)[:2], LAYOUT, 4)
    with pytest.raises(UnknownTensorsError, match="block size"):
        KVBlocks(list(full), LAYOUT, 2)
    with pytest.raises(UnknownTensorsError, match="float16"):
        KVBlocks(list(full.half()), LAYOUT, 4)


def test_of_ranks_that_hold_the_same_head_the_lowest_writes_it() -> None:
    assert shape(8).heads_of(5) == (2, 3), "of eight ranks and four heads, ranks 4 and 5 hold head 2"
    assert shape(8).shard(5).area == 0

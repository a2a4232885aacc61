"""Slots and KV tensors: what any number of ranks saves, any number loads, bit for bit, and every doubt is seen."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from interlock.connectors.vllm.config import EngineShape
from interlock.connectors.vllm.movers import CpuMover
from interlock.connectors.vllm.tensors import KVBlocks, UnknownTensorsError, stacked_view
from interlock.core import joins
from interlock.core.joins import JoinName
from interlock.core.layouts import KVLayout, cuts_of
from interlock.core.limits import SLOT_GRAIN_BYTES
from interlock.core.packed_sums import pack_sums
from interlock.host.memory import create_memory
from interlock.store.mapping import MappedSlab
from interlock.store.rank_slots import FOREIGN, GOOD, LATE, MISMATCH, runs
from interlock.wire.locations import Location

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


def stored(
    one: CpuMover, memory: MappedSlab, keys: list[bytes], slots: list[int], blocks: list[int]
) -> list[list[int]]:
    """What a saver does with a mover, in one thread."""
    sums, staging = [], one.staging()
    for batch in one.batches(len(blocks)):
        some = slice(batch.start, batch.stop)
        one.gather(blocks[some], staging)
        sums += one.put(memory, keys[some], slots[some], staging)
    return sums


def save(memory: MappedSlab, full: torch.Tensor, ranks: int, *, apart: bool = False) -> list[Location]:
    sums: list[list[int]] = [[] for _ in KEYS]
    for rank in range(ranks):
        layers = rank_layers(full, rank, ranks, apart=apart)
        found = stored(mover(layers, rank, ranks), memory, KEYS, SLOTS, FROM)
        for mine, whole in zip(found, sums, strict=True):
            whole += mine
    return [Location(slot, pack_sums(tuple_)) for slot, tuple_ in zip(SLOTS, sums, strict=True)]


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
        stored(one, memory, KEYS, SLOTS, FROM)
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
    monkeypatch.setattr("interlock.store.rank_slots.STAGING_BYTES_MAX", 2 * LAYOUT.block_bytes)
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
    sums = stored(CpuMover(KVBlocks(layers, layout, 4), layout, 0), memory, KEYS, SLOTS, FROM)
    into = [torch.zeros_like(layer) for layer in layers]
    locations = [Location(slot, pack_sums(one)) for slot, one in zip(SLOTS, sums, strict=True)]
    assert (
        CpuMover(KVBlocks(into, layout, 4), layout, 0).load(memory, KEYS, locations, INTO, lambda: True)
        == [GOOD] * 5
    )
    assert torch.equal(into[1][INTO[0]], layers[1][FROM[0]])


def test_a_slot_outside_the_slab_is_an_error_not_a_write() -> None:
    memory, full = slab(2), global_kv()
    with pytest.raises(IndexError, match="slab"):
        stored(mover(rank_layers(full, 0, 1), 0, 1), memory, KEYS[:1], [2 * PAGES], [1])


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
    with pytest.raises(UnknownTensorsError, match="layers 0 to 3"):
        KVBlocks(list(full)[:2], LAYOUT, 4)
    with pytest.raises(UnknownTensorsError, match="block size"):
        KVBlocks(list(full), LAYOUT, 2)
    with pytest.raises(UnknownTensorsError, match="float16"):
        KVBlocks(list(full.half()), LAYOUT, 4)


def test_of_ranks_that_hold_the_same_head_the_lowest_writes_it() -> None:
    assert shape(8).heads_of(5) == (2, 3), "of eight ranks and four heads, ranks 4 and 5 hold head 2"
    assert shape(8).shard(5).area == 0


# --- pipelines, scales, latent attention ---------------------------------------------------------------------------------

STAGES = {1: ((0, 3),), 2: ((0, 2), (2, 3)), 3: ((0, 1), (1, 2), (2, 3))}


def part(full: torch.Tensor, stage: tuple[int, int], heads: tuple[int, int]) -> list[torch.Tensor]:
    return list(full[stage[0] : stage[1], :, heads[0] : heads[1]].contiguous())


def grid(pipeline: int, tensor: int, layout: KVLayout = LAYOUT) -> EngineShape:
    stages = STAGES[pipeline] if pipeline > 1 else ()
    cut = msgspec.structs.replace(layout, cuts=cuts_of(stages))
    return EngineShape(
        layout=cut,
        ranks=pipeline * tensor,
        name="e",
        life="l",
        model="m",
        revision=None,
        variant=(),
        stages=stages,
    )


def grid_mover(engine: EngineShape, rank: int, layers: list[torch.Tensor], **more: Any) -> CpuMover:
    start, stop = engine.heads_of(rank)
    kv = KVBlocks(layers, engine.layout, stop - start, stage=engine.stage_of(rank), **more)
    return CpuMover(kv, engine.layout, start)


def grid_save(memory: MappedSlab, full: torch.Tensor, engine: EngineShape) -> list[Location]:
    """Saves with every rank, and joins their checksums as the node does."""
    shards = tuple(engine.shard(rank) for rank in range(engine.ranks))
    name = JoinName("s", 1)
    layout = engine.layout
    events: list[Any] = [
        joins.Open(name, len(KEYS), shards, layout.layers, layout.heads, deadline_s=9.0, cuts=layout.cuts)
    ]
    for rank, shard in enumerate(shards):
        if shard.area:
            layers = part(full, engine.stage_of(rank), engine.heads_of(rank))
            sums = stored(grid_mover(engine, rank, layers), memory, KEYS, SLOTS, FROM)
            events.append(joins.Report(name, rank, (True,) * len(KEYS), tuple(map(pack_sums, sums))))
    state, effects = joins.Join(name), ()  # type: tuple[joins.Join, tuple[Any, ...]]
    for event in events:
        state, effects = joins.transition(state, event)
    (completed,) = effects
    return [Location(slot, sums, layout.cuts) for slot, sums in zip(SLOTS, completed.checksums, strict=True)]


@pytest.mark.parametrize("saving", [(1, 1), (2, 1), (2, 2), (3, 4), (1, 8), (2, 8)])
@pytest.mark.parametrize("loading", [(1, 1), (2, 2), (3, 1), (2, 8)])
def test_what_a_grid_of_pipeline_and_tensor_ranks_saved_any_other_grid_loads(
    saving: tuple[int, int], loading: tuple[int, int]
) -> None:
    memory, full = slab(), global_kv()
    locations = grid_save(memory, full, grid(*saving))
    reader = grid(*loading)
    for rank in range(reader.ranks):
        stage, heads = reader.stage_of(rank), reader.heads_of(rank)
        layers = part(torch.zeros_like(full), stage, heads)
        assert (
            grid_mover(reader, rank, layers).load(memory, KEYS, locations, INTO, lambda: True) == [GOOD] * 5
        )
        for source, target in zip(FROM, INTO, strict=True):
            for index, layer in enumerate(range(*stage)):
                assert torch.equal(layers[index][target], full[layer, source, heads[0] : heads[1]])


def test_blocks_of_one_load_may_be_cut_differently() -> None:
    full, one, two = global_kv(), slab(), slab()
    whole, cut = grid_save(one, full, grid(1, 1)), grid_save(two, full, grid(3, 2))
    for slot in SLOTS[1::2]:
        one.block(slot)[:] = two.block(slot)
    mixed = [whole[n] if n % 2 == 0 else cut[n] for n in range(5)]
    reader = grid(2, 1)
    layers = part(torch.zeros_like(full), (2, 3), (0, 4))
    assert grid_mover(reader, 1, layers).load(one, KEYS, mixed, INTO, lambda: True) == [GOOD] * 5
    assert torch.equal(layers[0][INTO[1]], full[2, FROM[1]])


def test_a_stage_does_not_mind_a_flipped_byte_in_layers_that_nobody_cut_apart_from_its_own() -> None:
    """It cannot: the group's one checksum covers them. What was cut apart it does not even read."""
    full = global_kv()
    for pipeline, expected in ((1, MISMATCH), (2, GOOD)):
        memory = slab()
        locations = grid_save(memory, full, grid(pipeline, 1))
        memory.view[memory.offset(SLOTS[0])] ^= 1  # layer 0 of head 0
        layers = part(torch.zeros_like(full), (2, 3), (0, 4))
        found = grid_mover(grid(2, 1), 1, layers).load(memory, KEYS, locations, INTO, lambda: True)
        assert found == [expected] + [GOOD] * 4


def test_cuts_that_are_none_of_this_model_are_refused_before_anything_is_read() -> None:
    memory, full = slab(), global_kv()
    locations = [Location(one.slot, one.sums, [7]) for one in grid_save(memory, full, grid(1, 1))]
    layers = part(torch.zeros_like(full), (0, 3), (0, 4))
    with pytest.raises(ValueError, match="none of 3 layers"):
        grid_mover(grid(1, 1), 0, layers).load(memory, KEYS, locations, INTO, lambda: True)


FP8 = msgspec.structs.replace(LAYOUT, dtype="uint8", scales=2)
SCALES = [[0.5, 2.0], [1.0, 1.0], [0.25, 3.0]]


def quantised(seed: int = 0) -> torch.Tensor:
    return (global_kv(seed) * 40).clamp(-127, 127).to(torch.int8).view(torch.uint8)


def test_scales_lie_behind_their_layer_are_summed_up_with_it_and_come_back_with_it() -> None:
    memory, full = slab(layout=FP8), quantised()
    saver = grid_mover(grid(1, 1, FP8), 0, list(full), scales=SCALES)
    sums = stored(saver, memory, KEYS, SLOTS, FROM)
    locations = [Location(slot, pack_sums(one)) for slot, one in zip(SLOTS, sums, strict=True)]
    block = np.frombuffer(memory.block(SLOTS[0]), dtype=np.uint8).reshape(4, 3, FP8.layer_bytes)
    assert block[2, 1, -8:].view(np.float32).tolist() == SCALES[1]
    assert bytes(block[2, 1, :-8]) == full[1, FROM[0], 2].numpy().tobytes()
    for rank in range(2):  # scales are per layer, and each head carries them: any degree finds its own
        reader = grid(1, 2, FP8)
        layers = part(torch.zeros_like(full), (0, 3), reader.heads_of(rank))
        mine = grid_mover(reader, rank, layers, scales=SCALES)
        assert mine.load(memory, KEYS, locations, INTO, lambda: True) == [GOOD] * 5
        assert torch.equal(layers[1][INTO[0]], full[1, FROM[0], slice(*reader.heads_of(rank))])
    memory.view[memory.offset(SLOTS[0]) + FP8.layer_bytes - 1] ^= 1  # a scale's byte
    again = grid_mover(grid(1, 1, FP8), 0, list(torch.zeros_like(full)), scales=SCALES)
    assert again.load(memory, KEYS, locations, INTO, lambda: True) == [MISMATCH] + [GOOD] * 4


def test_bytes_that_were_quantised_with_other_scales_are_left_alone_and_not_called_broken() -> None:
    memory, full = slab(layout=FP8), quantised()
    sums = stored(grid_mover(grid(1, 1, FP8), 0, list(full), scales=SCALES), memory, KEYS, SLOTS, FROM)
    locations = [Location(slot, pack_sums(one)) for slot, one in zip(SLOTS, sums, strict=True)]
    layers = list(torch.zeros_like(full))
    other = grid_mover(grid(1, 1, FP8), 0, layers, scales=[[0.5, 2.0], [1.0, 1.5], [0.25, 3.0]])
    assert other.load(memory, KEYS, locations, INTO, lambda: True) == [FOREIGN] * 5
    assert not any(layer.any() for layer in layers)


@pytest.mark.parametrize("scales", [None, [[1.0, 1.0]] * 2, [[1.0, float("nan")]] * 3])
def test_quantised_kv_without_a_scale_for_every_layer_is_refused(scales: Any) -> None:
    with pytest.raises(UnknownTensorsError, match="scales a layer"):
        KVBlocks(list(quantised()), FP8, 4, scales=scales)


@pytest.mark.parametrize("headless", [False, True])
def test_a_latent_cache_is_written_by_one_rank_and_read_by_all(headless: bool) -> None:
    """MLA: one latent vector a token, replicated on every tensor-parallel rank; some backends leave its head out."""
    layout = KVLayout(layers=3, heads=1, block_tokens=8, content=36, dtype="bfloat16")
    memory = slab(layout=layout)
    full = torch.randn((3, BLOCKS, 1, 8, 36), generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)

    def shaped(tensors: torch.Tensor) -> list[torch.Tensor]:
        return [layer[:, 0] if headless else layer for layer in tensors]

    engine = grid(2, 4, layout)
    sums: list[list[int]] = [[] for _ in KEYS]
    for rank in range(8):
        if engine.writes(rank):
            one = grid_mover(engine, rank, shaped(full[slice(*engine.stage_of(rank))]))
            for mine, whole in zip(stored(one, memory, KEYS, SLOTS, FROM), sums, strict=True):
                whole += mine
    assert [rank for rank in range(8) if engine.writes(rank)] == [0, 4]
    locations = [Location(slot, pack_sums(one), [2]) for slot, one in zip(SLOTS, sums, strict=True)]
    for reader, rank in ((grid(1, 1, layout), 0), (grid(1, 4, layout), 3), (engine, 6)):
        empty = torch.zeros_like(full)[slice(*reader.stage_of(rank))]
        one = grid_mover(reader, rank, shaped(empty))
        assert one.load(memory, KEYS, locations, INTO, lambda: True) == [GOOD] * 5
        assert torch.equal(empty[0, INTO[0]], full[reader.stage_of(rank)[0], FROM[0]])

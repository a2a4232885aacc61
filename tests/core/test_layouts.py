"""Blocks are cut alike whatever the number of ranks, and shards cover them exactly once (hazards W6)."""

from typing import Any

import msgspec
import pytest

from interlock.core.layouts import (
    EMPTY_SHARD,
    KVLayout,
    Shard,
    covering_span,
    cuts_of,
    grid_shards,
    groups_within,
    layer_groups,
    shard_of_rank,
    tiles,
)
from interlock.core.limits import HEADS_MAX, LAYERS_MAX, SCALES_MAX

LAYOUT = KVLayout(layers=2, heads=4, block_tokens=32, content=128, dtype="float32")


def test_a_heads_bytes_are_its_layers_tokens_and_elements() -> None:
    assert LAYOUT.head_bytes == 2 * 32 * 128 * 4
    assert LAYOUT.block_bytes == 4 * LAYOUT.head_bytes


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("dtype", "float12", "float12"),
        ("layers", 0, "0 layers"),
        ("layers", LAYERS_MAX + 1, "outside the limits"),
        ("heads", 0, "0 heads"),
        ("heads", HEADS_MAX + 1, "outside the limits"),
        ("block_tokens", 0, "at least one token"),
        ("content", 0, "one element"),
    ],
)
def test_an_impossible_layout_is_refused_and_named(field: str, value: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        msgspec.structs.replace(LAYOUT, **{field: value})


def test_the_largest_layout_within_the_limits_is_accepted() -> None:
    largest = msgspec.structs.replace(LAYOUT, layers=LAYERS_MAX, heads=HEADS_MAX, block_tokens=1, content=1)
    assert largest.heads == HEADS_MAX


@pytest.mark.parametrize("field", ["layers", "heads", "block_tokens", "content"])
def test_layouts_that_differ_anywhere_have_other_digests(field: str) -> None:
    other = msgspec.structs.replace(LAYOUT, **{field: getattr(LAYOUT, field) + 1})
    assert other.digest() != LAYOUT.digest()
    assert msgspec.structs.replace(LAYOUT, dtype="float16").digest() != LAYOUT.digest()
    assert msgspec.structs.replace(LAYOUT).digest() == LAYOUT.digest()


@pytest.mark.parametrize(("ranks", "heads"), [(1, 1), (1, 8), (2, 8), (8, 8), (8, 4), (8, 1), (4, 2)])
def test_the_shards_of_all_ranks_tile_the_block_whether_heads_are_split_or_replicated(
    ranks: int, heads: int
) -> None:
    shards = [shard_of_rank(rank, ranks, layers=3, heads=heads) for rank in range(ranks)]
    assert tiles(shards, layers=3, heads=heads)
    assert sum(shard.area for shard in shards) == 3 * heads


def test_of_ranks_with_the_same_head_the_lowest_writes_it() -> None:
    shards = [shard_of_rank(rank, 4, layers=3, heads=2) for rank in range(4)]
    assert shards == [Shard(0, 3, 0, 1), EMPTY_SHARD, Shard(0, 3, 1, 2), EMPTY_SHARD]


@pytest.mark.parametrize(("rank", "ranks", "heads"), [(-1, 2, 4), (2, 2, 4), (0, 3, 4), (0, 6, 4)])
def test_ranks_that_cannot_share_the_heads_are_refused(rank: int, ranks: int, heads: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        shard_of_rank(rank, ranks, layers=3, heads=heads)


@pytest.mark.parametrize(
    "shards",
    [
        [Shard(0, 2, 0, 2)],  # half is missing
        [Shard(0, 2, 0, 3), Shard(0, 2, 2, 4)],  # a head twice
        [Shard(0, 2, 0, 4), Shard(0, 2, 0, 4)],
        [Shard(0, 2, 0, 5)],  # outside
        [Shard(-1, 1, 0, 4)],
        [Shard(0, 2, 0, 2), Shard(0, 1, 1, 4)],  # the right area in the wrong place
        [],
    ],
)
def test_shards_that_do_not_cover_the_block_exactly_once_do_not_tile_it(shards: list[Shard]) -> None:
    assert not tiles(shards, layers=2, heads=4)


def test_rectangles_that_only_touch_do_not_overlap_and_empty_ones_never_do() -> None:
    quarters = [Shard(0, 1, 0, 2), Shard(1, 2, 0, 2), Shard(0, 1, 2, 4), Shard(1, 2, 2, 4)]
    assert tiles(quarters, layers=2, heads=4)
    assert tiles(quarters[::-1], layers=2, heads=4)
    assert not EMPTY_SHARD.overlaps(quarters[0])
    assert not quarters[0].overlaps(EMPTY_SHARD)
    assert Shard(0, 2, 0, 4).overlaps(quarters[3])


# --- layer groups and pipelines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(0,), (2,), (1, 1), (3,), (-1,)])
def test_cuts_that_do_not_ascend_within_the_layers_are_refused(cuts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="layer groups begin at"):
        msgspec.structs.replace(LAYOUT, cuts=cuts)


def test_where_writers_cut_a_block_changes_neither_its_bytes_nor_its_key() -> None:
    cut = msgspec.structs.replace(LAYOUT, cuts=(1,))
    assert (cut.digest(), cut.block_bytes) == (LAYOUT.digest(), LAYOUT.block_bytes)


def test_scales_lie_behind_each_layer_and_change_the_key() -> None:
    scaled = msgspec.structs.replace(LAYOUT, dtype="uint8", scales=2)
    assert scaled.layer_bytes == 32 * 128 + 8
    assert scaled.digest() != msgspec.structs.replace(scaled, scales=0).digest()
    with pytest.raises(ValueError, match="scales per layer"):
        msgspec.structs.replace(LAYOUT, scales=SCALES_MAX + 1)


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("stages", [((0, 5),), ((0, 2), (2, 5)), ((0, 1), (1, 4), (4, 5))])
def test_a_grid_of_stages_and_tensor_ranks_tiles_the_block(stages: tuple[Any, ...], tensor: int) -> None:
    shards = grid_shards(stages, tensor, heads=4)
    assert len(shards) == len(stages) * tensor
    assert tiles(shards, layers=5, heads=4)
    for shard in shards:
        if shard.area:
            assert len(groups_within(5, cuts_of(stages), shard.layer_start, shard.layer_stop)) == 1


def test_layers_are_covered_by_whole_groups_and_never_by_more_than_they_touch() -> None:
    cuts = (2, 5)
    spans = layer_groups(8, cuts)
    assert spans == ((0, 2), (2, 5), (5, 8))
    for start in range(8):
        for stop in range(start + 1, 9):
            first, last = covering_span(8, cuts, start, stop)
            touched = [span for span in spans if span[0] < stop and start < span[1]]
            assert (first, last) == (touched[0][0], touched[-1][1])
            assert len(groups_within(8, cuts, first, last)) == len(touched)


@pytest.mark.parametrize("cuts", [(9,), (5, 2), (0,)])
def test_cuts_from_outside_that_are_none_are_refused_before_they_decide_what_is_read(
    cuts: tuple[int, ...],
) -> None:
    with pytest.raises(ValueError, match="none of 8 layers"):
        covering_span(8, cuts, 0, 8)


def test_a_part_of_a_group_has_no_checksum() -> None:
    with pytest.raises(ValueError, match="in two"):
        groups_within(8, (4,), 0, 3)

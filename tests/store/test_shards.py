"""Real ranks that hold layers and heads fill one block together; whoever holds other rectangles reads it (hazards W6)."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from interlock.core.errors import ChannelFault
from interlock.core.layouts import KVLayout, Shard, cuts_of, grid_shards

LAYOUT = KVLayout(layers=4, heads=4, block_tokens=4, content=16, dtype="float32")
STAGES = {1: ((0, 4),), 2: ((0, 2), (2, 4)), 3: ((0, 1), (1, 3), (3, 4)), 4: ((0, 1), (1, 2), (2, 3), (3, 4))}
FILL = 3


def engine(
    rig: Any, pipeline: int, tensor: int, layout: KVLayout = LAYOUT
) -> tuple[Any, list[Any], tuple[Shard, ...]]:
    """A scheduler and a real process a rank."""
    stages = STAGES[pipeline]
    cut = msgspec.structs.replace(layout, cuts=cuts_of(stages))
    shards = grid_shards(stages, tensor, heads=cut.heads)
    name = f"pp{pipeline}tp{tensor}"
    attach = rig.attach(0, 1, name, 1, cut)
    ranks = [
        rig.shard_rank(msgspec.structs.replace(attach, rank=rank, ranks=len(shards), shard=shard))
        for rank, shard in enumerate(shards)
    ]
    return rig.scheduler(len(shards), engine=name, layout=cut), ranks, shards


@pytest.mark.parametrize(
    ("saving", "loading"),
    [((1, 2), [(1, 1), (1, 4)]), ((2, 1), [(1, 1), (1, 4)]), ((2, 2), [(1, 1), (3, 1)]), ((1, 1), [(2, 2)])],
)
def test_what_some_ranks_saved_any_others_load_byte_for_byte(
    rig: Any, tools: Any, saving: tuple[int, int], loading: list[tuple[int, int]]
) -> None:
    node = rig.node()
    scheduler, ranks, _ = engine(rig, *saving)
    keys, parents = tools.make_keys(3)
    grant = scheduler.start_write("s", 1, keys, parents)
    for number, rank in enumerate(reversed(ranks)):
        assert scheduler.match(keys).locations == [], "nothing is seen before the last rank reported"
        rank.report(grant, [True] * 3, rank.write_shard(grant, keys, FILL))
        assert rank.delivered(tools.PATIENCE_S), number
    assert len(scheduler.match(keys).locations) == 3
    assert node.slots()["published"] == 3
    for other in loading:
        their_scheduler, their_ranks, _ = engine(rig, *other)
        match = their_scheduler.match(keys)
        assert [location.cuts for location in match.locations] == [cuts_of(STAGES[saving[0]])] * 3
        assert [rank.read_shard(match, keys, FILL) for rank in their_ranks] == [[True] * 3] * len(their_ranks)
        assert their_ranks[0].read_shard(match, keys, FILL + 1) == [False] * 3, "the comparison can fail"


def test_replicated_heads_are_written_by_one_rank_and_the_other_promises(rig: Any, tools: Any) -> None:
    node = rig.node()
    layout = msgspec.structs.replace(LAYOUT, heads=1, content=64)
    scheduler, ranks, shards = engine(rig, 2, 2, layout)
    assert [shard.area for shard in shards] == [2, 0, 2, 0]
    keys, parents = tools.make_keys(1)
    grant = scheduler.start_write("s", 1, keys, parents)
    for rank, shard in zip(ranks, shards, strict=True):
        if shard.area:
            rank.report(grant, [True], rank.write_shard(grant, keys, FILL))
            assert rank.delivered(tools.PATIENCE_S)
    assert node.slots()["published"] == 0, "replicas were given the slot too, and have not promised"
    for rank, shard in zip(ranks, shards, strict=True):
        if not shard.area:
            rank.report(grant, [], [])
            assert rank.delivered(tools.PATIENCE_S)
    match = scheduler.match(keys)
    assert [rank.read_shard(match, keys, FILL) for rank in (ranks[0], ranks[2])] == [[True]] * 2


def test_a_flipped_byte_is_seen_by_the_ranks_that_read_its_layer_group_and_by_no_other(
    rig: Any, tools: Any
) -> None:
    rig.node()
    scheduler, ranks, _ = engine(rig, 2, 2)
    keys, parents = tools.make_keys(1)
    grant = scheduler.start_write("s", 1, keys, parents)
    for rank in ranks:
        rank.report(grant, [True], rank.write_shard(grant, keys, FILL))
        assert rank.delivered(tools.PATIENCE_S)
    match = scheduler.match(keys)
    ranks[0].scribble(match.slab, match.locations[0].slot, 0xEE)  # the first byte: layer 0 of head 0
    assert [rank.read_shard(match, keys, FILL) for rank in ranks] == [[False], [True], [True], [True]]
    _, (whole,), _ = engine(rig, 1, 1)
    assert whole.read_shard(match, keys, FILL) == [False]


@pytest.mark.parametrize(
    ("shard", "cuts", "says"),
    [
        (Shard(0, 2, 0, 4), (), "sum up no part"),
        (Shard(0, 3, 0, 4), (2,), "sum up no part"),
        (Shard(0, 4, 0, 5), (), "heads beyond"),
    ],
)
def test_a_rectangle_that_no_checksum_fits_is_refused_at_attach(
    rig: Any, shard: Shard, cuts: tuple[int, ...], says: str
) -> None:
    rig.node()
    layout = msgspec.structs.replace(LAYOUT, cuts=cuts)
    attach = msgspec.structs.replace(rig.attach(0, 1, "e", 1, layout), ranks=2, shard=shard)
    with pytest.raises(ChannelFault, match=says):
        rig.channel().request(attach, 5)


def test_two_ranks_that_both_claim_a_layer_are_refused_before_anything_is_written(rig: Any) -> None:
    """hazards W6: the slower of two writers of one rectangle writes after publication."""
    rig.node()
    layout = msgspec.structs.replace(LAYOUT, cuts=(2,))
    first = msgspec.structs.replace(rig.attach(0, 1, "e", 1, layout), ranks=2, shard=Shard(0, 4, 0, 4))
    second = msgspec.structs.replace(first, rank=1, shard=Shard(2, 4, 0, 4))
    rig.channel().request(first, 5)
    with pytest.raises(ChannelFault, match="exactly once"):
        rig.channel().request(second, 5)


def test_ranks_that_disagree_on_the_pipelines_cuts_are_no_one_engine(rig: Any) -> None:
    rig.node()
    layout = msgspec.structs.replace(LAYOUT, cuts=(2,))
    first = msgspec.structs.replace(rig.attach(0, 1, "e", 1, layout), ranks=2, shard=Shard(0, 2, 0, 4))
    rig.channel().request(first, 5)
    uncut = msgspec.structs.replace(first, rank=1, layout=LAYOUT, shard=Shard(0, 0, 0, 0))
    with pytest.raises(ChannelFault, match="where others of that life"):
        rig.channel().request(uncut, 5)

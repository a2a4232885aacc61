"""Who may attach as what."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from interlock.core.errors import ChannelFault
from interlock.core.layouts import KVLayout
from interlock.wire.store_messages import Clear, Match, Report, StartWrite, Withdraw


def refused(channel: Any, body: Any) -> str:
    with pytest.raises(ChannelFault) as fault:
        channel.request(body, 5)
    return fault.value.code


def test_who_has_not_attached_may_look_but_not_write(rig: Any, tools: Any) -> None:
    rig.node()
    channel = rig.channel()
    keys, parents = tools.make_keys(1)
    assert channel.request(Match(keys), 5).locations == []
    assert refused(channel, StartWrite("s", 1, keys, parents)) == "not_attached"
    assert refused(channel, Report("s", 1, 0, 1, 1, [], [])) == "not_attached"
    assert refused(channel, Withdraw(keys, [0])) == "not_attached"


def test_a_scheduler_does_not_report_and_a_rank_does_not_start(rig: Any, tools: Any) -> None:
    rig.node()
    keys, parents = tools.make_keys(1)
    scheduler, rank = rig.channel(), rig.channel()
    scheduler.request(rig.attach(None, 1, "e", 1, tools.LAYOUT), 5)
    rank.request(rig.attach(0, 1, "e", 1, tools.LAYOUT), 5)
    assert refused(scheduler, Report("s", 1, 0, 1, 1, [], [])) == "not_rank"
    assert refused(rank, StartWrite("s", 1, keys, parents)) == "not_scheduler"
    assert refused(rank, rig.attach(0, 1, "e", 1, tools.LAYOUT)) == "attached_already"


def test_a_rank_belongs_to_its_process_until_that_is_gone(rig: Any, tools: Any) -> None:
    rig.node()
    rank = rig.rank(engine="e")
    channel = rig.channel()
    attach = rig.attach(0, 1, "e", 1, tools.LAYOUT)
    assert refused(channel, attach) == "rank_taken"
    rank.kill()

    def attached() -> bool:
        try:
            return bool(channel.request(attach, 5))
        except ChannelFault:
            return False

    tools.eventually(attached, "the rank is free by the exit of its process")


def test_an_older_life_is_refused(rig: Any, tools: Any) -> None:
    rig.node()
    rig.channel().request(rig.attach(None, 1, "e", 5, tools.LAYOUT), 5)
    assert refused(rig.channel(), rig.attach(0, 1, "e", 4, tools.LAYOUT)) == "stale_incarnation"


def test_ranks_of_one_life_agree_on_layout_and_number(rig: Any, tools: Any) -> None:
    rig.node()
    rig.channel().request(rig.attach(0, 2, "e", 1, tools.LAYOUT), 5)
    other = msgspec.structs.replace(tools.LAYOUT, layers=1)
    assert refused(rig.channel(), rig.attach(1, 2, "e", 1, other)) == "layout_mismatch"
    assert refused(rig.channel(), rig.attach(0, 1, "e", 1, tools.LAYOUT)) == "layout_mismatch"


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 2}, {"rank": -1}, {"ranks": 0, "rank": None}, {"engine": ""}, {"engine": "x" * 200},
        {"engine_incarnation": 0}, {"shard": (0, 1, 0, 4)}, {"shard": (0, 2, 0, 9)}, {"shard": (0, 2, -1, 4)},
    ],
)  # fmt: skip
def test_impossible_ranks_names_and_shards_are_refused(rig: Any, tools: Any, change: dict[str, Any]) -> None:
    rig.node()
    if "shard" in change:
        change["shard"] = tools.Shard(*change["shard"])
    attach = msgspec.structs.replace(rig.attach(0, 2, "e", 1, tools.LAYOUT), **change)
    assert refused(rig.channel(), attach) == "bad_attach"


def test_shards_that_do_not_tile_are_refused_when_the_last_rank_comes(rig: Any, tools: Any) -> None:
    rig.node()
    rig.channel().request(rig.attach(0, 2, "e", 1, tools.LAYOUT), 5)
    overlapping = msgspec.structs.replace(
        rig.attach(1, 2, "e", 1, tools.LAYOUT), shard=tools.Shard(0, 2, 1, 3)
    )
    assert refused(rig.channel(), overlapping) == "bad_attach"


def test_a_block_larger_than_the_slab_can_hold_is_refused(rig: Any, tools: Any) -> None:
    rig.node()
    huge = KVLayout(layers=64, heads=8, block_tokens=32, content=256, dtype="float32")
    assert refused(rig.channel(), rig.attach(0, 1, "e", 1, huge)) == "slab_too_small"


def test_a_reader_gets_memory_that_it_cannot_write(rig: Any, tools: Any) -> None:
    rig.node()
    scheduler, writer = rig.scheduler(engine="w"), rig.rank(engine="w")
    reader = rig.rank(engine="r", writes=False)
    keys, parents = tools.make_keys(2)
    grant = tools.save(scheduler, [writer], "s", keys, parents)
    assert (writer.writable(grant.slab), reader.writable(grant.slab)) == (True, False)
    assert reader.read(scheduler.match(keys), keys) == [1, 2]
    other = rig.scheduler(engine="r")
    assert other.start_write("s", 1, *tools.make_keys(1, start=99)) is None
    assert other.counts()["start_write_refused_read_only"] == 1


def test_a_rank_whose_heads_are_written_by_another_reports_nothing_and_is_waited_for(
    rig: Any, tools: Any
) -> None:
    """Two ranks share one head (MLA, few KV heads): the second may touch the slot until it promised."""
    node = rig.node()
    layout = KVLayout(layers=2, heads=1, block_tokens=4, content=32, dtype="float32")
    scheduler = rig.scheduler(2, layout=layout)
    ranks = [rig.rank(rank, 2, layout=layout) for rank in range(2)]
    keys, parents = tools.make_keys(1)
    grant = scheduler.start_write("s", 1, keys, parents)
    ranks[0].report(grant, [True], ranks[0].write(grant, keys, 1))
    assert ranks[0].delivered(tools.PATIENCE_S)
    assert scheduler.match(keys).locations == []
    ranks[1].report(grant, [], [])
    assert ranks[1].delivered(tools.PATIENCE_S)
    assert len(scheduler.match(keys).locations) == 1
    assert node.slots()["published"] == 1


def test_clear_forgets_what_is_published_and_spares_what_is_being_written(rig: Any, tools: Any) -> None:
    node = rig.node()
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(4)
    tools.save(scheduler, [rank], "s", keys[:2], parents[:2])
    grant = scheduler.start_write("t", 1, keys[2:], parents[2:])
    assert rig.channel().request(Clear(), 5).count == 2
    assert scheduler.match(keys).locations == []
    assert node.slots()["writing"] == 2
    rank.report(grant, [True] * 2, rank.write(grant, keys[2:], 1))
    assert rank.delivered(tools.PATIENCE_S)
    assert node.slots()["published"] == 2


def test_a_slab_is_mapped_ahead_of_its_use_and_not_a_byte_is_changed_by_it() -> None:
    from interlock.host.memory import create_memory, populate

    memory = create_memory("warm", 64 * 4096)
    try:
        memory.view[5], memory.view[9 * 4096] = 7, 8
        assert populate(memory.view[: 32 * 4096], writable=True)
        assert (memory.view[5], memory.view[9 * 4096], sum(memory.view)) == (7, 8, 15)
    finally:
        memory.close()

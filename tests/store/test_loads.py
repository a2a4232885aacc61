"""What a loader reads is what was saved for that key, or a miss; whatever became of the slot, the node, the memory."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest


def test_saved_by_two_ranks_loaded_by_one_and_by_four(rig: Any, tools: Any) -> None:
    rig.node()
    scheduler = rig.scheduler(2, engine="two")
    keys, parents = tools.make_keys(3)
    tools.save(scheduler, [rig.rank(rank, 2, engine="two") for rank in range(2)], "s", keys, parents)
    match = scheduler.match(keys)
    assert rig.rank(0, 1, engine="one").read(match, keys) == [1, 2, 3]
    four = [rig.rank(rank, 4, engine="four") for rank in range(4)]
    assert [rank.read(match, keys) for rank in four] == [[n, n + 1, n + 2] for n in (1, 17, 33, 49)]


def test_a_flipped_byte_is_a_miss_and_the_block_is_withdrawn(rig: Any, tools: Any) -> None:
    rig.node()
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(3)
    tools.save(scheduler, [rank], "s", keys, parents)
    match = scheduler.match(keys)
    slot = match.locations[1].slot
    rank.scribble(match.slab, slot, 0xFF)
    assert rank.read(match, keys) == [1, None, 3]
    rank.withdraw(match.slab, [keys[1]], [slot])
    assert rank.delivered(tools.PATIENCE_S)
    assert len(scheduler.match(keys).locations) == 1
    assert [item.index for item in scheduler.start_write("t", 1, keys, parents).grants] == [1]


def test_a_withdrawal_of_a_block_that_moved_on_is_void(rig: Any, tools: Any) -> None:
    rig.node()
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(1)
    tools.save(scheduler, [rank], "s", keys, parents)
    match = scheduler.match(keys)
    rank.withdraw(match.slab, keys, [match.locations[0].slot + 1])
    assert rank.delivered(tools.PATIENCE_S)
    assert len(scheduler.match(keys).locations) == 1


def test_only_the_rank_that_reads_the_flipped_head_notices(rig: Any, tools: Any) -> None:
    rig.node()
    scheduler, ranks = rig.scheduler(2), [rig.rank(0, 2), rig.rank(1, 2)]
    keys, parents = tools.make_keys(1)
    tools.save(scheduler, ranks, "s", keys, parents)
    match = scheduler.match(keys)
    ranks[1].scribble(match.slab, match.locations[0].slot, 0xFF)
    assert [rank.read(match, keys) for rank in ranks] == [[None], [33]]


def test_a_slot_reused_since_the_look_up_is_a_miss(rig: Any, tools: Any) -> None:
    """hazards x5: a checksum that stood in the slot would accept the foreign block."""
    rig.node(slab_bytes=16 * 4096)
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(1)
    tools.save(scheduler, [rank], "s", keys, parents)
    match = scheduler.match(keys)
    others, their_parents = tools.make_keys(16, start=1000)
    tools.save(scheduler, [rank], "t", others, their_parents, fill=77)
    assert match.locations[0].slot in {where.slot for where in scheduler.match(others).locations}
    assert rank.read(match, keys) == [None]
    assert scheduler.match(keys).locations == []


def test_the_same_bytes_saved_again_elsewhere_do_not_pass_for_the_first_slot(rig: Any, tools: Any) -> None:
    """The checksum covers the slot: two blocks of equal bytes and equal key differ by where they stand."""
    rig.node()
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(2)
    tools.save(scheduler, [rank], "s", keys[:1], parents[:1])
    match = scheduler.match(keys[:1])
    swapped = type(match)(
        match.slab, [type(match.locations[0])(match.locations[0].slot + 1, match.locations[0].sums)]
    )
    tools.save(scheduler, [rank], "t", keys[1:], parents[1:], fill=1)
    assert rank.read(match, keys) == [1]
    assert rank.read(swapped, keys) == [None]


# --- the memory itself -------------------------------------------------------------------------------------------


def test_a_forked_child_of_a_rank_cannot_write_into_the_slab(rig: Any, tools: Any) -> None:
    """hazards x4: it would go on writing after its parent is proven gone."""
    rig.node()
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(1)
    grant = tools.save(scheduler, [rank], "s", keys, parents)
    assert rank.fork_and_scribble(grant.slab, grant.grants[0].slot) == "died"
    assert rank.read(scheduler.match(keys), keys) == [1]


def test_no_holder_can_truncate_the_slab(rig: Any, tools: Any) -> None:
    rig.node()
    scheduler, rank = rig.scheduler(), rig.rank()
    grant = tools.save(scheduler, [rank], "s", *tools.make_keys(1))
    assert rank.truncate(grant.slab) == "refused"


# --- the node's life ---------------------------------------------------------------------------------------------


def test_clients_heal_when_the_node_was_killed_and_started_again(rig: Any, tools: Any) -> None:
    process = rig.node_process()
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(2)
    grant = scheduler.start_write("s", 1, keys, parents)
    sums = rank.write(grant, keys, 1)
    process.process.kill()
    process.close()
    assert scheduler.match(keys) is None
    rig.node_process()
    tools.eventually(lambda: scheduler.match(keys) is not None, "the scheduler is attached again")
    tools.eventually(
        lambda: not rank.report(grant, [True, True], sums), "the rank is attached to the new slab"
    )
    assert rank.counts()["report_dropped_stale_slab"] == 1
    assert scheduler.match(keys).locations == []
    new = tools.save(scheduler, [rank], "s", keys, parents, fill=5)
    assert new.slab != grant.slab
    assert rank.read(scheduler.match(keys), keys) == [5, 6]


def test_a_report_kept_for_a_node_that_is_gone_is_dropped_not_delivered_to_its_successor(
    rig: Any, tools: Any
) -> None:
    process = rig.node_process()
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(2)
    grant = scheduler.start_write("s", 1, keys, parents)
    sums = rank.write(grant, keys, 1)
    process.process.kill()
    process.close()
    assert rank.report(grant, [True, True], sums)
    assert not rank.delivered(0.2)
    rig.node_process()
    assert rank.delivered(tools.PATIENCE_S)
    assert rank.counts()["report_dropped_stale_slab"] == 1
    assert rig.stats()["interlock_store_published_blocks_total"] == 0


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "supervisor gone"])
def test_the_node_leaves_and_takes_its_socket_along(rig: Any, tools: Any, how: str) -> None:
    process = rig.node_process()
    rig.scheduler()
    rig.rank()
    path = rig.address.removeprefix("unix:")
    assert os.path.exists(path)
    if how != "supervisor gone":
        process.process.send_signal(getattr(signal, how))
    else:
        os.close(process.write_fd)
        process.write_fd = -1
    assert process.process.wait(tools.PATIENCE_S) == 0
    assert not os.path.exists(path)

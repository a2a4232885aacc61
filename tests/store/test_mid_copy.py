"""Real processes that stop in the middle of a copy: a node, writers and readers, frozen or killed (hazards W1, M1, x4, x5).

Where a process stands is known, not waited for: it answers when half of the bytes are copied, and does nothing until the
next word. Afterwards no slot is lost: published, free, being written and quarantined ones are all that there are.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

SLOTS = 32
FILL = 7


@pytest.fixture
def node(rig: Any) -> Any:
    return rig.node_process(slab_bytes=SLOTS * 4096)


def slots(rig: Any) -> dict[str, int]:
    stats = rig.stats()
    return {
        state: int(stats[f"interlock_store_slots_{state}"])
        for state in ("free", "writing", "published", "quarantined")
    }


@pytest.fixture
def balanced(rig: Any, other: Any, tools: Any) -> Iterator[None]:
    """At the end nothing is held, and every slot that the slab ever had can be written again."""
    yield
    found = tools.eventually(lambda: _settled(slots(rig)), "no slot is being written or in quarantine")
    assert found["published"] + found["free"] <= SLOTS
    other(2 * SLOTS)
    found = slots(rig)
    assert found["published"] + found["free"] == SLOTS
    assert _settled(found)
    assert rig.stats()["interlock_store_integrity_failures_total"] == 0
    assert rig.stats()["interlock_store_internal_errors_total"] == 0


def _settled(found: dict[str, int]) -> dict[str, int] | None:
    return found if found["writing"] == found["quarantined"] == 0 else None


@pytest.fixture
def other(rig: Any, node: Any, tools: Any) -> Callable[[int], list[bytes]]:
    """A second engine, well behaved: writes so many blocks around the slab, and returns the keys of the last ones."""
    scheduler, rank, turn = rig.scheduler(engine="other"), rig.rank(engine="other"), iter(range(1000))

    def write(count: int) -> list[bytes]:
        keys: list[bytes] = []
        for start in range(0, count, 8):
            number = next(turn)
            keys, parents = tools.make_keys(8, start=10_000 + 100 * number)
            tools.save(scheduler, [rank], f"other-{number}", keys, parents, fill=start % 8)
        return keys

    write.scheduler, write.rank = scheduler, rank  # type: ignore[attr-defined]
    return write


def shard_rank(rig: Any, tools: Any, engine: str = "engine-0", rank: int = 0, ranks: int = 1) -> Any:
    return rig.shard_rank(rig.attach(rank, ranks, engine, 1, tools.LAYOUT))


def everything_reads(other: Any, keys: list[bytes]) -> bool:
    match = other.scheduler.match(keys)
    return len(match.locations) == len(keys) and None not in other.rank.read(match, keys)


@pytest.mark.usefixtures("balanced")
def test_a_writer_frozen_in_mid_copy_keeps_its_slot_and_thaws_over_nobodys_block(
    rig: Any, tools: Any, other: Any
) -> None:
    """hazards x4: SIGSTOP, the slot reused, SIGCONT: every byte of another's block was overwritten."""
    scheduler, frozen = rig.scheduler(), shard_rank(rig, tools)
    keys, parents = tools.make_keys(1)
    grant = scheduler.start_write("s", 1, keys, parents)
    held = grant.grants[0].slot
    assert frozen.begin_copy(grant, FILL) == tools.LAYOUT.block_bytes // 2
    frozen.signal(signal.SIGSTOP)
    scheduler.abort_write("s", 1)
    assert scheduler.wait_delivered(tools.PATIENCE_S)
    assert slots(rig)["quarantined"] == 1
    last = other(3 * SLOTS)
    match = other.scheduler.match(last)
    assert held not in {location.slot for location in match.locations}
    frozen.signal(signal.SIGCONT)
    assert frozen.finish_copy(grant, FILL)
    assert everything_reads(other, last), "what the thawed writer wrote lies in its own slot"
    assert slots(rig)["quarantined"] == 1, "thawed is not promised"
    frozen.report(grant, [True], [[0] * 4])
    assert frozen.delivered(tools.PATIENCE_S)
    assert scheduler.match(keys).locations == [], "an aborted session publishes nothing, whatever is reported"


@pytest.mark.usefixtures("balanced")
def test_a_writer_killed_in_mid_copy_frees_its_slot_by_its_exit_and_its_half_is_never_read(
    rig: Any, tools: Any, other: Any
) -> None:
    scheduler, killed = rig.scheduler(), shard_rank(rig, tools)
    keys, parents = tools.make_keys(1)
    grant = scheduler.start_write("s", 1, keys, parents)
    killed.begin_copy(grant, FILL)
    assert slots(rig)["writing"] == 1
    killed.kill()
    tools.eventually(lambda: slots(rig)["writing"] == 0, "the exit is proven")
    assert scheduler.match(keys).locations == []
    last = other(3 * SLOTS)
    assert everything_reads(other, last)


@pytest.mark.usefixtures("balanced")
def test_a_frozen_writer_that_is_killed_afterwards_frees_what_it_held(
    rig: Any, tools: Any, other: Any
) -> None:
    scheduler, frozen = rig.scheduler(), shard_rank(rig, tools)
    keys, parents = tools.make_keys(3)
    grant = scheduler.start_write("s", 1, keys, parents)
    frozen.begin_copy(grant, FILL)
    frozen.signal(signal.SIGSTOP)
    scheduler.abort_write("s", 1)
    assert scheduler.wait_delivered(tools.PATIENCE_S)
    other(2 * SLOTS)
    assert slots(rig)["quarantined"] == 3
    frozen.kill()
    tools.eventually(lambda: slots(rig)["quarantined"] == 0, "the exit is proven")


@pytest.mark.usefixtures("balanced")
def test_of_two_writers_one_killed_in_mid_copy_spoils_the_block_for_both(rig: Any, tools: Any) -> None:
    scheduler = rig.scheduler(2)
    good, killed = (shard_rank(rig, tools, rank=rank, ranks=2) for rank in range(2))
    keys, parents = tools.make_keys(1)
    grant = scheduler.start_write("s", 1, keys, parents)
    killed.begin_copy(grant, FILL)
    good.report(grant, [True], good.write_shard(grant, keys, FILL))
    assert good.delivered(tools.PATIENCE_S)
    assert scheduler.match(keys).locations == [], "half a block is no block"
    killed.kill()
    tools.eventually(lambda: slots(rig)["writing"] == 0, "the session ends with its rank")
    assert scheduler.match(keys).locations == []


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.usefixtures("balanced")
def test_a_reader_whose_slot_was_reused_in_mid_copy_has_a_miss(
    rig: Any, tools: Any, other: Any, frozen: bool
) -> None:
    """hazards x5. Nobody waits for a reader: it holds nothing, so it need not be alive."""
    scheduler, reader = rig.scheduler(), shard_rank(rig, tools)
    keys, parents = tools.make_keys(1)
    grant = scheduler.start_write("s", 1, keys, parents)
    reader.report(grant, [True], reader.write_shard(grant, keys, FILL))
    assert reader.delivered(tools.PATIENCE_S)
    match = scheduler.match(keys)
    reader.begin_read(match)
    assert reader.finish_read(match, keys), "undisturbed it is right: the test can fail"
    reader.begin_read(match)
    if frozen:
        reader.signal(signal.SIGSTOP)
    scheduler.withdraw(match.slab, keys, [match.locations[0].slot])
    assert scheduler.wait_delivered(tools.PATIENCE_S)
    last = other(2 * SLOTS)
    assert slots(rig)["published"] == SLOTS, "every slot has been written since, the reader's too"
    if frozen:
        reader.signal(signal.SIGCONT)
    assert not reader.finish_read(match, keys)
    assert everything_reads(other, last)


@pytest.mark.usefixtures("balanced")
def test_a_reader_killed_in_mid_copy_leaves_nothing_behind(rig: Any, tools: Any, other: Any) -> None:
    scheduler, reader = rig.scheduler(), shard_rank(rig, tools)
    keys, parents = tools.make_keys(1)
    grant = scheduler.start_write("s", 1, keys, parents)
    reader.report(grant, [True], reader.write_shard(grant, keys, FILL))
    assert reader.delivered(tools.PATIENCE_S)
    match = scheduler.match(keys)
    reader.begin_read(match)
    reader.kill()
    assert everything_reads(other, other(3 * SLOTS))


def test_a_rank_that_still_writes_to_the_slab_of_a_killed_node_publishes_nothing_in_the_new_one(
    rig: Any, tools: Any
) -> None:
    """hazards W3: a sum that the node computes would bless zeros in the new slab."""
    node = rig.node_process(slab_bytes=SLOTS * 4096)
    scheduler, rank = rig.scheduler(), shard_rank(rig, tools)
    keys, parents = tools.make_keys(1)
    grant = scheduler.start_write("s", 1, keys, parents)
    rank.begin_copy(grant, FILL)
    node.process.kill()
    node.close()
    rig.node_process(slab_bytes=SLOTS * 4096)
    tools.eventually(lambda: _stats(rig), "the new node answers")
    sums = [[1, 2, 3, 4]]
    assert rank.finish_copy(grant, FILL) in (True, False), "it may have let go of the old slab already"
    rank.report(grant, [True], sums)
    assert scheduler.wait_ready(tools.PATIENCE_S)
    found = tools.eventually(lambda: scheduler.match(keys), "the scheduler has attached again")
    assert found.slab != grant.slab
    assert found.locations == []
    assert slots(rig)["published"] == 0


def _stats(rig: Any) -> Any:
    try:
        return rig.stats()
    except (OSError, ConnectionError):
        return None

"""A save is seen after every rank's report and not before; a slot is given out again only on evidence."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from interlock.core.errors import ChannelFault
from interlock.store.client import WriteGrant
from interlock.wire.store_messages import AbortWrite, Grant, Report, StartWrite

# --- joins -------------------------------------------------------------------------------------------------------


def test_a_block_is_seen_only_after_every_rank_reported(rig: Any, tools: Any) -> None:
    node = rig.node()
    scheduler, ranks = rig.scheduler(2), [rig.rank(0, 2), rig.rank(1, 2)]
    keys, parents = tools.make_keys(3)
    grant = scheduler.start_write("s", 1, keys, parents)
    assert [item.index for item in grant.grants] == [0, 1, 2]
    for rank in ranks:
        assert scheduler.match(keys).locations == []
        sums = rank.write(grant, keys, 1)
        assert scheduler.match(keys).locations == []
        assert rank.report(grant, [True] * 3, sums)
        assert rank.delivered(tools.PATIENCE_S)
    match = scheduler.match(keys)
    assert [location.slot for location in match.locations] == [item.slot for item in grant.grants]
    assert node.slots()["published"] == 3
    assert [rank.read(match, keys) for rank in ranks] == [[1, 2, 3], [33, 34, 35]]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_reports_complete_a_save_in_either_order(rig: Any, tools: Any, order: tuple[int, int]) -> None:
    rig.node()
    scheduler, ranks = rig.scheduler(2), [rig.rank(0, 2), rig.rank(1, 2)]
    keys, parents = tools.make_keys(2)
    tools.save(scheduler, [ranks[i] for i in order], "s", keys, parents)
    match = scheduler.match(keys)
    assert [rank.read(match, keys) for rank in ranks] == [[1, 2], [33, 34]]


def test_a_report_that_overtakes_its_start_is_kept_and_merged(rig: Any, tools: Any) -> None:
    """tair-kvcache #208: the report comes on the rank's socket before the start on the scheduler's."""
    node = rig.node()
    scheduler, early, late = rig.scheduler(2), rig.rank(0, 2), rig.rank(1, 2)
    keys, parents = tools.make_keys(1)
    slab = node.look(lambda n: n.store.slab)
    foreseen = WriteGrant("s", 1, slab.node_incarnation, slab.slab, [Grant(0, 0)])
    assert early.report(foreseen, [True], [[1, 2]])
    assert early.delivered(tools.PATIENCE_S)
    grant = scheduler.start_write("s", 1, keys, parents)
    assert scheduler.match(keys).locations == []
    late.report(grant, [True], [[3, 4]])
    assert late.delivered(tools.PATIENCE_S)
    assert scheduler.match(keys).locations[0].checksums == (1, 2, 3, 4)
    assert node.slots()["writing"] == node.slots()["quarantined"] == 0


def test_a_block_that_one_rank_failed_is_not_published_and_its_neighbours_are(rig: Any, tools: Any) -> None:
    node = rig.node()
    scheduler, ranks = rig.scheduler(2), [rig.rank(0, 2), rig.rank(1, 2)]
    keys, parents = tools.make_keys(3)
    grant = scheduler.start_write("s", 1, keys, parents)
    for rank, good in zip(ranks, ([True, True, True], [True, False, True]), strict=True):
        sums = rank.write(grant, keys, 1)
        rank.report(grant, good, [each if ok else [] for each, ok in zip(sums, good, strict=True)])
        assert rank.delivered(tools.PATIENCE_S)
    assert len(scheduler.match(keys).locations) == 1
    assert [len(scheduler.match([key]).locations) for key in keys] == [1, 0, 1]
    assert node.slots()["published"] == 2
    assert node.slots()["writing"] == node.slots()["quarantined"] == 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"rank": 1}, "wrong_rank"),
        ({"good": [True]}, "bad_report"),
        ({"checksums": [bytes(8)]}, "bad_report"),
        ({"checksums": [bytes(3 * 8), bytes(4 * 8)]}, "bad_report"),
        ({"checksums": [bytes(4 * 8 - 1), bytes(4 * 8)]}, "bad_report"),
        ({"node_incarnation": 7}, "stale_slab"),
        ({"slab": 7}, "stale_slab"),
        ({"session": ""}, "bad_session"),
        ({"session": "x" * 300}, "bad_session"),
    ],
)
def test_an_impossible_report_is_refused_and_harms_nothing(
    rig: Any, tools: Any, change: dict[str, Any], code: str
) -> None:
    node = rig.node()
    scheduler = rig.scheduler()
    channel = rig.channel()
    channel.request(rig.attach(0, 1, "engine-0", 1, tools.LAYOUT), 5)
    keys, parents = tools.make_keys(2)
    grant = scheduler.start_write("s", 1, keys, parents)
    words = {"session": "s", "attempt": 1, "rank": 0, "node_incarnation": grant.node_incarnation,
             "slab": grant.slab, "good": [True, True], "checksums": [bytes(4 * 8)] * 2}  # fmt: skip
    with pytest.raises(ChannelFault) as fault:
        channel.request(Report(**{**words, **change}), 5)
    assert fault.value.code == code
    assert scheduler.match(keys).locations == []
    channel.request(Report(**words), 5)
    assert len(scheduler.match(keys).locations) == 2
    assert node.slots()["published"] == 2


def test_repeated_and_late_reports_change_nothing(rig: Any, tools: Any) -> None:
    node = rig.node()
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(2)
    grant = tools.save(scheduler, [rank], "s", keys, parents)
    before = scheduler.match(keys)
    for good in ([True, True], [False, False]):
        rank.report(grant, good, [[9, 9, 9, 9] if ok else [] for ok in good])
        assert rank.delivered(tools.PATIENCE_S)
    assert scheduler.match(keys) == before
    stats = rig.stats()
    assert stats["interlock_store_reports_duplicate_total"] == 2
    assert stats["interlock_store_reports_late_total"] == 2
    assert node.slots()["published"] == 2


# --- write sessions ----------------------------------------------------------------------------------------------


def test_two_engines_that_write_the_same_keys_get_one_grant(rig: Any, tools: Any) -> None:
    rig.node()
    one, two = rig.scheduler(engine="a"), rig.scheduler(engine="b")
    rank, _ = rig.rank(engine="a"), rig.rank(engine="b")
    keys, parents = tools.make_keys(4)
    grant = one.start_write("s", 1, keys[:2], parents[:2])
    assert [item.index for item in two.start_write("s", 1, keys, parents).grants] == [2, 3]
    sums = rank.write(grant, keys, 1)
    rank.report(grant, [True, True], sums)
    assert rank.delivered(tools.PATIENCE_S)
    assert two.start_write("t", 1, keys[:3], parents[:3]).grants == []


def test_a_repeated_start_repeats_the_answer_and_an_ended_session_is_not_begun_again(
    rig: Any, tools: Any
) -> None:
    node = rig.node()
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(3)
    grant = scheduler.start_write("s", 1, keys, parents)
    assert scheduler.start_write("s", 1, keys, parents) == grant
    assert node.slots()["writing"] == 3
    rank.report(grant, [False] * 3, [[]] * 3)
    assert rank.delivered(tools.PATIENCE_S)
    assert scheduler.start_write("s", 1, keys, parents) is None
    assert scheduler.counts()["start_write_refused_session_ended"] == 1
    assert len(scheduler.start_write("s", 2, keys, parents).grants) == 3


def test_an_aborted_session_publishes_nothing_and_its_slots_wait_for_the_rank(rig: Any, tools: Any) -> None:
    node = rig.node()
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(2)
    grant = scheduler.start_write("s", 1, keys, parents)
    sums = rank.write(grant, keys, 1)
    scheduler.abort_write("s", 1)
    assert scheduler.wait_delivered(tools.PATIENCE_S)
    assert node.slots()["quarantined"] == 2
    other = scheduler.start_write("t", 1, keys, parents)
    assert not {item.slot for item in other.grants} & {item.slot for item in grant.grants}
    rank.report(grant, [True, True], sums)
    assert rank.delivered(tools.PATIENCE_S)
    assert scheduler.match(keys).locations == []
    assert node.slots()["quarantined"] == 0


@pytest.mark.parametrize("first", ["start", "abort"])
def test_slots_that_no_rank_was_told_of_are_free_at_once_in_either_order(
    rig: Any, tools: Any, first: str
) -> None:
    """The scheduler gave up waiting for the answer: its abort may even overtake the start, on another connection."""
    node = rig.node()
    rig.rank()
    scheduler, other = rig.channel(), rig.channel()
    for channel in (scheduler, other):
        channel.request(rig.attach(None, 1, "engine-0", 1, tools.LAYOUT), 5)
    keys, parents = tools.make_keys(2)
    abort = AbortWrite("s", 1, never_given=True)
    if first == "abort":
        other.request(abort, 5)
        with pytest.raises(ChannelFault, match="over"):
            scheduler.request(StartWrite("s", 1, keys, parents), 5)
    else:
        scheduler.request(StartWrite("s", 1, keys, parents), 5)
        assert node.slots()["writing"] == 2
        other.request(abort, 5)
    slots = node.slots()
    assert slots["writing"] == slots["quarantined"] == slots["published"] == 0


def test_no_write_begins_while_a_rank_is_missing(rig: Any, tools: Any) -> None:
    rig.node()
    scheduler = rig.scheduler(2)
    rig.rank(0, 2)
    keys, parents = tools.make_keys(1)
    assert scheduler.start_write("s", 1, keys, parents) is None
    assert scheduler.counts()["start_write_refused_ranks_missing"] == 1
    rig.rank(1, 2)
    assert scheduler.start_write("s", 1, keys, parents) is not None


# --- quarantine --------------------------------------------------------------------------------------------------


def test_a_rank_killed_in_mid_write_publishes_nothing_and_frees_the_slots_by_its_exit(
    rig: Any, tools: Any
) -> None:
    node = rig.node(join_s=60)
    scheduler, ranks = rig.scheduler(2), [rig.rank(0, 2), rig.rank(1, 2)]
    keys, parents = tools.make_keys(2)
    grant = scheduler.start_write("s", 1, keys, parents)
    sums = ranks[0].write(grant, keys, 1)
    ranks[0].report(grant, [True, True], sums)
    ranks[1].write(grant, keys, 1)
    assert node.slots()["writing"] == 2
    ranks[1].kill()
    tools.eventually(lambda: node.slots()["writing"] == 0, "the dead rank's session ends")
    slots = node.slots()
    assert slots["quarantined"] == slots["published"] == 0
    assert scheduler.match(keys).locations == []


def test_slots_of_a_dead_rank_wait_for_the_living_one(rig: Any, tools: Any) -> None:
    node = rig.node(join_s=60)
    scheduler, ranks = rig.scheduler(2), [rig.rank(0, 2), rig.rank(1, 2)]
    keys, parents = tools.make_keys(2)
    grant = scheduler.start_write("s", 1, keys, parents)
    ranks[1].kill()
    tools.eventually(lambda: node.slots()["quarantined"] == 2, "the session ends, the slots wait for rank 0")
    ranks[0].report(grant, [True, True], ranks[0].write(grant, keys, 1))
    tools.eventually(lambda: node.slots()["quarantined"] == 0, "rank 0 promised")
    assert scheduler.match(keys).locations == []


def test_slots_of_a_frozen_rank_are_not_reused_until_it_is_proven_gone(rig: Any, tools: Any) -> None:
    """hazards M1: the deadline ends the session, not the quarantine."""
    node = rig.node(slab_bytes=16 * 4096, join_s=0.2)
    scheduler, frozen = rig.scheduler(engine="a"), rig.rank(engine="a")
    other, writer = rig.scheduler(engine="b"), rig.rank(engine="b")
    keys, parents = tools.make_keys(3)
    grant = scheduler.start_write("s", 1, keys, parents)
    held = {item.slot for item in grant.grants}
    frozen.signal(signal.SIGSTOP)
    tools.eventually(lambda: node.slots()["quarantined"] == 3, "the deadline passes")
    keys, parents = tools.make_keys(40, start=10_000)
    for turn in range(4):  # three times around the slots that are left
        part = slice(10 * turn, 10 * turn + 10)
        tools.save(other, [writer], f"s{turn}", keys[part], parents[part])
        assert not held & set(node.look(lambda n: list(n.store.shelf._at)))
    assert node.slots()["quarantined"] == 3
    frozen.kill()
    tools.eventually(lambda: node.slots()["quarantined"] == 0, "its exit frees the slots")


def test_a_thawed_rank_frees_its_slots_by_its_late_report_and_publishes_nothing(rig: Any, tools: Any) -> None:
    node = rig.node(join_s=0.2)
    scheduler, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(3)
    grant = scheduler.start_write("s", 1, keys, parents)
    rank.signal(signal.SIGSTOP)
    tools.eventually(lambda: node.slots()["quarantined"] == 3, "the deadline passes")
    rank.signal(signal.SIGCONT)
    rank.report(grant, [True] * 3, rank.write(grant, keys, 1))
    assert rank.delivered(tools.PATIENCE_S)
    assert node.slots()["quarantined"] == 0
    assert scheduler.match(keys).locations == []


def test_too_much_quarantine_refuses_writes_and_names_the_holder(rig: Any, tools: Any) -> None:
    node = rig.node(slab_bytes=16 * 4096, join_s=0.2)
    rank = rig.rank()
    channel = rig.channel()
    channel.request(rig.attach(None, 1, "engine-0", 1, tools.LAYOUT), 5)
    keys, parents = tools.make_keys(5)
    channel.request(StartWrite("s", 1, keys, parents), 5)
    tools.eventually(lambda: node.slots()["quarantined"] == 5, "the deadline passes")
    with pytest.raises(ChannelFault, match=f"process {rank.pid()}") as fault:
        channel.request(StartWrite("t", 1, keys, parents), 5)
    assert fault.value.code == "quarantine_full"
    assert fault.value.retryable


def test_a_killed_scheduler_ends_its_sessions_and_ranks_still_hold_their_slots(rig: Any, tools: Any) -> None:
    node = rig.node(join_s=60)
    scheduler, rank = rig.scheduler_process(), rig.rank()
    keys, parents = tools.make_keys(2)
    tries = ((f"s{n}", scheduler.start_write(f"s{n}", 1, keys, parents)) for n in range(100))
    name, answer = next(one for one in tries if one[1] is not None)  # a busy machine may be late for one
    grant = WriteGrant(
        name, 1, answer["node_incarnation"], answer["slab"], [Grant(*g) for g in answer["grants"]]
    )
    scheduler.kill()
    tools.eventually(lambda: node.slots()["quarantined"] == 2, "the session ends with its writer")
    rank.report(grant, [True, True], rank.write(grant, keys, 1))
    assert rank.delivered(tools.PATIENCE_S)
    assert node.slots()["quarantined"] == node.slots()["published"] == 0


def test_a_newer_life_of_an_engine_ends_the_sessions_of_the_older(rig: Any, tools: Any) -> None:
    node = rig.node(join_s=60)
    old, rank = rig.scheduler(incarnation=1), rig.rank(incarnation=1)
    keys, parents = tools.make_keys(2)
    grant = old.start_write("s", 1, keys, parents)
    new, _ = rig.scheduler(incarnation=2), rig.rank(incarnation=2)
    assert node.slots()["quarantined"] == 2
    assert len(new.start_write("s", 1, keys, parents).grants) == 2
    assert old.start_write("t", 1, *tools.make_keys(1, start=999)) is None
    rank.report(grant, [True, True], rank.write(grant, keys, 1))
    assert rank.delivered(tools.PATIENCE_S)
    assert node.slots()["quarantined"] == 0


def test_a_broken_connection_is_no_exit(rig: Any, tools: Any) -> None:
    """The rank's connection ends and comes back; the session goes on and completes."""
    node = rig.node(join_s=60)
    scheduler = rig.scheduler()
    first = rig.channel()
    attach = rig.attach(0, 1, "engine-0", 1, tools.LAYOUT)
    first.request(attach, 5)
    keys, parents = tools.make_keys(2)
    grant = scheduler.start_write("s", 1, keys, parents)
    first.close()
    tools.eventually(
        lambda: node.look(
            lambda n: [m for life in n._roster for m in life.members.values() if not m.connections]
        ),
        "the node sees the end of the connection",
    )
    assert node.slots()["writing"] == 2
    second = rig.channel()
    second.request(attach, 5)
    second.request(Report("s", 1, 0, grant.node_incarnation, grant.slab, [True] * 2, [bytes(4 * 8)] * 2), 5)
    assert len(scheduler.match(keys).locations) == 2


def test_books_that_do_not_balance_are_a_metric(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.store.housekeeping.IDLE_SECONDS", 0.05)
    node = rig.node()
    scheduler = rig.scheduler()
    rig.rank()
    failures = "interlock_store_integrity_failures_total"
    assert rig.stats()[failures] == 0
    node.node.store.slots.count["free"] += 1
    assert scheduler.match([bytes(32)]) is not None  # something happens, then nothing
    tools.eventually(lambda: rig.stats()[failures], "an idle node looks into its books")
    node.node.store.slots.count["free"] -= 1

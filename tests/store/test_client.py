"""The engine's threads wait no longer than they were told, and nothing is ever raised into them."""

from __future__ import annotations

import signal
from typing import Any

from interlock.core.limits import BREAKER_FAILURES_MAX, BREAKER_PROBE_SECONDS, STORE_LOOKUP_SECONDS_MAX
from interlock.host.blocking import BlockingHost, monotonic_s
from interlock.store.breaker import Breaker
from interlock.store.client import StoreClient
from interlock.wire.identity import passing_identity

SLACK_S = 0.2
"""Scheduling on a busy machine; without the bound these calls would last for seconds."""


def timed(call: Any) -> tuple[Any, float]:
    begun = monotonic_s()
    return call(), monotonic_s() - begun


def test_without_a_node_everything_is_a_miss_at_once(rig: Any, tools: Any) -> None:
    client = StoreClient(
        rig.address, passing_identity(BlockingHost(), "c"), rig.attach(None, 1, "e", 1, tools.LAYOUT)
    )
    rig.add(client)
    keys, parents = tools.make_keys(2)
    for call in (
        lambda: client.match(keys),
        lambda: client.start_write("s", 1, keys, parents),
        lambda: client.slab_of(1),
        lambda: client.abort_write("s", 1),
        lambda: client.withdraw(1, keys, [1, 2]),
    ):
        answer, seconds = timed(call)
        assert answer is None
        assert seconds < SLACK_S
    assert client.counts()["match_not_attached"] == 1
    assert not client.wait_ready(0.05)
    assert "nobody listens there" in client.last_error
    rig.node()
    tools.eventually(lambda: client.match(keys) is not None, "it heals by itself")


def test_a_frozen_node_costs_a_few_time_outs_and_then_nothing_until_it_answers_a_probe(
    rig: Any, tools: Any
) -> None:
    process = rig.node_process()
    client = rig.scheduler(lookup_timeout_s=0.5)
    keys, _ = tools.make_keys(4)
    assert client.match(keys) is not None
    process.process.send_signal(signal.SIGSTOP)
    for _ in range(BREAKER_FAILURES_MAX):
        answer, seconds = timed(lambda: client.match(keys))
        assert answer is None
        assert 0.5 <= seconds < 0.5 + SLACK_S
    answer, seconds = timed(lambda: [client.match(keys) for _ in range(100)])
    assert answer == [None] * 100
    assert seconds < SLACK_S
    assert client.counts()["match_breaker_open"] >= 99
    process.process.send_signal(signal.SIGCONT)
    tools.eventually(lambda: client.match(keys) is not None, "a probe is answered")


def test_the_limit_of_a_look_up_in_production_is_kept(rig: Any, tools: Any) -> None:
    process = rig.node_process()
    client = rig.scheduler(lookup_timeout_s=STORE_LOOKUP_SECONDS_MAX)
    process.process.send_signal(signal.SIGSTOP)
    answer, seconds = timed(lambda: client.match(tools.make_keys(1)[0]))
    assert answer is None
    assert seconds < STORE_LOOKUP_SECONDS_MAX + SLACK_S
    process.process.send_signal(signal.SIGCONT)


def test_a_start_that_was_not_answered_in_time_leaves_no_slot_taken(rig: Any, tools: Any) -> None:
    process = rig.node_process()
    client, rank = rig.scheduler(lookup_timeout_s=0.05), rig.rank()
    keys, parents = tools.make_keys(4)
    process.process.send_signal(signal.SIGSTOP)
    assert client.start_write("s", 1, keys, parents) is None
    process.process.send_signal(signal.SIGCONT)
    assert client.wait_delivered(tools.PATIENCE_S)
    stats = rig.stats()
    assert stats["interlock_store_granted_blocks_total"] == 4
    assert stats["interlock_store_slots_writing"] == stats["interlock_store_slots_quarantined"] == 0
    assert rank.counts().get("report_timeout") is None


def test_a_report_is_repeated_until_a_frozen_node_has_heard_it(rig: Any, tools: Any) -> None:
    process = rig.node_process()
    client, rank = rig.scheduler(), rig.rank()
    keys, parents = tools.make_keys(2)
    grant = client.start_write("s", 1, keys, parents)
    sums = rank.write(grant, keys, 1)
    process.process.send_signal(signal.SIGSTOP)
    assert rank.report(grant, [True, True], sums)
    assert not rank.delivered(1.5)
    process.process.send_signal(signal.SIGCONT)
    assert rank.delivered(tools.PATIENCE_S)
    assert rank.counts()["report_timeout"] >= 1
    assert rank.read(client.match(keys), keys) == [1, 2]


def test_more_keys_than_a_call_may_have_are_cut(rig: Any, tools: Any) -> None:
    rig.node()
    client = rig.scheduler()
    keys, _ = tools.make_keys(9000)
    assert client.match(keys).locations == []
    assert client.counts()["match_miss_blocks"] == 8192


def test_the_breaker_lets_one_probe_through_an_interval() -> None:
    breaker = Breaker()
    for _ in range(BREAKER_FAILURES_MAX):
        assert breaker.admits(0.0)
        breaker.failed(0.0)
    admitted = [breaker.admits(t / 10) for t in range(1, 26)]
    assert admitted.count(True) == 2
    assert not any(admitted[: int(BREAKER_PROBE_SECONDS * 10) - 1])
    breaker.answered()
    assert breaker.admits(2.51)
    assert breaker.admits(2.51)

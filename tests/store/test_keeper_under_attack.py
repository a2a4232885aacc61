"""The keeper outlives whatever it is given: a promise that cannot be said, a node that sends nonsense, a defect of ours."""

from __future__ import annotations

import os
from typing import Any

import pytest

from interlock.host.blocking import BlockingHost
from interlock.store import keeper
from interlock.store.client import StoreClient
from interlock.wire.blocking import BlockingChannel
from interlock.wire.identity import passing_identity
from interlock.wire.store_messages import Withdraw


def test_a_promise_that_fits_into_no_frame_is_dropped_and_the_next_is_delivered(rig: Any, tools: Any) -> None:
    rig.node()
    client = rig.scheduler()
    (key,), _ = tools.make_keys(1)
    slab = client._keeper.last_slab
    client._keeper.promise(slab, Withdraw([key] * 600_000, [1] * 600_000))
    client.withdraw(slab, [key], [1])
    assert client.wait_delivered(5.0)
    assert client.counts()["withdraw_dropped_unsayable"] == 1
    assert client.counts()["attached"] == 1, "the link was of use all the time"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_while_delivering_does_not_end_the_keeper(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.node()
    client = rig.scheduler()
    request, failures = BlockingChannel.request, [ValueError("a defect")]

    def fail_once(channel: Any, body: Any, timeout_s: float) -> Any:
        if isinstance(body, Withdraw) and failures:
            raise failures.pop()
        return request(channel, body, timeout_s)

    monkeypatch.setattr(BlockingChannel, "request", fail_once)
    (key,), _ = tools.make_keys(1)
    client.withdraw(client._keeper.last_slab, [key], [1])
    assert client.wait_delivered(5.0)
    assert not failures


def test_a_keeper_that_attaches_while_it_is_closed_leaves_no_connection(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper.limits, "REPORT_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(keeper, "DELIVERY_SECONDS_MAX", 0.05)
    node = rig.node()
    client = StoreClient(
        rig.address, passing_identity(BlockingHost(), "c"), rig.attach(None, 1, "e", 1, tools.LAYOUT)
    )
    make_link, may_go_on, begun = client._keeper._make_link, keeper.Condition(), []

    def slow() -> Any:
        link = make_link()
        with may_go_on:
            begun.append(link)
            may_go_on.notify_all()
            may_go_on.wait(5.0)
        return link

    monkeypatch.setattr(client._keeper, "_make_link", slow)
    client.start()
    with may_go_on:
        assert may_go_on.wait_for(lambda: begun, 5.0)
    client.close()
    with may_go_on:
        may_go_on.notify_all()
    client._keeper._thread.join(5.0)
    assert begun[0].lookups.closed is not None
    assert begun[0].deliveries.closed is not None
    node.look(lambda _: None)


def test_descriptors_that_nobody_asked_for_are_closed(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipes = [os.pipe() for _ in range(2)]
    given = [writer for _, writer in pipes]
    monkeypatch.setattr(BlockingChannel, "take_fds", lambda _: [given.pop() for _ in given[:]])
    rig.node()
    client = StoreClient(
        rig.address, passing_identity(BlockingHost(), "c"), rig.attach(0, 1, "e", 1, tools.LAYOUT)
    )
    rig.add(client)
    client.start()
    tools.eventually(lambda: client.counts().get("attach_failed"), "it is refused")
    for reader, _ in pipes:
        assert os.read(reader, 1) == b""
        os.close(reader)

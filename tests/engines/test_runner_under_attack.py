"""What a runner must survive, or end by name: words too long for a frame, hasty fronts, defects of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from engine_rig import WAIT_SECONDS
from hand_engine import HandEngine, expected_tokens

from interlock.core.errors import ChannelClosed
from interlock.core.identity import Epoch
from interlock.core.lifecycle import Admission
from interlock.core.limits import FRAME_BYTES_MAX
from interlock.core.sampling import Sampling
from interlock.engines.base import Progress, RequestRejected, Work
from interlock.engines.desk import Desk
from interlock.engines.runner import STATUS_FAILED
from interlock.host.real import RealHost
from interlock.wire.duplex import Received
from interlock.wire.engine_messages import Dispatch, Resume, Tokens
from interlock.wire.identity import Identity
from interlock.wire.token_ids import pack_ids

P = [3, 1, 4]
ESSAY = "x" * (FRAME_BYTES_MAX + 1)
"""As an exception that quotes its whole input."""


def failing(error: Exception) -> Any:
    async def generate(_: Work) -> AsyncGenerator[Progress, None]:
        raise error
        yield

    return generate


async def test_a_failure_told_at_any_length_reaches_the_front_and_the_others_go_on(rig: Any) -> None:
    await rig.running()
    front = await rig.front()
    await front.dispatch("a", P, 2)
    await rig.engine.until_works(1)
    rig.engine.generate = failing(RuntimeError(ESSAY))
    await front.dispatch("b", P, 2)
    assert (await front.until_finish("b")).finish == "error"
    await rig.engine.step(2)
    assert (await front.until_finish("a")).finish == "length"


async def test_a_refusal_told_at_any_length_reaches_the_front(rig: Any) -> None:
    await rig.running()
    front = await rig.front()
    rig.engine.generate = failing(RequestRejected(ESSAY))
    await front.dispatch("a", P, 2)
    await front.until(lambda: front.refusals)
    assert front.refusals[0].code == "invalid"


async def test_a_new_life_of_a_front_may_use_the_names_of_its_former_requests(rig: Any) -> None:
    await rig.running()
    former = await rig.front(incarnation=1)
    await former.dispatch("a", P, 5, attempt=3)
    await rig.engine.until_works(1)
    front = await rig.front(incarnation=2)
    await front.dispatch("a", [9], 2, attempt=1)
    await rig.engine.until_works(2)
    await rig.engine.step(2)
    await front.until_finish("a")
    assert front.tokens("a") == expected_tokens([9], 2)


async def test_a_member_that_can_report_no_more_leaves_for_a_life_that_can(rig: Any) -> None:
    await rig.running()

    def load() -> Any:
        raise RuntimeError("the statistics are broken")

    rig.engine.load = load
    async with asyncio.timeout(WAIT_SECONDS):
        assert await asyncio.shield(rig.life) == STATUS_FAILED


async def test_a_step_whose_end_core_refuses_ends_the_member_instead_of_leaving_it_half_way(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.running()
    member = rig.runner._member
    apply = member._apply

    def refuse(event: Any) -> None:
        if type(event).__name__ == "StepFinished":
            raise RuntimeError("a defect")
        apply(event)

    monkeypatch.setattr(member, "_apply", refuse)
    await rig.coordinator.tell(2, "PAUSED")
    async with asyncio.timeout(WAIT_SECONDS):
        assert await asyncio.shield(rig.life) == STATUS_FAILED


class SlowChannel:
    """A connection of a front that takes its time to close, and keeps what was sent on it."""

    def __init__(self) -> None:
        self.peer, self.peer_role = Identity("front", 1), "front"
        self.sent: list[Any] = []
        self.closed: ChannelClosed | None = None
        self.may_close = asyncio.Event()
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()

    def say(self, body: Any) -> None:
        self.inbox.put_nowait(Received(1, 0, body))

    async def messages(self) -> AsyncIterator[Received]:
        while (received := await self.inbox.get()) is not None:
            yield received

    async def send(self, body: Any) -> None:
        if self.closed is not None:
            raise self.closed
        self.sent.append(body)

    async def close(self) -> None:
        await self.may_close.wait()
        self.closed = ChannelClosed("closed")
        self.inbox.put_nowait(None)


async def test_of_connections_that_come_while_an_older_one_closes_only_the_last_is_served() -> None:
    engine, host = HandEngine(), RealHost()
    desk = Desk(
        host.clock, engine, lambda epoch: (Admission.ADMIT, epoch, "RUNNING"), lambda why: pytest.fail(why)
    )
    channels = [SlowChannel() for _ in range(3)]
    tasks = [asyncio.create_task(desk.serve(channel)) for channel in channels[:1]]  # type: ignore[arg-type]
    channels[0].say(Resume([]))
    await asyncio.sleep(0)
    for channel in channels[1:]:
        channel.may_close.set()
        channel.say(Resume([]))
        tasks.append(asyncio.create_task(desk.serve(channel)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
    channels[0].may_close.set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert [channel.closed is None for channel in channels] == [False, False, True]
    channels[2].say(Dispatch("a", 1, Epoch(1, 1), pack_ids(P), Sampling(max_tokens=3), "salt"))
    await engine.until_works(1)
    await engine.step(3)
    assert not channels[1].sent
    told = [delta for frame in channels[2].sent if isinstance(frame, Tokens) for delta in frame.deltas]
    assert [token for delta in told for token in delta.tokens] == expected_tokens(P, 3)
    for channel in channels:
        channel.inbox.put_nowait(None)
    await asyncio.gather(*tasks)
    await desk.close()
    host.close()

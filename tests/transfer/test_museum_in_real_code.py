"""The museum's handshakes (kvcache-ai/Mooncake), played to the real driver: words held back, repeated, and said by lives that are over.

`Post` stands between two drivers in the place of their control channels, so that each test says what arrives when; lanes are real.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from interlock.core.endpoint_events import Retire, Tick
from interlock.core.endpoint_state import Phase
from interlock.core.limits import HANDSHAKE_SECONDS_MAX
from interlock.host.bulk import BulkSocket
from interlock.host.bulk_pool import borrow_pool, return_pool
from interlock.host.real import RealHost
from interlock.transfer.endpoint import EndpointDriver
from interlock.transfer.lanes.greeting import LaneHello, LaneWelcome
from interlock.transfer.lanes.tcp import TcpKind
from interlock.transfer.outcomes import TransferFailed
from interlock.transfer.segments import SegmentTable
from interlock.wire.transfer_messages import Said, from_wire

from .conftest import until


class Side:
    """One life of one peer: a driver and its TCP lanes."""

    def __init__(self, post: Post, name: str, peer: str, life: int) -> None:
        self.post, self.name, self.life = post, name, life
        self.segments = SegmentTable(name)
        self.segments.incarnation = life
        self.kind = TcpKind(post.host.clock, name, post.pool, self.segments, self, connections=1)
        self.said: list[Said] = []
        self.superseded: list[Any] = []
        self.peer = peer
        self.driver: EndpointDriver

    async def start(self) -> Side:
        await self.kind.start()
        self.driver = EndpointDriver(
            self.post.host.clock,
            self.name,
            self.peer,
            self.life,
            1,
            {"tcp": self.kind},
            self._say,
            self.superseded.append,
        )
        return self

    def _say(self, said: Said) -> None:
        self.said.append(said)
        if not self.post.holds:
            asyncio.get_running_loop().call_soon(self.post.deliver, self, said)

    async def judge(self, hello: LaneHello) -> LaneWelcome:
        return await self.driver.judge(hello)

    def arrived(self, hello: LaneHello, sock: BulkSocket) -> None:
        self.driver.arrived(hello, sock)

    async def close(self) -> None:
        await self.kind.close()
        await self.driver.close()


class Post:
    """Delivers at once, unless `holds`; the dead hear nothing."""

    def __init__(self) -> None:
        self.host, self.pool = RealHost(), borrow_pool()
        self.holds = False
        self.living: dict[str, Side] = {}
        self.all: list[Side] = []

    async def born(self, name: str, life: int) -> Side:
        side = await Side(self, name, "b" if name == "a" else "a", life).start()
        self.living[name] = side
        self.all.append(side)
        return side

    def deliver(self, sender: Side, said: Said) -> None:
        receiver = self.living.get(sender.peer)
        if receiver is not None and receiver is not sender:
            receiver.driver.tell(from_wire(sender.name, sender.life, said))

    async def close(self) -> None:
        for side in self.all:
            await side.close()
        return_pool()
        self.host.close()


@pytest.fixture
async def post() -> AsyncIterator[Post]:
    made = Post()
    yield made
    await made.close()


def agreed(a: Side, b: Side) -> bool:
    one, two = a.driver.state, b.driver.state
    return (
        one.phase is two.phase is Phase.CONNECTED
        and one.theirs == two.stamp
        and two.theirs == one.stamp
        and one.chosen == two.chosen
    )


async def meet(post: Post, a: Side, b: Side) -> None:
    await asyncio.gather(a.driver.open(), b.driver.open())
    await until(lambda: agreed(a, b))


async def test_opens_that_cross_give_one_connection_over_lanes_of_both(post: Post) -> None:
    """#1733, and our own E1: both ask before either hears of the other."""
    a, b = await post.born("a", 1), await post.born("b", 1)
    post.holds = True
    waiting = [asyncio.create_task(side.driver.open()) for side in (a, b)]
    await until(lambda: bool(a.said and b.said))
    post.holds = False
    for side in (b, a):
        post.deliver(side, side.said[0])
    await asyncio.gather(*waiting)
    await until(lambda: agreed(a, b))
    assert a.driver.state.chosen, "both are connected over nothing"


async def test_a_late_open_of_the_same_life_displaces_nothing(post: Post) -> None:
    """mooncake_late_request: an old request in the listener's backlog looked like a restart."""
    a, b = await post.born("a", 1), await post.born("b", 1)
    await meet(post, a, b)
    first_open = next(said for said in a.said if said.what == "open")
    a.driver.tell(Retire("anew"))
    await meet(post, a, b)
    stamps = (a.driver.state.stamp, b.driver.state.stamp)
    for _ in range(3):
        post.deliver(a, first_open)
    await asyncio.sleep(0.05)
    assert agreed(a, b)
    assert (a.driver.state.stamp, b.driver.state.stamp) == stamps


async def test_a_restarted_peer_with_the_very_same_parameters_is_no_duplicate(post: Post) -> None:
    """mooncake_equal_qps: the successor offers what its predecessor offered, byte for byte."""
    a, b = await post.born("a", 1), await post.born("b", 1)
    await meet(post, a, b)
    offers = a.driver.state.offers
    again = Side(post, "a", "b", 2)
    again.kind = a.kind  # the same port and the same token
    again.kind._admission = again  # type: ignore[attr-defined]
    again.driver = EndpointDriver(
        post.host.clock, "a", "b", 2, 1, {"tcp": again.kind}, again._say, again.superseded.append
    )
    assert again.driver.state.offers == offers
    post.living["a"] = again
    await again.driver.open()
    await until(lambda: agreed(again, b))
    assert b.driver.state.theirs is not None
    assert b.driver.state.theirs.incarnation == 2
    await again.driver.close()


async def test_an_answer_to_an_attempt_that_was_given_up_sets_nothing_up(post: Post) -> None:
    """mooncake_stale_reply (#3584): the waiter timed out, the answer comes after its successor began."""
    a, b = await post.born("a", 1), await post.born("b", 1)
    post.holds = True
    first = asyncio.create_task(a.driver.open())
    await until(lambda: bool(a.said))
    post.deliver(a, a.said[0])
    await until(lambda: bool(b.said))
    late = b.said[-1]
    a.driver.tell(Retire("the waiter gave up"))
    with pytest.raises(TransferFailed, match="the waiter gave up"):
        await first
    post.holds = False
    second = asyncio.create_task(a.driver.open())
    post.deliver(b, late)
    await second
    await until(lambda: agreed(a, b))
    post.deliver(b, late)
    await asyncio.sleep(0.05)
    assert agreed(a, b)


async def test_who_is_still_waiting_when_an_attempt_ends_goes_on_with_the_next(post: Post) -> None:
    """Somebody else may have begun that attempt long ago: its deadline is not the waiter's."""
    a, b = await post.born("a", 1), await post.born("b", 1)
    post.holds = True
    begun_long_ago = asyncio.create_task(a.driver.open())
    await until(lambda: bool(a.said))
    a.driver.tell(Tick(0.0))
    late = asyncio.create_task(a.driver.open())
    await asyncio.sleep(0)
    attempt = a.driver.state.attempt
    a.driver.tell(Tick(HANDSHAKE_SECONDS_MAX + 0.1))
    post.holds = False
    async with asyncio.timeout(5):
        await asyncio.gather(begun_long_ago, late)
    assert a.driver.state.attempt > attempt
    await until(lambda: agreed(a, b))


async def test_a_lost_ready_leaves_nobody_half_open(post: Post) -> None:
    """E2, mooncake R5: the last word of the handshake is lost; a tick says it again, and both are connected."""
    a, b = await post.born("a", 1), await post.born("b", 1)
    deliver, lost = post.deliver, []

    def lossy(sender: Side, said: Said) -> None:
        if said.what == "heartbeat" and not lost:
            lost.append(said)
            return
        deliver(sender, said)

    post.deliver = lossy  # type: ignore[method-assign]
    opening = [asyncio.create_task(side.driver.open()) for side in (a, b)]
    await until(lambda: bool(lost))
    while not agreed(a, b):
        for side in (a, b):
            side.driver.tick()
        await asyncio.sleep(0.01)
    await asyncio.gather(*opening)


async def test_a_connection_of_a_lane_is_admitted_once_and_only_with_the_token(post: Post) -> None:
    a, b = await post.born("a", 1), await post.born("b", 1)
    await meet(post, a, b)
    mine, theirs = a.driver.state.stamp, b.driver.state.stamp
    hello = LaneHello("tcp", "a", "b", mine, theirs, "dialler reads", 0)
    assert not b.kind.is_from_us(hello), "a hello without a MAC passes"
    assert not b.kind.is_from_us(hello.signed(b"x" * 32))
    signed = hello.signed(b.kind._secrets["a"])
    assert b.kind.is_from_us(signed)
    assert (await b.judge(signed)).refusal == "this connection was admitted already"
    other = LaneHello("tcp", "a", "b", mine, theirs, "dialler reads", 7)
    assert not b.kind.is_from_us(LaneHello(*other.__reduce__()[1][:-1], signed.mac)), (
        "a MAC opens another door"
    )


async def test_a_newer_life_that_the_peer_knows_ends_the_older(post: Post, tmp_path: Path) -> None:
    """E3: of two lives of one name the newer stays; the older hears so and stops."""
    a, b = await post.born("a", 5), await post.born("b", 1)
    await meet(post, a, b)
    old = await post.born("a", 4)
    await asyncio.wait([asyncio.create_task(old.driver.open())], timeout=0.2)
    await until(lambda: bool(old.superseded) or old.driver.state.phase is Phase.CLOSED)
    assert old.superseded[0].incarnation == 5
    post.living["a"] = a
    await asyncio.sleep(0.05)
    assert agreed(a, b)

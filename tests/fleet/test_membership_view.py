"""A front believes the highest epoch it has heard, and keeps believing while nobody speaks."""

from __future__ import annotations

import asyncio
from pathlib import Path

from interlock.core.identity import Epoch
from interlock.fleet.membership_view import MembershipView
from interlock.host.real import RealHost
from interlock.wire.channel import Channel, serve_channels
from interlock.wire.fleet_messages import EngineFacts, Member, Membership, WatchMembership
from interlock.wire.identity import passing_identity


def word(term: int, number: int, target: str) -> Membership:
    return Membership(Epoch(term, number), target, "0", [], [])


async def test_the_word_of_an_old_coordinator_is_dropped(tmp_path: Path) -> None:
    """hazards F3: a coordinator that was frozen thaws and still believes that it leads."""
    host = RealHost()
    address = f"unix:{tmp_path}/coordinator.sock"
    said = [word(2, 1, "PAUSED"), word(1, 9, "RUNNING"), word(2, 1, "PAUSED"), word(2, 2, "STOPPED")]
    heard: list[str] = []
    told: list[Epoch | None] = []
    end = asyncio.Event()

    async def speak(channel: Channel) -> None:
        async for received in channel.messages():
            told.append(received.body.heard and received.body.heard.epoch)
            for membership in said if len(told) == 1 else ():
                await channel.send(membership)

    def on_change(membership: Membership) -> None:
        heard.append(membership.target)
        if membership.target == "STOPPED":
            end.set()

    me = passing_identity(host, "coordinator")
    listener = await serve_channels(host, address, me=me, accept=WatchMembership, on_channel=speak)
    view = MembershipView(host, passing_identity(host, "front"), address, on_change, heard.append)  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(10):
            await end.wait()
        assert heard == ["PAUSED", "STOPPED"]
        async with asyncio.timeout(10):
            while len(told) < 2:
                await asyncio.sleep(0)
        assert told == [None, Epoch(2, 1)]  # who speaks of a lower epoch is told the higher one
        await listener.close()
        assert view.current == said[-1]
    finally:
        await view.close()
        await listener.close()
        host.close()


async def test_a_coordinator_that_lists_a_life_that_is_over_is_told_once(tmp_path: Path) -> None:
    """It answers each word of ours with its membership: told at each of those, both would talk without end."""
    host = RealHost()
    address = f"unix:{tmp_path}/coordinator.sock"
    facts = EngineFacts("unix:/e", "m", 9, "vllm")
    old = [Member(name, 5, facts, "RUNNING", False, "0") for name in ("a", "b")]
    over = {"a": 6}
    words = asyncio.Queue[WatchMembership]()
    heard = asyncio.Event()

    async def speak(channel: Channel) -> None:
        async for received in channel.messages():
            words.put_nowait(received.body)
            if words.qsize() == 1:
                for number in range(1, 4):
                    await channel.send(Membership(Epoch(1, number), "RUNNING", "0", [], old))

    def on_change(membership: Membership) -> None:
        if membership.epoch.number == 2:
            over["b"] = 7
        if membership.epoch.number == 3:
            heard.set()

    me = passing_identity(host, "coordinator")
    listener = await serve_channels(host, address, me=me, accept=WatchMembership, on_channel=speak)
    view = MembershipView(host, passing_identity(host, "front"), address, on_change, lambda _: None, over)
    try:
        async with asyncio.timeout(10):
            await heard.wait()
        await view.close()  # after its last words
        async with asyncio.timeout(10):
            said = [await words.get() for _ in range(3)]
        assert words.empty()
        assert [{one.name for one in word.over} for word in said] == [{"a"}, {"a"}, {"a", "b"}]
    finally:
        await view.close()
        await listener.close()
        host.close()

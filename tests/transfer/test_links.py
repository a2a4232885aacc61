"""Channels to a peer: one dial at a time, questions that outlive the channel they went over, lanes whose first request comes early."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from interlock.core.errors import ChannelClosed
from interlock.host.bulk import BulkSocket
from interlock.transfer import link as link_module
from interlock.transfer.engine import Part, TransferFailed
from interlock.transfer.lanes import sockets as sockets_module
from interlock.transfer.lanes.greeting import CONFIRM, LaneHello, LaneWelcome
from interlock.wire.channel import Channel
from interlock.wire.transfer_messages import AskEcho, FindSegments

from .conftest import Yard, random_bytes


async def test_who_posts_in_the_moment_in_which_a_dial_succeeds_does_not_dial_again(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand peers in one process did, hundreds of times, and the hub refused those above its bound."""
    a, _ = await yard.pair()
    link = a._meeting.get("b").link
    real, dials = link_module.connect_channel, []

    async def connect(*arguments: Any, **options: Any) -> Channel:
        channel = await real(*arguments, **options)
        dials.append(channel)
        # Behind the rest of the dial, and before the task that it starts.
        asyncio.get_running_loop().call_soon(link.post, AskEcho())
        asyncio.get_running_loop().call_soon(
            lambda: asyncio.get_running_loop().call_soon(link.post, AskEcho())
        )
        return channel

    monkeypatch.setattr(link_module, "connect_channel", connect)
    await a.open("b", timeout_s=5)
    await a.ping("b", timeout_s=5)
    assert len(dials) == 1


async def test_a_question_whose_channel_is_closed_under_it_goes_over_the_next(yard: Yard) -> None:
    """Of two channels that were dialled at once one is closed, perhaps with a question on its way."""
    a, b = await yard.pair()
    b.register(random_bytes(4096), "kv")
    await a.open("b", timeout_s=5)
    there = a._meeting.get("b").link
    hear, closed = b._hearing._hear, []

    async def close_first(channel: Channel, received: Any, peer: Any) -> None:
        if isinstance(received.body, FindSegments) and not closed:
            closed.append(channel)
            channel._shut(ChannelClosed("of two channels the other stays"))
            raise ChannelClosed("of two channels the other stays")
        await hear(channel, received, peer)

    b._hearing._hear = close_first  # type: ignore[method-assign]
    assert len(await a.segments_of("b", "kv", timeout_s=5)) == 1
    assert closed
    assert there.is_up


async def test_a_question_to_a_peer_that_closes_each_channel_ends_and_says_so(yard: Yard) -> None:
    a, b = await yard.pair()
    await a.open("b", timeout_s=5)
    asked = 0

    async def close_all(channel: Channel, received: Any, _: Any) -> None:
        nonlocal asked
        if isinstance(received.body, FindSegments):
            asked += 1
            channel._shut(ChannelClosed("no"))
            raise ChannelClosed("no")

    b._hearing._hear = close_all  # type: ignore[method-assign]
    with pytest.raises(TransferFailed, match=r"unreachable|closed|broke"):
        await a.segments_of("b", "kv", timeout_s=5)
    assert 1 < asked <= link_module.CHANNELS_PER_REQUEST_MAX


async def test_the_first_request_may_come_together_with_the_confirmation_of_its_lane(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow network both sides have listed a lane before the owner hears its dialler's last byte; the request is behind that byte."""
    real, merged = sockets_module.greet, []

    async def greet(sock: BulkSocket, hello: LaneHello) -> LaneWelcome:
        say, send = sock.say, sock.send

        async def all_but_the_confirmation(data: bytes) -> None:
            if data != CONFIRM:
                await say(data)

        def with_it(data: memoryview, fds: Sequence[int] = ()) -> int:
            sock.send = send  # type: ignore[method-assign]
            merged.append(hello.sender)
            return send(memoryview(CONFIRM + bytes(data)), fds) - len(CONFIRM)

        if hello.sender == "b":
            sock.say, sock.send = all_but_the_confirmation, with_it  # type: ignore[method-assign]
        return await real(sock, hello)

    monkeypatch.setattr(sockets_module, "greet", greet)
    a, b = await yard.pair()
    data = random_bytes(4096)
    a.register(data, "kv")
    (segment,) = await b.segments_of("a", "kv", timeout_s=5)
    here = np.zeros_like(data)
    transfer = b.read([Part(segment, here)], timeout_s=5)
    (await transfer.outcome()).check()
    await transfer.release()
    assert (here == data).all()
    assert merged == ["b"], "the read went another way, so nothing was shown"

"""Channels between two ends in this process, over real sockets and on both loops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from interlock.host.base import Listener
from interlock.host.real import RealHost
from interlock.wire.channel import Channel, connect_channel, serve_channels
from interlock.wire.envelope import Envelope, Hello
from interlock.wire.framing import decode_envelope, encode_frame
from interlock.wire.identity import Identity, KnownPeers


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Ask(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    text: str = ""
    data: bytes = b""


class Tell(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    text: str = ""
    data: bytes = b""


Either = Ask | Tell


class RawPeer:
    """Speaks bytes: says what no channel of ours would say."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    async def hello(self, name: str = "raw", incarnation: int = 1, **more: Any) -> Envelope:
        hello = Hello(**{"protocol": 1, "role": "test", "attempt": 1, **more})
        await self.stream.send(encode_frame(name, incarnation, 1, 0, hello))
        return await self.frame()

    async def frame(self) -> Envelope:
        length = int.from_bytes(await self.stream.receive_exactly(4), "big")
        return decode_envelope(await self.stream.receive_exactly(length))

    async def closed_after(self) -> bytes:
        """What is still heard until the other side closes."""
        heard = b""
        with contextlib.suppress(EOFError, ConnectionError):
            async with asyncio.timeout(20):
                while True:
                    heard += await self.stream.receive_exactly(1)
        return heard


class Place:
    """One listening end and whatever connects to it."""

    def __init__(self, host: RealHost, directory: Path) -> None:
        self.host = host
        self.address = f"unix:{directory}/s"
        self.served: asyncio.Queue[Channel] = asyncio.Queue()
        self.me = Identity("server", 1)
        self.ends: list[Any] = []
        self.leave = asyncio.Event()
        self.Ask, self.Tell, self.Either = Ask, Tell, Either

    async def serve(self, on_channel: Any = None, **more: Any) -> Listener:
        async def hand_over(channel: Channel) -> None:
            self.served.put_nowait(channel)
            await self.leave.wait()

        options = {"me": self.me, "accept": Either, "on_channel": on_channel or hand_over, **more}
        listener = await serve_channels(
            self.host,
            more.pop("address", self.address),
            **{k: v for k, v in options.items() if k != "address"},
        )
        self.ends.append(listener)
        return listener

    async def connect(self, name: str = "client", incarnation: int = 1, **more: Any) -> Channel:
        options = {
            "me": Identity(name, incarnation),
            "role": "test",
            "accept": Either,
            "deadline_s": 20,
            **more,
        }
        channel = await connect_channel(self.host, options.pop("address", self.address), **options)
        self.ends.append(channel)
        return channel

    async def pair(self, **more: Any) -> tuple[Channel, Channel]:
        """(connected, served)"""
        await self.serve()
        client = await self.connect(**more)
        return client, await asyncio.wait_for(self.served.get(), 20)

    async def raw(self) -> RawPeer:
        stream = await self.host.connect(self.address)
        self.ends.append(stream)
        return RawPeer(stream)


@pytest.fixture
def host() -> Iterator[RealHost]:
    host = RealHost()
    yield host
    host.close()


@pytest.fixture
async def place(host: RealHost, tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(host, tmp_path)
    yield place
    for end in reversed(place.ends):
        closing = end.close()
        if closing is not None:
            await closing


@pytest.fixture
def known() -> KnownPeers:
    return KnownPeers()

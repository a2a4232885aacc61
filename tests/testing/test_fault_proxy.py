"""The fault proxy on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from interlock.testing.proxy import FaultProxy

pytest_plugins = ["interlock.testing.plugin"]
Start = Callable[[str, str], Awaitable[FaultProxy]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1024):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.fixture
async def back(tmp_path: Path):
    server = await asyncio.start_unix_server(echo, tmp_path / "back")
    yield f"unix:{tmp_path}/back"
    server.close()
    await server.wait_closed()


async def test_bytes_pass_both_ways_and_late_when_a_cut_heals(
    tmp_path: Path, back: str, fault_proxy: Start
) -> None:
    proxy = await fault_proxy(f"unix:{tmp_path}/front", back)
    reader, writer = await asyncio.open_unix_connection(tmp_path / "front")
    writer.write(b"one")
    assert await reader.readexactly(3) == b"one"
    proxy.cut()
    writer.write(b"two")
    answer = asyncio.create_task(reader.readexactly(3))
    done, _ = await asyncio.wait([answer], timeout=0.1)
    assert not done
    proxy.heal()
    assert await answer == b"two"
    writer.close()


async def test_a_reset_tells_both_and_a_half_open_connection_one(
    tmp_path: Path, back: str, fault_proxy: Start
) -> None:
    proxy = await fault_proxy("tcp:127.0.0.1:0", back)
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port())
    writer.write(b"one")
    assert await reader.readexactly(3) == b"one"
    assert proxy.half_open(told="back") == 1
    writer.write(b"two")
    answer = asyncio.create_task(reader.read(3))
    done, _ = await asyncio.wait([answer], timeout=0.1)
    assert not done, "nobody told us"
    proxy.reset()
    with pytest.raises(ConnectionError):
        await answer
    writer.close()


async def test_nobody_behind_it_is_told_by_the_end_of_the_connection(
    tmp_path: Path, fault_proxy: Start
) -> None:
    await fault_proxy(f"unix:{tmp_path}/front", f"unix:{tmp_path}/nobody")
    reader, writer = await asyncio.open_unix_connection(tmp_path / "front")
    with contextlib.suppress(ConnectionError):
        assert await reader.read(1) == b""
    writer.close()

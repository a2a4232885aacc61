"""Streams, descriptors, credentials and listeners, over real sockets on both loops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from interlock.core.limits import FDS_PER_MESSAGE_MAX, FDS_WAITING_MAX
from interlock.host import sockets
from interlock.host import streams as streams_module
from interlock.host.base import Stream
from interlock.host.real import RealHost


@contextlib.asynccontextmanager
async def pair(host: RealHost, address: str) -> AsyncIterator[tuple[Stream, Stream]]:
    """(connected, accepted), both open until the end of the block."""
    accepted: asyncio.Queue[Stream] = asyncio.Queue()

    async def serve(stream: Stream) -> None:
        accepted.put_nowait(stream)
        await asyncio.Event().wait()

    listener = await host.listen(address, serve)
    client = await host.connect(listener.address)
    try:
        async with asyncio.timeout(20):
            yield client, await accepted.get()
    finally:
        client.close()
        await listener.close()


@pytest.fixture
async def streams(host: RealHost, tmp_path: Path) -> AsyncIterator[tuple[Stream, Stream]]:
    async with pair(host, f"unix:{tmp_path}/s") as both:
        yield both


async def test_bytes_arrive_in_order_through_a_full_socket(streams: Any) -> None:
    client, server = streams
    data = os.urandom(3_000_000)
    sending = asyncio.create_task(client.send(data))
    assert b"".join([await server.receive_exactly(500_000) for _ in range(6)]) == data
    await sending


async def test_writes_of_two_tasks_do_not_interleave(streams: Any) -> None:
    client, server = streams
    one, two = b"1" * 1_000_000, b"2" * 1_000_000
    sending = asyncio.gather(client.send(one), client.send(two))
    got = await server.receive_exactly(2_000_000)
    await sending
    assert got in (one + two, two + one)


async def test_a_descriptor_arrives_with_the_first_byte_it_was_sent_with(
    streams: Any, tmp_path: Path
) -> None:
    client, server = streams
    (tmp_path / "file").write_text("hello")
    with open(tmp_path / "file", "rb") as file:
        await client.send(b"before")
        await client.send(b"with", [file.fileno()])
    await client.send(b"after")
    assert await server.receive_exactly(7) == b"beforew"
    (fd,) = server.take_fds()
    with open(fd, "rb") as file:
        assert file.read() == b"hello"
        assert not os.get_inheritable(fd)
    assert await server.receive_exactly(8) == b"ithafter"
    assert server.take_fds() == []


async def test_descriptors_nobody_takes_are_bounded_and_closed_with_the_stream(
    streams: Any, descriptors: Callable[[], set[str]]
) -> None:
    client, server = streams
    before = len(descriptors())
    messages = FDS_WAITING_MAX // FDS_PER_MESSAGE_MAX + 1
    for _ in range(messages):
        await client.send(b"x", [0] * FDS_PER_MESSAGE_MAX)
    with pytest.raises(ConnectionError, match="descriptors"):
        await server.receive_exactly(messages)
    server.close()
    assert len(descriptors()) < before + FDS_PER_MESSAGE_MAX


async def test_a_reader_that_takes_its_descriptors_gets_any_number_of_them(streams: Any) -> None:
    client, server = streams
    count = 3 * FDS_WAITING_MAX

    async def send() -> None:
        for _ in range(count):
            await client.send(b"x", [0])

    sending = asyncio.create_task(send())
    for _ in range(count):
        assert await server.receive_exactly(1) == b"x"
        for _ in range(3):
            await asyncio.sleep(0)  # more arrives meanwhile
        fds = server.take_fds()
        assert fds
        for fd in fds:
            os.close(fd)
    await sending


async def test_a_stream_reads_ahead_of_its_reader_only_up_to_a_bound(streams: Any) -> None:
    client, server = streams
    sending = asyncio.create_task(client.send(bytes(50_000_000)))
    await server.receive_exactly(1)
    for _ in range(100):
        await asyncio.sleep(0)
    assert not sending.done()
    assert len(server._buffer) < 3 * sockets.RECEIVE_BYTES
    assert len(await server.receive_exactly(49_999_999)) == 49_999_999
    await sending


async def test_a_peer_that_leaves_is_seen_as_the_end(streams: Any) -> None:
    client, server = streams
    await client.send(b"half")
    client.close()
    with pytest.raises(EOFError):
        await server.receive_exactly(8)
    with pytest.raises(ConnectionError):
        await server.send(b"anybody?")


async def test_an_address_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/absent/a.sock"):
        sockets.listen_unix(f"{tmp_path}/absent/a.sock")


async def test_closing_a_stream_wakes_its_reader_and_its_writer(streams: Any) -> None:
    client, _ = streams
    reading = asyncio.create_task(client.receive_exactly(1))
    writing = asyncio.create_task(client.send(bytes(50_000_000)))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not reading.done()
    assert not writing.done()
    client.close()
    client.close()
    for task in (reading, writing):
        with pytest.raises(ConnectionError):
            await task


async def test_the_peer_of_a_unix_socket_is_known_by_the_kernel(streams: Any) -> None:
    for stream in streams:
        assert (stream.peer.pid, stream.peer.uid) == (os.getpid(), os.getuid())
        watch = stream.watch_peer()
        assert watch is not None
        assert watch.pid == os.getpid()
        assert not watch.exited
        watch.close()


CONNECT_AND_FORK = """
import socket
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
if os.fork() == 0:  # keeps the connection open beyond its parent's life
    os.setsid()
    os.write(SAY, b"forked\\n")
    time.sleep(600)
sock.sendall(b"me")
time.sleep(600)
"""


async def test_exit_is_proven_by_pidfd_while_a_fork_keeps_the_connection_open(
    host: RealHost, children: Any, tmp_path: Path
) -> None:
    accepted: asyncio.Queue[Stream] = asyncio.Queue()

    async def serve(stream: Stream) -> None:
        accepted.put_nowait(stream)
        await asyncio.Event().wait()

    listener = await host.listen(f"unix:{tmp_path}/s", serve)
    child, said = await children.start(CONNECT_AND_FORK, f"{tmp_path}/s")
    async with asyncio.timeout(20):
        stream = await accepted.get()
        watch = stream.watch_peer()
        assert watch is not None
        assert watch.pid == child.pid
        assert await stream.receive_exactly(2) == b"me"
        assert await children.line(said) == "forked"
        assert not watch.exited
        os.kill(child.pid, signal.SIGKILL)
        await watch.wait_exited()
        assert watch.exited
        with pytest.raises(TimeoutError):  # no EOF: the connection says nothing about the process
            async with asyncio.timeout(0.1):
                await stream.receive_exactly(1)
    watch.close()
    await listener.close()


async def test_a_peer_that_was_gone_before_it_was_asked_about_is_proven_gone(
    host: RealHost, children: Any, tmp_path: Path
) -> None:
    accepted: asyncio.Queue[Stream] = asyncio.Queue()

    async def serve(stream: Stream) -> None:
        accepted.put_nowait(stream)
        await asyncio.Event().wait()

    listener = await host.listen(f"unix:{tmp_path}/s", serve)
    child, _ = await children.start(
        "import socket\nsocket.socket(socket.AF_UNIX).connect(sys.argv[1])", f"{tmp_path}/s"
    )
    async with asyncio.timeout(20):
        stream = await accepted.get()
        assert await child.wait() == 0
        watch = stream.watch_peer()
        assert watch is not None
        await watch.wait_exited()
        watch.kill()
    watch.close()
    await listener.close()


async def test_a_unix_socket_is_private_and_its_file_leaves_with_it(host: RealHost, tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def serve(stream: Stream) -> None:
        pass

    listener = await host.listen(f"unix:{path}", serve)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await listener.close()
    assert not path.exists()


async def test_a_dead_predecessors_file_is_replaced_and_a_living_one_is_not(
    host: RealHost, tmp_path: Path
) -> None:
    path = tmp_path / "s"

    async def serve(stream: Stream) -> None:
        await stream.send(b"!")

    first = await host.listen(f"unix:{path}", serve)
    with pytest.raises(FileExistsError, match="another process listens"):
        await host.listen(f"unix:{path}", serve)
    os.rename(path, tmp_path / "kept")
    await first.close()
    os.rename(tmp_path / "kept", path)  # as a SIGKILLed predecessor leaves it
    with pytest.raises(ConnectionError, match="nobody listens"):
        await host.connect(f"unix:{path}")
    second = await host.listen(f"unix:{path}", serve)
    stream = await host.connect(f"unix:{path}")
    assert await asyncio.wait_for(stream.receive_exactly(1), 10) == b"!"
    stream.close()
    await second.close()


async def test_a_listener_leaves_its_successors_file_alone(host: RealHost, tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def serve(stream: Stream) -> None:
        pass

    first = await host.listen(f"unix:{path}", serve)
    path.unlink()
    second = await host.listen(f"unix:{path}", serve)
    await first.close()
    assert path.exists()
    await second.close()


async def test_run_directories_may_lie_deeper_than_a_socket_address_is_long(
    host: RealHost, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    async with pair(host, f"unix:{deep}/socket") as (client, server):
        await client.send(b"deep")
        assert await server.receive_exactly(4) == b"deep"


async def test_tcp_carries_bytes_and_refuses_descriptors(host: RealHost) -> None:
    async with pair(host, "tcp:127.0.0.1:0") as (client, server):
        await client.send(b"bytes")
        assert await server.receive_exactly(5) == b"bytes"
        assert server.watch_peer() is None
        with pytest.raises(ValueError, match="Unix"):
            await client.send(b"x", [0])


async def test_nobody_there_is_a_connection_error(host: RealHost, tmp_path: Path) -> None:
    for address in (f"unix:{tmp_path}/none", f"tcp:127.0.0.1:{sockets.free_port()}"):
        with pytest.raises(ConnectionError):
            await host.connect(address)


@pytest.mark.parametrize(
    "address", ["", "unix:relative", "tcp:host", "tcp:host:99999", "tcp::1", "http://x", "/path"]
)
async def test_what_is_no_address_is_refused_in_words(host: RealHost, address: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        await host.connect(address)


async def test_connections_are_bounded_and_a_place_is_free_again_when_one_ends(
    host: RealHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "CONNECTIONS_MAX", 1)

    async def echo(stream: Stream) -> None:
        while True:
            try:
                await stream.send(await stream.receive_exactly(1))
            except EOFError:
                ended.set()
                return

    ended = asyncio.Event()
    listener = await host.listen(f"unix:{tmp_path}/s", echo)
    async with asyncio.timeout(20):
        first = await host.connect(listener.address)
        await first.send(b"1")
        assert await first.receive_exactly(1) == b"1"
        second = await host.connect(listener.address)
        with pytest.raises((EOFError, ConnectionError)):
            await second.receive_exactly(1)
        first.close()
        await ended.wait()
        await asyncio.sleep(0)
        third = await host.connect(listener.address)
        await third.send(b"3")
        assert await third.receive_exactly(1) == b"3"
    second.close()
    third.close()
    await listener.close()


async def test_a_handler_that_fails_ends_its_connection_alone(
    host: RealHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(stream: Stream) -> None:
        if await stream.receive_exactly(1) == b"!":
            raise RuntimeError("boom")
        await stream.send(b".")

    listener = await host.listen(f"unix:{tmp_path}/s", serve)
    bad, good = await host.connect(listener.address), await host.connect(listener.address)
    async with asyncio.timeout(20):
        await bad.send(b"!")
        with pytest.raises((EOFError, ConnectionError)):
            await bad.receive_exactly(1)
        await good.send(b"?")
        assert await good.receive_exactly(1) == b"."
    assert "boom" in caplog.text
    bad.close()
    good.close()
    await listener.close()
    assert sys.exc_info() == (None, None, None)

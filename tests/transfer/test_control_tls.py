"""Control channels under TLS with the lanes' certificates: nothing readable crosses, and nobody without a certificate gets a word in."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from interlock.host.bulk_tls import TlsFiles
from interlock.host.real import RealHost
from interlock.host.stream_tls import RECORD_BYTES_MAX, secure
from interlock.host.streams import connect_stream, listen
from interlock.transfer.engine import LaneOptions, Part, TransferFailed

from .conftest import Yard, random_bytes

TOKEN = b"a secret of the test"


def make_certificates(where: Path) -> TlsFiles:
    where.mkdir()
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    subprocess.run(
        ["openssl", *command.split(), "-keyout", f"{where}/key.pem", "-out", f"{where}/cert.pem"],
        check=True,
        capture_output=True,
        timeout=30,
    )
    return TlsFiles(f"{where}/cert.pem", f"{where}/key.pem", f"{where}/cert.pem")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_certificates(tmp_path_factory.mktemp("ours") / "tls")


@pytest.fixture(scope="module")
def of_another_authority(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_certificates(tmp_path_factory.mktemp("theirs") / "tls")


def over(tls: TlsFiles | None) -> LaneOptions:
    return LaneOptions(kinds=("tcp",), tls=tls)


@contextlib.asynccontextmanager
async def wire_tap(back: str) -> AsyncIterator[tuple[str, bytearray]]:
    """(where to dial, all that passed between there and `back`)."""
    heard = bytearray()
    _, host, port = back.split(":")

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            heard.extend(data)
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(pass_on(reader, there_writer), pass_on(there_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}", heard
    finally:
        server.close()


async def test_over_tcp_neither_the_token_nor_a_word_can_be_read_and_without_certificates_both_can(
    yard: Yard, certificates: TlsFiles
) -> None:
    data = random_bytes(1 << 20)
    for tls in (certificates, None):
        a = await yard.make("a", over(tls), address="tcp:127.0.0.1:0")
        b = await yard.make("b", over(tls), address="tcp:127.0.0.1:0")
        b.register(data, "a label to be read")
        async with wire_tap(b.address) as (address, heard):
            yard.directory.update("b", address)
            (segment,) = await a.segments_of("b", "a label to be read", timeout_s=10)
            here = np.zeros_like(data)
            transfer = a.read([Part(segment, here)], timeout_s=10)
            (await transfer.outcome()).check()
            await transfer.release()
            await a.notify("b", b"a payload to be read", timeout_s=10)
            assert (here == data).all()
            assert len(heard) > 1000
            for secret in (TOKEN, b"a label to be read", b"a payload to be read"):
                assert (secret in heard) is (tls is None), secret
        await yard.end("a")
        await yard.end("b")


@pytest.mark.parametrize(
    "who", ["no certificate", "a certificate of another authority", "a certificate where there is no TLS"]
)
async def test_who_cannot_agree_on_tls_is_not_connected_by_its_deadline_and_is_told_why(
    yard: Yard, certificates: TlsFiles, of_another_authority: TlsFiles, who: str
) -> None:
    dials, listens = {
        "no certificate": (None, certificates),
        "a certificate of another authority": (of_another_authority, certificates),
        "a certificate where there is no TLS": (certificates, None),
    }[who]
    a = await yard.make("a", over(dials), address="tcp:127.0.0.1:0")
    b = await yard.make("b", over(listens), address="tcp:127.0.0.1:0")
    b.register(random_bytes(4096), "kv")
    with pytest.raises(TransferFailed, match=r"certificate|TLS|closed the connection"):
        await a.segments_of("b", "kv", timeout_s=1.5)
    assert not b.peers(), "the listener made a peer of somebody whom it cannot know"


async def test_unix_control_addresses_stay_plain_because_the_kernel_says_who_is_there(
    yard: Yard, certificates: TlsFiles
) -> None:
    a, b = await yard.make("a", over(certificates)), await yard.make("b", over(None))
    b.register(random_bytes(4096), "kv")
    assert len(await a.segments_of("b", "kv", timeout_s=5)) == 1


@contextlib.asynccontextmanager
async def streams(certificates: TlsFiles) -> AsyncIterator[tuple[object, object]]:
    """Two ends of one stream under TLS."""
    dials, listens = certificates.contexts()
    arrived: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    over_ = asyncio.Event()

    async def serve(plain: object) -> None:
        arrived.set_result(await secure(plain, listens, listens=True))  # type: ignore[arg-type]
        await over_.wait()

    listener = await listen("tcp:127.0.0.1:0", serve)  # type: ignore[arg-type]
    mine = await secure(await connect_stream(listener.address), dials, listens=False)
    try:
        yield mine, await arrived
    finally:
        over_.set()
        mine.close()
        await listener.close()


async def test_long_messages_both_ways_at_once_arrive_whole(certificates: TlsFiles) -> None:
    data = random_bytes(9_000_001).tobytes()
    async with streams(certificates) as (one, two):

        async def say(stream: object) -> None:
            for at in range(0, len(data), 3_000_000):
                await stream.send(data[at : at + 3_000_000])  # type: ignore[attr-defined]

        async def hear(stream: object) -> bytes:
            first = await stream.receive_exactly(7)  # type: ignore[attr-defined]
            return bytes(first + await stream.receive_exactly(len(data) - 7))  # type: ignore[attr-defined]

        async with asyncio.timeout(20):
            _, _, at_two, at_one = await asyncio.gather(say(one), say(two), hear(two), hear(one))
    assert at_one == data
    assert at_two == data


async def test_the_end_of_the_connection_is_the_end_of_the_stream(certificates: TlsFiles) -> None:
    async with streams(certificates) as (one, two):
        await one.send(b"last words")  # type: ignore[attr-defined]
        one.close()  # type: ignore[attr-defined]
        assert await two.receive_exactly(10) == b"last words"  # type: ignore[attr-defined]
        with pytest.raises((EOFError, ConnectionError)):
            async with asyncio.timeout(5):
                await two.receive_exactly(1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"\x00\x00\x00\x20" + b"x" * 32, id="a frame of a plain channel"),
        pytest.param(b"\x16\x03\x01" + (RECORD_BYTES_MAX + 1).to_bytes(2, "big"), id="a record too long"),
        pytest.param(b"\x16\x03\x01\x00\x05hello", id="a record of rubbish"),
        pytest.param(b"", id="nothing at all"),
    ],
)
async def test_what_is_no_tls_ends_the_connection_and_not_the_listener(
    certificates: TlsFiles, said: bytes
) -> None:
    _, listens = certificates.contexts()
    ended: asyncio.Queue[BaseException | None] = asyncio.Queue()

    async def serve(plain: object) -> None:
        try:
            await secure(plain, listens, listens=True)  # type: ignore[arg-type]
        except (ConnectionError, EOFError) as error:
            ended.put_nowait(error)
        else:
            ended.put_nowait(None)

    host = RealHost()
    listener = await listen("tcp:127.0.0.1:0", serve)  # type: ignore[arg-type]
    try:
        for _ in range(2):
            stream = await connect_stream(listener.address)
            await stream.send(said)
            if not said:
                stream.close()
            async with asyncio.timeout(5):
                assert isinstance(await ended.get(), ConnectionError)
            stream.close()
    finally:
        await listener.close()
        host.close()

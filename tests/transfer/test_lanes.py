"""Each kind of lane conforms; TLS, TCP without a token, mute and hostile clients; lanes that break, stall and trickle."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from interlock.host.bulk_tls import TlsFiles
from interlock.testing.check_lane import check_lane
from interlock.testing.proxy import FaultProxy
from interlock.transfer.engine import LaneOptions, Part, TransferEngine

from .conftest import BOTH, TCP, Yard, random_bytes, until


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    where = tmp_path_factory.mktemp("tls")
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    subprocess.run(
        ["openssl", *command.split(), "-keyout", f"{where}/key.pem", "-out", f"{where}/cert.pem"],
        check=True,
        capture_output=True,
        timeout=30,
    )
    return TlsFiles(f"{where}/cert.pem", f"{where}/key.pem", f"{where}/cert.pem")


@pytest.mark.parametrize(
    "lanes",
    [
        pytest.param(TCP, id="tcp"),
        pytest.param(LaneOptions(kinds=("shm",)), id="shm"),
        pytest.param(LaneOptions(kinds=("shm",), read_processes=False), id="shm-by-socket"),
        pytest.param(BOTH, id="both"),
    ],
)
async def test_the_lane_conforms(lanes: LaneOptions, tmp_path: Path) -> None:
    await check_lane(lanes, tmp_path)


async def test_the_tcp_lane_conforms_under_tls(certificates: TlsFiles, tmp_path: Path) -> None:
    await check_lane(LaneOptions(kinds=("tcp",), tls=certificates), tmp_path)


async def test_one_side_with_tls_and_one_without_have_no_lane_and_say_so(
    certificates: TlsFiles, yard: Yard
) -> None:
    a = await yard.make("a", LaneOptions(kinds=("tcp",), tls=certificates))
    await yard.make("b")
    with pytest.raises(Exception, match=r"no lane could be opened|not connected"):
        await a.open("b", timeout_s=2)
    assert any("certificates" in words for words in a.explain("b"))


def lane_port(engine: TransferEngine) -> int:
    return engine._kinds["tcp"]._port_got  # type: ignore[attr-defined]


async def test_mute_and_babbling_clients_of_a_lane_get_no_answer_and_hold_nobody_up(yard: Yard) -> None:
    a, b = await yard.pair()
    strangers = []
    for number in range(50):
        sock = socket.create_connection(("127.0.0.1", lane_port(b)))
        sock.settimeout(5.0)
        if number % 2:
            sock.sendall(b"\xff\xff" + b"x" * 100)
        strangers.append(sock)
    begun_s = time.monotonic()
    await a.open("b", timeout_s=5)
    assert time.monotonic() - begun_s < 3.0, "greetings of others held ours up"
    loop = asyncio.get_running_loop()
    for sock in strangers[1::2]:
        assert await loop.run_in_executor(None, _rest, sock) == b"", "a babbling client was answered"
    for sock in strangers:
        sock.close()


def _rest(sock: socket.socket) -> bytes:
    try:
        return sock.recv(10)
    except ConnectionResetError:
        return b""


class Proxied:
    """Two engines whose TCP lane to the owner goes through a fault proxy; control does not."""

    def __init__(self, proxy: FaultProxy, a: TransferEngine, b: TransferEngine) -> None:
        self.proxy, self.a, self.b = proxy, a, b


async def proxied(yard: Yard, kinds: tuple[str, ...] = ("tcp",)) -> Proxied:
    """`a` is the smaller name: only its dials go through the proxy, and b's to a are made impossible."""
    front = socket.create_server(("127.0.0.1", 0))
    port = front.getsockname()[1]
    front.close()
    b = await yard.make("b", LaneOptions(kinds=kinds, host="127.0.0.1"))
    kind = b._kinds["tcp"]
    proxy = FaultProxy(f"tcp:127.0.0.1:{port}", f"tcp:127.0.0.1:{lane_port(b)}")
    await proxy.start()
    kind._port_got = port  # type: ignore[attr-defined]
    a = await yard.make("a", LaneOptions(kinds=kinds, host="127.0.0.1", reachable="127.0.0.77"))
    a._kinds["tcp"]._port_got = 1  # type: ignore[attr-defined]
    return Proxied(proxy, a, b)


async def test_a_lane_that_stands_still_fails_by_the_deadline_and_its_release_follows(yard: Yard) -> None:
    """Hazard W1: outcome at the deadline, release only when no byte can land, and then none does."""
    rig = await proxied(yard)
    try:
        source, here = random_bytes(32 << 20), np.zeros(32 << 20, np.uint8)
        rig.b.register(source, "kv")
        (segment,) = await rig.a.segments_of("b", "kv", timeout_s=5)
        first = rig.a.read([Part(segment, here, [(0, 0, 10)])], timeout_s=5)
        (await first.outcome()).check()
        rig.proxy.cut()
        transfer = rig.a.read([Part(segment, here)], timeout_s=0.4)
        begun_s = time.monotonic()
        outcome = await transfer.outcome()
        assert outcome.code == "deadline"
        assert "from b" in outcome.message
        assert time.monotonic() - begun_s < 2.0
        await transfer.release()
        here[:] = 5
        rig.proxy.heal()
        await asyncio.sleep(0.2)
        assert (here == 5).all(), "late bytes landed in memory that was released"
        again = rig.a.read([Part(segment, here)], timeout_s=10)
        (await again.outcome()).check()
        await again.release()
        assert (here == source).all()
    finally:
        await rig.proxy.close()


async def test_connections_that_are_lost_are_replaced_within_the_deadline(yard: Yard) -> None:
    rig = await proxied(yard)
    try:
        source, here = random_bytes(32 << 20), np.zeros(32 << 20, np.uint8)
        rig.b.register(source, "kv")
        (segment,) = await rig.a.segments_of("b", "kv", timeout_s=5)
        rig.proxy.bytes_per_s = 60e6
        for _ in range(2):
            transfer = rig.a.read([Part(segment, here)], timeout_s=15)
            await asyncio.sleep(0.15)
            assert rig.proxy.reset(), "nothing went through the proxy"
            rig.proxy.bytes_per_s = None
            outcome = await transfer.outcome()
            await transfer.release()
            assert outcome.ok, outcome.message
            assert (here == source).all()
            here[:] = 0
            rig.proxy.bytes_per_s = 60e6
    finally:
        await rig.proxy.close()


async def test_pieces_of_a_lane_that_breaks_move_to_the_others(yard: Yard) -> None:
    rig = await proxied(yard, ("shm", "tcp"))
    try:
        source, here = random_bytes(4 << 20), np.zeros(4 << 20, np.uint8)
        rig.b.register(source, "kv")
        (segment,) = await rig.a.segments_of("b", "kv", timeout_s=5)
        await rig.a.open("b", timeout_s=5)
        driver = rig.a._peers.look("b").driver  # type: ignore[union-attr]
        assert driver.usable[0].name.kind == "shm"
        stamps = rig.a.stamps("b")
        for pull in list(driver.usable[0].pulls):  # type: ignore[attr-defined]
            pull.sock.shutdown()
        transfer = rig.a.read([Part(segment, here)], timeout_s=5)
        outcome = (await transfer.outcome()).check()
        await transfer.release()
        assert (here == source).all()
        assert "tcp" in outcome.lanes or rig.a.stamps("b") != stamps
        await until(lambda: rig.a.stamps("b") is None or rig.a.stamps("b") != stamps)
        again = rig.a.read([Part(segment, here)], timeout_s=5)
        assert (await again.outcome()).check().lanes.get("shm"), "the broken lane was not made anew"
        await again.release()
    finally:
        await rig.proxy.close()


async def test_a_half_open_lane_is_found_out_and_replaced(yard: Yard) -> None:
    """The owner is told that the connections are gone, the reader never is."""
    rig = await proxied(yard)
    try:
        source, here = random_bytes(1 << 20), np.zeros(1 << 20, np.uint8)
        rig.b.register(source, "kv")
        (segment,) = await rig.a.segments_of("b", "kv", timeout_s=5)
        first = rig.a.read([Part(segment, here)], timeout_s=5)
        (await first.outcome()).check()
        await first.release()
        rig.proxy.half_open(told="back")
        transfer = rig.a.read([Part(segment, here)], timeout_s=15)
        outcome = await transfer.outcome()
        await transfer.release()
        assert outcome.ok, outcome.message
    finally:
        await rig.proxy.close()

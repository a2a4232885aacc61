"""Hosts in network namespaces, with links that are cut: each transfer ends by its deadline, by name; after healing all work."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from interlock.testing.transfer_storms import PeerProcess

pytestmark = pytest.mark.netns
ROUTER = f"itl{os.getpid() % 100000}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10, capture_output=True)


class Hosts:
    """`count` network namespaces, each with a link to a router, which is a namespace, too: nothing of the machine's is touched."""

    def __init__(self, count: int) -> None:
        self.names = [f"{ROUTER}h{n}" for n in range(count)]
        ip("netns", "add", ROUTER)
        ip("netns", "exec", ROUTER, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        for n, name in enumerate(self.names):
            ip("netns", "add", name)
            ip("-n", ROUTER, "link", "add", f"v{n}", "type", "veth", "peer", "name", "eth", "netns", name)
            ip("-n", ROUTER, "addr", "add", f"10.77.{n}.1/24", "dev", f"v{n}")
            ip("-n", ROUTER, "link", "set", f"v{n}", "up")
            ip("-n", name, "addr", "add", f"{self.address(n)}/24", "dev", "eth")
            ip("-n", name, "link", "set", "eth", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "route", "add", "default", "via", f"10.77.{n}.1")

    def address(self, n: int) -> str:
        return f"10.77.{n}.2"

    def cut(self, n: int) -> None:
        ip("-n", ROUTER, "link", "set", f"v{n}", "down")

    def heal(self, n: int) -> None:
        ip("-n", ROUTER, "link", "set", f"v{n}", "up")

    def lose_route(self, n: int, other: int) -> None:
        ip("-n", self.names[n], "route", "add", "blackhole", f"{self.address(other)}/32")

    def find_route(self, n: int, other: int) -> None:
        ip("-n", self.names[n], "route", "del", "blackhole", f"{self.address(other)}/32")

    def close(self) -> None:
        for name in [*self.names, ROUTER]:
            subprocess.run(["ip", "netns", "del", name], timeout=10, check=False)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts(3)
    yield made
    made.close()


async def start(hosts: Hosts, directory: Path) -> list[PeerProcess]:
    addresses = {f"p{n}": f"tcp:{hosts.address(n)}:7400" for n in range(len(hosts.names))}
    made = [
        PeerProcess(
            {"names": [f"p{n}"], "addresses": addresses, "lanes": ["tcp"], "host": hosts.address(n)},
            prefix=["ip", "netns", "exec", name],
        )
        for n, name in enumerate(hosts.names)
    ]
    await asyncio.gather(*(each.start() for each in made))
    return made


async def read(peer: PeerProcess, *others: str, timeout_s: float = 8.0) -> list[str]:
    answer = await peer.ask("read", pairs=[[peer.names[0], other] for other in others], timeout_s=timeout_s)
    assert not answer["wrong"]
    return answer["errors"]


@pytest.mark.parametrize("fault", ["link", "route"])
async def test_a_cut_ends_transfers_by_name_and_healing_needs_nobody(
    hosts: Hosts, tmp_path: Path, fault: str
) -> None:
    peers = await start(hosts, tmp_path)
    try:
        for n, peer in enumerate(peers):
            assert not await read(peer, *(f"p{m}" for m in range(3) if m != n))
        hosts.cut(1) if fault == "link" else hosts.lose_route(1, 0)
        begun_s = time.monotonic()
        errors = await read(peers[0], "p1", timeout_s=1.5)
        assert len(errors) == 1, "a read over a cut link succeeded"
        assert "p1" in errors[0]
        assert time.monotonic() - begun_s < 5.0
        assert not await read(peers[0], "p2"), "others suffer from the cut"
        hosts.heal(1) if fault == "link" else hosts.find_route(1, 0)
        for _ in range(3):
            errors = await read(peers[0], "p1", "p2") + await read(peers[1], "p0", "p2")
            if not errors:
                break
        assert not errors, "after healing not everybody works"
    finally:
        await asyncio.gather(*(peer.kill() for peer in peers))

"""Packets that are lost, repeated, late and overtaken: the bytes are right, each transfer ends by its deadline, and healing needs nobody."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from interlock.testing.transfer_network import LossyNetwork
from interlock.testing.transfer_storms import PeerProcess

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None or not os.path.exists("/dev/net/tun"),
        reason="needs root, iproute2 and /dev/net/tun",
    ),
]


@pytest.fixture
def network() -> Iterator[LossyNetwork]:
    with LossyNetwork(2, seed=7) as made:
        yield made


@asynccontextmanager
async def two_peers(network: LossyNetwork) -> AsyncIterator[list[PeerProcess]]:
    addresses = {f"p{n}": f"tcp:{network.address(n)}:7400" for n in range(2)}
    made = [
        PeerProcess(
            {"names": [f"p{n}"], "addresses": addresses, "lanes": ["tcp"], "host": network.address(n)},
            prefix=network.enter(n),
        )
        for n in range(2)
    ]
    try:
        await asyncio.gather(*(each.start() for each in made))
        yield made
    finally:
        await asyncio.gather(*(each.kill() for each in made))


async def read(peers: list[PeerProcess], times: int, timeout_s: float) -> list[str]:
    """Both read from each other, at once, so often. Bytes are compared there."""
    answers = await asyncio.gather(
        *(
            peer.ask(
                "read", pairs=[[peer.names[0], other.names[0]]] * times, timeout_s=timeout_s, hang_s=60.0
            )
            for peer, other in (peers, peers[::-1])
        )
    )
    for answer in answers:
        assert not answer["wrong"], answer["wrong"]
    return [error for answer in answers for error in answer["errors"]]


@pytest.mark.parametrize("loss", [0.01, 0.05])
async def test_lost_repeated_and_overtaken_packets_cost_time_and_nothing_else(
    network: LossyNetwork, loss: float
) -> None:
    network.loss, network.repeat, network.delay_s = loss, 0.02, (0.0, 0.005)
    async with two_peers(network) as peers:
        for _ in range(3):
            assert not await read(peers, 4, timeout_s=20.0)
    assert network.lost > 5, "nothing was lost, so nothing was shown"
    assert network.repeated > 2


async def test_where_most_is_lost_transfers_end_by_their_deadline_and_all_is_well_after_healing(
    network: LossyNetwork,
) -> None:
    async with two_peers(network) as peers:
        assert not await read(peers, 1, timeout_s=10.0)
        network.loss = 0.7
        begun_s = time.monotonic()
        errors = await read(peers, 3, timeout_s=3.0)
        assert time.monotonic() - begun_s < 20.0
        assert errors, "70 % of the packets were lost and nobody noticed"
        assert all("p0" in error or "p1" in error for error in errors)
        network.loss = 0.0
        for _ in range(5):
            errors = await read(peers, 1, timeout_s=8.0)
            if not errors:
                break
        assert not errors, "after healing not everybody works"

"""Where peers are: given addresses, and the coordinator's list, which hears of moves and outlives nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from interlock.core.limits import DIRECTORY_LEASE_SECONDS
from interlock.fleet.coordinator import Coordinator, CoordinatorConfig
from interlock.fleet.peer_book import PeerBook
from interlock.host.real import RealHost
from interlock.membership.directory import StaticDirectory, UnknownPeer
from interlock.membership.embedded import CoordinatorDirectory
from interlock.transfer.engine import LaneOptions, Part, TransferEngine
from interlock.wire.identity import Identity


async def test_given_addresses_change_and_tell_who_watches() -> None:
    directory = StaticDirectory({"a": "unix:/a"})
    moved: list[str] = []
    directory.watch(moved.append)
    directory.update("a", "unix:/a")
    directory.update("b", "unix:/b")
    assert moved == []
    directory.update("a", "unix:/other")
    assert moved == ["a"]
    assert await directory.address_of("a") == "unix:/other"
    with pytest.raises(UnknownPeer, match="no address of c"):
        await directory.address_of("c")


def test_a_lower_life_never_replaces_a_higher_one_and_silence_lapses() -> None:
    book = PeerBook()
    assert book.announce("a", 5, "unix:/5", 0.0) is None
    assert book.announce("a", 4, "unix:/4", 1.0) is None
    found = book.find("a", 1.0)
    assert found is not None
    assert found.address == "unix:/5"
    moved = book.announce("a", 6, "unix:/6", 2.0)
    assert moved is not None
    assert moved.address == "unix:/6"
    assert book.find("a", 2.0 + DIRECTORY_LEASE_SECONDS) is None


class Fleet:
    def __init__(self, path: Path) -> None:
        self.path, self.host = path, RealHost()
        self.address = f"unix:{path}/coordinator.sock"
        self.life = 0

    async def coordinator(self) -> Coordinator:
        self.life += 1
        state = self.path / "coordinator"
        state.mkdir(exist_ok=True, mode=0o700)
        config = CoordinatorConfig(address=self.address, state_dir=state)
        made = Coordinator(self.host, Identity("coordinator", self.life, b"c"), config)
        await made.start()
        return made

    async def engine(
        self, name: str, life: int = 1, where: str = ""
    ) -> tuple[TransferEngine, CoordinatorDirectory]:
        me = Identity(name, life, f"{name}{life}".encode())
        address = f"unix:{self.path}/{where or name}.sock"
        directory = CoordinatorDirectory(self.host, me, self.address, lambda: address)
        engine = TransferEngine(
            self.host, me, address, directory=directory, lanes=LaneOptions(kinds=("tcp",))
        )
        await engine.start()
        await directory.start()
        return engine, directory


async def found(directory: CoordinatorDirectory, peer: str) -> str:
    """Until the peer has announced itself."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await directory.address_of(peer)
            except UnknownPeer:
                await asyncio.sleep(0.01)


async def read_byte(engine: TransferEngine, peer: str) -> int:
    (segment,) = await engine.segments_of(peer, "kv", timeout_s=5)
    here = bytearray(1)
    transfer = engine.read([Part(segment, here)], timeout_s=5)
    (await transfer.outcome()).check()
    await transfer.release()
    return here[0]


async def test_engines_find_each_other_by_the_coordinator_and_after_a_move(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    coordinator = await fleet.coordinator()
    a, a_knows = await fleet.engine("a")
    b, b_knows = await fleet.engine("b")
    b.register(bytearray(b"1"), "kv")
    await found(a_knows, "b")
    assert await read_byte(a, "b") == ord("1")
    await b.close()
    await b_knows.close()
    again, again_knows = await fleet.engine("b", life=2, where="elsewhere")
    again.register(bytearray(b"2"), "kv")
    async with asyncio.timeout(10):
        while (await a_knows.address_of("b")).endswith("/b.sock"):
            await asyncio.sleep(0.01)
    assert await read_byte(a, "b") == ord("2"), "the old address was still believed"
    await coordinator.close()
    assert await read_byte(a, "b") == ord("2"), "without the coordinator nothing went any more"
    successor = await fleet.coordinator()
    third, third_knows = await fleet.engine("third")
    await found(third_knows, "b")
    assert await read_byte(third, "b") == ord("2")
    for engine, directory in ((a, a_knows), (again, again_knows), (third, third_knows)):
        await engine.close()
        await directory.close()
    await successor.close()
    fleet.host.close()

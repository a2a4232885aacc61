"""The simulated directory loses what a real one may lose, and the real one keeps the same words."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable
from pathlib import Path

import pytest

from interlock.host.base import Directory, Piece
from interlock.host.disk import DirectoryBusy, RealDirectory
from interlock.testing.plugin import Simulation
from interlock.testing.sim.host import SimHost
from interlock.testing.sim.kernel import KILLED, SimProcess

pytest_plugins = ["interlock.testing.plugin"]
PAGE = 4096
PATH = Path("/kv")


def pages(value: int, count: int) -> memoryview:
    """Page-aligned memory, as a direct write needs it."""
    memory = mmap.mmap(-1, count * PAGE)
    memory[:] = bytes([value]) * (count * PAGE)
    return memoryview(memory)


def ignore(_: SimProcess) -> None:
    """An exit that nobody acts on."""


def play(simulation: Simulation, use: Callable[[SimHost], None]) -> None:
    """Runs `use` in a simulated process."""
    seen: list[str] = []

    async def main(host: SimHost) -> int:
        use(host)
        seen.append("done")
        return 0

    async def story() -> None:
        simulation.kernel.start("a", "p", main, ignore)
        await asyncio.sleep(1.0)
        assert seen == ["done"]

    simulation.run(story)


def both_agree(directory: Directory) -> None:
    """What holds on either side of the seam."""
    directory.write_new("one.pack", pages(1, 2))
    with pytest.raises(FileExistsError):
        directory.write_new("one.pack", pages(0, 1))
    into = bytearray(10)
    directory.read("one.pack", [Piece(PAGE - 5, memoryview(into))])
    assert into == bytes([1]) * 10
    with pytest.raises(EOFError):
        directory.read("one.pack", [Piece(2 * PAGE - 5, memoryview(into))])
    directory.punch("one.pack", 0, PAGE)
    directory.read("one.pack", [Piece(PAGE - 5, memoryview(into))])
    assert into == bytes(5) + bytes([1]) * 5
    directory.append("log", b"ab")
    directory.append("log", b"c")
    assert directory.size("log") == 3
    assert directory.size("none") is None
    directory.make_folder("old")
    directory.rename("log", "old/log")
    assert [entry.name for entry in directory.list("old")] == ["log"]
    entries = {entry.name: entry for entry in directory.list()}
    assert entries["one.pack"].size_bytes == 2 * PAGE
    assert entries["one.pack"].allocated_bytes <= 2 * PAGE
    mapping = directory.map("index", PAGE)
    mapping.view[7] = 9
    mapping.close()
    directory.read("index", [Piece(0, memoryview(into))])
    assert into[7] == 9
    with pytest.raises(ValueError, match="not 8192"):
        directory.map("index", 2 * PAGE)
    directory.remove("one.pack")
    directory.remove("one.pack")
    with pytest.raises(FileNotFoundError):
        directory.read("one.pack", [Piece(0, memoryview(into))])
    directory.sync()


def test_the_real_directory_keeps_these_words(tmp_path: Path) -> None:
    directory = RealDirectory(tmp_path / "kv", "store")
    try:
        both_agree(directory)
    finally:
        directory.close()


def test_the_simulated_directory_keeps_these_words(simulation: Simulation) -> None:
    play(simulation, lambda host: both_agree(host.open_directory(PATH, "store")))


def test_a_directory_is_one_process_s_until_that_ends(simulation: Simulation) -> None:
    async def main(host: SimHost) -> int:
        host.open_directory(PATH, f"store of {host.process.name}")
        await asyncio.Event().wait()
        return 0

    async def story() -> None:
        first = simulation.kernel.start("a", "first", main, ignore)
        await asyncio.sleep(0.1)
        second = simulation.kernel.start("a", "second", main, ignore)
        await asyncio.sleep(0.1)
        assert isinstance(second.failure, DirectoryBusy)
        assert "store of first" in str(second.failure)
        second.failure = None  # it was meant to
        first.end(KILLED)
        third = simulation.kernel.start("a", "third", main, ignore)
        await asyncio.sleep(0.1)
        assert not third.dead

    simulation.run(story)


@pytest.mark.parametrize("simulation", range(20), indirect=True)
def test_a_power_cut_keeps_what_was_synced_and_any_part_of_the_rest(simulation: Simulation) -> None:
    disk = simulation.kernel.machine("a").disk

    def use(host: SimHost) -> None:
        directory = host.open_directory(PATH, "store")
        directory.write_new("kept", memoryview(bytes([1]) * PAGE))
        mapping = directory.map("index", 2 * PAGE)
        disk.sync_file(str(PATH / "index"))
        directory.sync()
        directory.write_new("nameless", memoryview(bytes([2]) * PAGE))
        mapping.view[0] = mapping.view[PAGE] = 3

    play(simulation, use)
    disk.power_cut()
    assert disk.names[str(PATH / "kept")].now == bytes([1]) * PAGE
    nameless = disk.names.get(str(PATH / "nameless"))
    assert nameless is None or nameless.now == bytes([2]) * PAGE
    index = disk.names[str(PATH / "index")].now
    assert len(index) == 2 * PAGE
    assert index[0] in (0, 3)
    assert index[PAGE] in (0, 3)

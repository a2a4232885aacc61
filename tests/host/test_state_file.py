"""A state file is whole, or it is named, set aside and never guessed at."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from interlock.host.files import RealFiles
from interlock.host.state_file import StateFile
from interlock.testing.plugin import Simulation
from interlock.testing.sim.host import SimHost

pytest_plugins = ["interlock.testing.plugin"]
BODY = bytes(range(256)) * 8


def state_file(folder: Path, kind: str = "requests of engine a", bytes_max: int = 1 << 16) -> StateFile:
    return StateFile(RealFiles(), folder / "requests.bin", kind, bytes_max)


def test_what_was_saved_comes_back_and_an_emptied_file_is_none(tmp_path: Path) -> None:
    file = state_file(tmp_path)
    assert file.load() is None
    file.save(BODY)
    assert state_file(tmp_path).load() == BODY
    file.empty()
    assert state_file(tmp_path).load() is None


@pytest.mark.parametrize("left", [0, 1, 10, 40, len(BODY), len(BODY) + 20])
def test_a_file_that_was_cut_short_is_refused_and_set_aside_with_its_bytes(tmp_path: Path, left: int) -> None:
    file = state_file(tmp_path)
    file.save(BODY)
    torn = file.path.read_bytes()[:left]
    file.path.write_bytes(torn)
    with pytest.raises(ValueError, match=r"requests\.bin cannot be used"):
        file.load()
    aside = file.set_aside()
    assert aside.read_bytes() == torn
    assert "unreadable" in aside.name
    assert file.load() is None


def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    file = state_file(tmp_path)
    file.save(b"body")
    whole = file.path.read_bytes()
    for at in range(len(whole)):
        file.path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="cannot be used"):
            file.load()


def test_a_whole_file_of_somebody_else_is_refused_by_its_name(tmp_path: Path) -> None:
    state_file(tmp_path, "requests of engine b").save(BODY)
    with pytest.raises(ValueError, match="requests of engine b"):
        state_file(tmp_path).load()


def test_what_could_not_be_read_back_is_not_written_and_a_longer_file_is_not_read(tmp_path: Path) -> None:
    file = state_file(tmp_path, bytes_max=100)
    with pytest.raises(OSError, match="read back at most"):
        file.save(bytes(100))
    assert file.load() is None
    file.path.write_bytes(bytes(101))
    with pytest.raises(ValueError, match="longer"):
        file.load()


def test_a_full_disk_is_named_and_leaves_the_file_before_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = state_file(tmp_path)
    file.save(b"before")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("interlock.host.files.os.fsync", full)
        with pytest.raises(OSError, match=r"requests\.bin could not be written: No space left"):
            file.save(BODY)
    assert file.load() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["requests.bin"], "no temporary file is left"


@pytest.mark.parametrize("simulation", range(20), indirect=True)
def test_a_power_cut_leaves_a_file_that_is_the_last_or_the_one_before_and_readable(
    simulation: Simulation,
) -> None:
    """On the simulated disk nothing counts that was not synced; the process dies inside some call of its second write."""
    path, found = Path("/state/requests.bin"), []

    def file_of(host: SimHost) -> StateFile:
        return StateFile(host.files, path, "k", 1 << 16)

    async def writes(host: SimHost) -> int:
        host.files.make_private_dir(path.parent)
        file_of(host).save(BODY)
        host.process.die_at_disk = ("open", "write", "fsync", "rename")[host.process.kernel.rng.randrange(4)]
        file_of(host).empty()
        raise AssertionError("it dies before")

    async def reads(host: SimHost) -> int:
        found.append(file_of(host).load())
        file_of(host).empty()
        return 0

    async def reads_again(host: SimHost) -> int:
        assert file_of(host).load() is None, "what was emptied does not come back"
        return 0

    async def story() -> None:
        for main in (writes, reads, reads_again):
            process = simulation.kernel.start("a", "p", main, lambda _: None)
            await asyncio.sleep(1.0)
            assert process.dead
            process.machine.disk.power_cut()

    simulation.run(story)
    assert found in ([BODY], [None])


def test_a_full_simulated_disk_keeps_the_file_before(simulation: Simulation) -> None:
    async def main(host: SimHost) -> int:
        host.files.make_private_dir(Path("/state"))
        file = StateFile(host.files, Path("/state/requests.bin"), "k", 1 << 16)
        file.save(b"before")
        host.process.machine.disk.full = True
        with pytest.raises(OSError, match="could not be written"):
            file.save(BODY)
        assert file.load() == b"before"
        host.process.machine.disk.full = False
        file.save(BODY)
        assert file.load() == BODY
        return 0

    async def story() -> None:
        process = simulation.kernel.start("a", "p", main, lambda _: None)
        await asyncio.sleep(1.0)
        assert process.dead

    simulation.run(story)

"""A state that is overwritten in place is never half, and never older than what was said to be saved."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from interlock.host.base import Files
from interlock.host.files import RealFiles
from interlock.host.slots import COPIES, PAGE_BYTES, SLOTS, SlotFile
from interlock.testing.sim.disk import SimDisk, SystemCalls, files_on

PATH = Path("/state/file")


def slot_file(folder: Path, kind: str = "numbers", bytes_max: int = 1 << 20) -> SlotFile:
    return SlotFile(RealFiles(), folder / "file", kind, bytes_max)


def test_the_last_of_many_saves_comes_back_in_the_next_life(tmp_path: Path) -> None:
    assert slot_file(tmp_path).load() is None
    for life in range(3):
        file = slot_file(tmp_path)
        assert file.load() == (f"{life - 1} 4".encode() if life else None)
        for number in range(5):
            file.save(f"{life} {number}".encode())
    assert slot_file(tmp_path).load() == b"2 4"
    assert os.listdir(tmp_path) == ["file"]


def test_a_save_in_place_syncs_once_and_makes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = slot_file(tmp_path)
    file.save(b"first")
    before = os.stat(file.path)
    calls: list[str] = []
    for name in ("fsync", "fdatasync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    for number in range(4):
        file.save(b"%d" % number)
    after = os.stat(file.path)
    assert calls == ["fdatasync"] * 4
    assert (before.st_ino, before.st_size, before.st_blocks) == (after.st_ino, after.st_size, after.st_blocks)


def test_a_state_that_outgrows_its_slot_gets_a_longer_file(tmp_path: Path) -> None:
    file = slot_file(tmp_path)
    for size in (10, 200_000, 10, 900_000):
        file.save(bytes(size))
        assert slot_file(tmp_path).load() == bytes(size)


@pytest.mark.parametrize("byte", [0, 3, 4, 20, 45])
def test_one_changed_byte_anywhere_loses_nothing(tmp_path: Path, byte: int) -> None:
    """Least of all to the older state in the other slot, which was overruled."""
    file = slot_file(tmp_path)
    for number in range(4):
        file.save(b"state %d" % number)
    whole = file.path.read_bytes()
    slot = len(whole) // (SLOTS * COPIES)
    for at in range(byte, len(whole), slot):
        file.path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert slot_file(tmp_path).load() == b"state 3"


@pytest.mark.parametrize("left", [b"", b"{}", b"\xff" * 4096, bytes(4 * 4096)])
def test_what_is_no_file_of_slots_is_refused_by_name(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "file").write_bytes(left)
    with pytest.raises(ValueError, match=r"file cannot be used"):
        slot_file(tmp_path).load()


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    slot_file(tmp_path).save(b"1")
    with pytest.raises(ValueError, match="of kind 'numbers', not 'letters'"):
        slot_file(tmp_path, "letters").load()


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    file = slot_file(tmp_path, bytes_max=10)
    file.save(bytes(10))
    with pytest.raises(OSError, match="would keep 11 bytes"):
        file.save(bytes(11))
    assert slot_file(tmp_path, bytes_max=10).load() == bytes(10)


def test_a_failed_save_is_made_up_for_by_the_next_and_never_touches_what_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = slot_file(tmp_path)
    file.save(b"0")
    file.save(b"1")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    stands = file.path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output"):
                file.save(b"not kept")
    size = len(stands) // (SLOTS * COPIES)
    changed = file.path.read_bytes()
    assert changed[size : 2 * size] == stands[size : 2 * size]
    file.save(b"2")
    assert slot_file(tmp_path).load() == b"2"


class Dying:
    """A process that dies at one of its system calls."""

    def __init__(self, pid: int, dies_after: int) -> None:
        self.pid, self._calls_left = pid, dies_after

    def at_disk(self, call: str) -> None:
        self._calls_left -= 1
        if self._calls_left < 0:
            raise ProcessLookupError(call)


class Lives:
    """One state directory through many lives that die at any call, lose power, and meet a failing disk."""

    def __init__(self, seed: int, kind: type[SlotFile] = SlotFile) -> None:
        self._kind = kind
        self.rng = random.Random(seed)
        self.disk = SimDisk(self.rng)
        self.disk.make_directories(PATH.parent)
        self.saved = self.begun = 0

    def files(self, dies_after: int) -> Files:
        return files_on(SystemCalls(self.disk, Dying(1, dies_after), self.rng.randbytes))

    def live(self) -> None:
        file = self._kind(self.files(self.rng.randrange(40)), PATH, "numbers", 1 << 20)
        body = file.load()
        found = int(body.split()[0]) if body is not None else 0
        assert self.saved <= found <= self.begun, (found, self.saved, self.begun)
        self.disk.failing = self.rng.choice([0.0, 0.0, 0.2])
        try:
            for _ in range(self.rng.randrange(1, 12)):
                self.begun += 1
                filler = b"x" * (self.rng.choice([1, 1, 1, 9, 40]) * PAGE_BYTES)
                try:
                    file.save(b"%d %b" % (self.begun, filler))
                except OSError as error:
                    if isinstance(error, ProcessLookupError):
                        raise
                else:
                    self.saved = self.begun
        except ProcessLookupError:
            pass
        self.disk.failing = 0.0
        if self.rng.random() < 0.5:
            self.disk.power_cut()


@pytest.mark.parametrize("seed", range(0, 300, 10))
def test_no_death_tear_or_failing_disk_takes_back_what_was_saved(seed: int) -> None:
    for each in range(seed, seed + 10):
        lives = Lives(each)
        for _ in range(12):
            lives.live()


def find_it(kind: type[SlotFile]) -> None:
    with pytest.raises((AssertionError, ValueError)):
        for seed in range(50):
            lives = Lives(seed, kind)
            for _ in range(12):
                lives.live()


class OneSlot(SlotFile):
    """The naive form: the same place again and again."""

    def save(self, body: bytes) -> None:
        self._durable = 1
        super().save(body)


class Unsynced(SlotFile):
    """Saved when the kernel has it."""

    def __init__(self, files: Files, path: Path, kind: str, bytes_max: int) -> None:
        super().__init__(files, path, kind, bytes_max)
        calls = files.write_in_place.__globals__["os"]  # type: ignore[attr-defined]
        calls.fdatasync = lambda _: None


def test_the_lives_find_a_file_that_is_overwritten_where_it_stands() -> None:
    find_it(OneSlot)


def test_the_lives_find_a_save_that_is_not_synced() -> None:
    find_it(Unsynced)


def test_a_file_that_somebody_took_away_is_made_anew(tmp_path: Path) -> None:
    """Else no save of this life would ever succeed again."""
    file = slot_file(tmp_path)
    file.save(b"0")
    file.path.unlink()
    for number in range(1, 4):
        file.save(b"%d" % number)
        assert slot_file(tmp_path).load() == b"%d" % number

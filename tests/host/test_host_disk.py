"""A directory of large files: whole pages past the page cache, holes, a lock that dies with its holder."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import pytest

from interlock.host.base import Piece
from interlock.host.disk import DirectoryBusy, RealDirectory

PAGE = 4096


@pytest.fixture
def directory(tmp_path: Path) -> RealDirectory:
    return RealDirectory(tmp_path / "kv", "me")


def pages(count: int) -> memoryview:
    buffer = mmap.mmap(-1, count * PAGE)
    buffer[:] = b"".join(bytes([i + 1]) * PAGE for i in range(count))
    return memoryview(buffer)


def test_what_was_written_is_read_in_pieces_wherever_they_lie(directory: RealDirectory) -> None:
    directory.write_new("a", pages(5))
    one, two = memoryview(mmap.mmap(-1, PAGE)), memoryview(mmap.mmap(-1, 2 * PAGE))
    directory.read("a", [Piece(4 * PAGE, one), Piece(PAGE, two)])
    assert bytes(one) == b"\x05" * PAGE
    assert bytes(two) == b"\x02" * PAGE + b"\x03" * PAGE
    odd = memoryview(bytearray(10))
    directory.read("a", [Piece(PAGE - 5, odd)])
    assert bytes(odd) == b"\x01" * 5 + b"\x02" * 5
    with pytest.raises(EOFError):
        directory.read("a", [Piece(4 * PAGE, two)])
    with pytest.raises(FileExistsError):
        directory.write_new("a", pages(1))


def test_a_hole_gives_its_bytes_back_and_reads_as_zeros(directory: RealDirectory) -> None:
    directory.write_new("a", pages(8))
    before = directory.list()
    directory.punch("a", 2 * PAGE, 3 * PAGE)
    after = next(entry for entry in directory.list() if entry.name == "a")
    assert next(e for e in before if e.name == "a").allocated_bytes - after.allocated_bytes == 3 * PAGE
    assert after.size_bytes == 8 * PAGE
    page = memoryview(mmap.mmap(-1, PAGE))
    directory.read("a", [Piece(2 * PAGE, page)])
    assert not any(page)


def test_a_directory_has_one_owner_and_says_who_it_is(tmp_path: Path, directory: RealDirectory) -> None:
    with pytest.raises(DirectoryBusy, match="belongs to me while that one runs"):
        RealDirectory(tmp_path / "kv", "another")
    looker = RealDirectory(tmp_path / "kv", None)
    assert [entry.name for entry in looker.list()] == ["owner"]
    looker.close()
    directory.close()
    RealDirectory(tmp_path / "kv", "another").close()


def test_a_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="chmod 700"):
        RealDirectory(tmp_path / "open", "me")


def test_a_mapped_file_keeps_what_was_stored_and_its_size(directory: RealDirectory) -> None:
    mapping = directory.map("index", 4 * PAGE)
    mapping.warm()
    mapping.view[5000] = 7
    mapping.close()
    again = directory.map("index", 4 * PAGE)
    assert again.view[5000] == 7
    again.close()
    with pytest.raises(ValueError, match="16384 bytes, not 4096"):
        directory.map("index", PAGE)


def test_descriptors_are_closed_whatever_happens(
    directory: RealDirectory, descriptors: Callable[[], set[str]]
) -> None:
    before = descriptors()
    directory.write_new("a", pages(1))
    directory.append("b", b"x")
    directory.append("b", b"y")
    with pytest.raises(FileNotFoundError):
        directory.read("none", [Piece(0, pages(1))])
    directory.rename("a", "c")
    directory.remove("c")
    directory.remove("c")
    directory.sync()
    assert directory.size("b") == 2
    assert directory.size("c") is None
    assert descriptors() == before

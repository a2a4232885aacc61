"""Small state files: whole or not at all, bounded, private."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from interlock.host.files import AppendFile, RealFiles

files = RealFiles()


def test_what_was_written_is_read_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "state"
    assert files.read(path, 10) is None
    files.write_durably(path, b"one")
    files.write_durably(path, b"two")
    assert files.read(path, 3) == b"two"
    assert os.listdir(tmp_path) == ["state"]


def test_a_file_longer_than_asked_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"long")
    with pytest.raises(ValueError, match="longer than the 3 bytes"):
        files.read(tmp_path / "state", 3)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    files.write_durably(path, b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="space"):
            files.write_durably(path, b"new")
    assert files.read(path, 10) == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_removing_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    for name in ("directory", "file", "none"):
        files.remove(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_private_directory_is_ours_alone_or_refused(tmp_path: Path) -> None:
    files.make_private_dir(tmp_path / "run" / "private")
    files.make_private_dir(tmp_path / "run" / "private")
    assert (tmp_path / "run" / "private").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "run" / "private")
    (tmp_path / "file").touch(mode=0o600)
    for name in ("open", "link", "file"):
        with pytest.raises(PermissionError, match=name):
            files.make_private_dir(tmp_path / name)


def test_appended_lines_stand_whole_in_order(tmp_path: Path) -> None:
    one, two = AppendFile(tmp_path / "log"), AppendFile(tmp_path / "log")
    one.append(b"1")
    two.append(b"2")
    one.append(b"3")
    one.close()
    one.close()
    two.close()
    assert (tmp_path / "log").read_bytes() == b"1\n2\n3\n"
    with pytest.raises(ValueError):
        one.append(b"4")

"""Small state files that survive a crash whole, logs that are only appended to, and private directories."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path


class RealFiles:
    """`Files` on a POSIX file system. Calls block for as long as the disk does."""

    def read(self, path: Path, limit_bytes: int) -> bytes | None:
        try:
            with open(path, "rb") as file:
                data = file.read(limit_bytes + 1)
        except FileNotFoundError:
            return None
        if len(data) > limit_bytes:
            raise ValueError(f"{path} is longer than the {limit_bytes} bytes that are read of such a file")
        return data

    def write_durably(self, path: Path, data: bytes) -> None:
        # A name of its own for each writer: two that meet must not write into one file.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync_directory(path.parent)

    def write_in_place(self, path: Path, pieces: Sequence[tuple[int, bytes]]) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for offset, data in pieces:
                rest = memoryview(data)
                while rest:
                    written = os.pwrite(fd, rest, offset)
                    rest, offset = rest[written:], offset + written
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def set_aside(self, path: Path) -> Path:
        aside = path.with_name(f"{path.name}.unreadable-{os.urandom(4).hex()}")
        os.rename(path, aside)
        _sync_directory(path.parent)
        return aside

    def remove(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            try:
                os.unlink(path)
            except (IsADirectoryError, PermissionError):
                os.rmdir(path)

    def make_private_dir(self, path: Path) -> None:
        os.makedirs(path.parent, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        if (
            not stat.S_ISDIR(found.st_mode)
            or found.st_uid != os.geteuid()
            or stat.S_IMODE(found.st_mode) & 0o077
        ):
            raise PermissionError(
                f"{path} must be a directory of ours that nobody else may enter; chmod 700 it or name another"
            )


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class AppendFile:
    """Lines appended to one file, each by one write, so that lines of several processes do not mix."""

    def __init__(self, path: Path) -> None:
        self._fd: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def append(self, line: bytes) -> None:
        """Raises `OSError` (disk full) and `ValueError` after `close`."""
        if self._fd is None:
            raise ValueError("this file is closed")
        os.write(self._fd, line + b"\n")

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class RotatingFile:
    """Lines appended to one file that is set aside when it has `lines_max`, in place of the one set aside before.

    Each file begins with the line `header`. The file at `path` is there already, with its header and `lines` more.
    """

    def __init__(self, path: Path, header: bytes, *, lines: int, lines_max: int) -> None:
        self._path, self._header, self._lines, self._lines_max = path, header, lines, lines_max
        self._file = AppendFile(path)

    @staticmethod
    def older(path: Path) -> Path:
        """Where a full file is set aside."""
        return path.with_name(f"{path.stem}.1{path.suffix}")

    def append(self, line: bytes) -> None:
        """Raises `OSError` (disk full) and `ValueError` after `close`."""
        if self._lines >= self._lines_max:
            self._file.close()
            os.rename(self._path, self.older(self._path))
            self._file = AppendFile(self._path)
            self._file.append(self._header)
            self._lines = 0
        self._file.append(line)
        self._lines += 1

    def close(self) -> None:
        self._file.close()

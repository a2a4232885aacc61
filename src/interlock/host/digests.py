"""Content digests of large files, outside the small-file interface of `Files`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec


class FileStamp(msgspec.Struct, frozen=True, array_like=True):
    """What changes when a file's content does, on any file system that keeps time: cheap to compare."""

    size_bytes: int
    modified_ns: int
    inode: int


def stamp_of(path: Path) -> FileStamp:
    """Raises `OSError` when there is no such file."""
    status = path.stat()
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_ino)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of the whole file, read once, about 1 to 2 s a GB. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

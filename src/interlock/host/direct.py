"""Large files past the page cache, where the file system lets them: opening, writing and reading whole, in pieces that a disk likes.

Names are relative to the descriptor of a directory. Memory and lengths are whole pages where `aligned` says so. All calls block.
"""

from __future__ import annotations

import errno
import os
import stat

from interlock.host.base import DirectoryEntry

PAGE_BYTES = 4096
CHUNK_BYTES = 4 * 1024 * 1024
"""One call to the disk; larger ones gain nothing (measured)."""
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


class DirectOpener:
    """Opens files of one file system with O_DIRECT, until that says it has none: then the page cache serves."""

    def __init__(self) -> None:
        self._direct = True

    def open(self, name: str, flags: int, at: int, *, aligned: bool) -> int:
        """Raises `OSError`, `FileExistsError` with O_EXCL. A file that is made is ours alone (0600)."""
        flags |= os.O_CLOEXEC
        if aligned and self._direct:
            try:
                return os.open(name, flags | os.O_DIRECT, 0o600, dir_fd=at)
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise
                self._direct = False
                flags &= ~os.O_EXCL  # the refused open may have made the file
        return os.open(name, flags, 0o600, dir_fd=at)


def write_all(fd: int, data: memoryview) -> None:
    """All of `data` from the file's beginning, and on the medium when it returns. Raises `OSError`."""
    at = 0
    while at < len(data):
        at += os.pwrite(fd, data[at : at + CHUNK_BYTES], at)
    os.fsync(fd)


def read_all(fd: int, into: memoryview, offset: int, name: str) -> None:
    """Fills `into` from `offset` on. Raises `EOFError` naming the file when it ends before, `OSError`."""
    at = 0
    while at < len(into):
        got = os.preadv(fd, [into[at : at + CHUNK_BYTES]], offset + at)
        if got <= 0:
            raise EOFError(f"{name} ends before byte {offset + len(into)}")
        at += got


def plain_files(fd: int) -> list[DirectoryEntry]:
    """The plain files of an open directory, by name; links are none."""
    with os.scandir(fd) as entries:
        found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    return sorted(
        DirectoryEntry(name, status.st_size, status.st_blocks * 512)
        for name, status in found
        if stat.S_ISREG(status.st_mode)
    )

"""One directory full of large files, reached by its descriptor: bulk data, past the page cache where the disk allows.

`host/files.py` is for small state files. Here names are relative to a directory that is opened once, so that nothing moves
under us when a path above it is renamed; data goes by O_DIRECT in large pieces (the RAM tier above is the cache: a second
one in the kernel costs memory and, when it is written back, a third of the speed; docs/decisions/010). All calls block:
they are made from the host's threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from interlock.core.errors import InterlockError
from interlock.host.base import DirectoryEntry, Piece
from interlock.host.direct import PAGE_BYTES, DirectOpener, plain_files, read_all, write_all

OWNER_BYTES_MAX = 1024
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01


class DirectoryBusy(InterlockError, OSError):  # noqa: N818 - says what is
    """Another process has this directory; `owner` is how it named itself."""

    def __init__(self, path: Path, owner: str) -> None:
        super().__init__(
            f"{path} belongs to {owner or 'another process'} while that one runs",
            hint="give each store node a directory of its own",
        )
        self.owner = owner


class RealMapping:
    """A file's bytes, writable and shared: what is written here reaches the file whenever the kernel likes."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._map = mapped
        self.view = memoryview(mapped)

    def warm(self) -> None:
        """Asks the kernel to read the file ahead."""
        self._map.madvise(mmap.MADV_WILLNEED)

    def close(self) -> None:
        """Unmaps it once nobody looks into the view any more. Idempotent."""
        with contextlib.suppress(BufferError, ValueError):
            self.view.release()
            self._map.close()


class RealDirectory:
    """A private directory that is ours while it is open. Close it to let another have it."""

    def __init__(self, path: Path, owner: str | None) -> None:
        """Makes the directory (mode 0700) if there is none. Raises `DirectoryBusy`, `PermissionError`, `OSError`.

        Without an owner it is only looked at: it is not made, and whoever has it keeps it.
        """
        if owner is not None:
            os.makedirs(path, mode=0o700, exist_ok=True)
        self.path = path
        self._fd: int | None = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock: int | None = None
        self._opener = DirectOpener()
        try:
            found = os.fstat(self._fd)
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise PermissionError(f"{path} must be ours alone; chmod 700 it or name another")
            if owner is not None:
                self._lock = self._take(owner)
        except BaseException:
            self.close()
            raise

    def _take(self, owner: str) -> int:
        """The lock dies with its holder, so what it guards is swept on evidence and not by age."""
        fd = os.open("owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._at)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, owner.encode()[:OWNER_BYTES_MAX], 0)
        except BlockingIOError:
            words = os.pread(fd, OWNER_BYTES_MAX, 0).decode(errors="replace")
            os.close(fd)
            raise DirectoryBusy(self.path, words) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    @property
    def _at(self) -> int:
        if self._fd is None:
            raise ValueError(f"{self.path} is closed here")
        return self._fd

    # --- names -----------------------------------------------------------------------------------------------------

    def list(self, folder: str = ".") -> list[DirectoryEntry]:
        """The plain files of this directory, or of a folder in it, by name."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._at)
        try:
            return plain_files(fd)
        finally:
            os.close(fd)

    def make_folder(self, name: str) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self._at)

    def rename(self, name: str, to: str) -> None:
        os.rename(name, to, src_dir_fd=self._at, dst_dir_fd=self._at)

    def remove(self, name: str) -> None:
        """Nothing if there is no such file."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._at)

    def sync(self) -> None:
        """Names made, changed and removed so far survive a power cut after this."""
        os.fsync(self._at)

    # --- contents --------------------------------------------------------------------------------------------------

    def size(self, name: str) -> int | None:
        try:
            return os.stat(name, dir_fd=self._at, follow_symlinks=False).st_size
        except FileNotFoundError:
            return None

    def write_new(self, name: str, data: memoryview) -> None:
        """A new file with `data`, which survives a power cut once its name does (`sync`). Raises `FileExistsError`.

        `data` is page-aligned memory of whole pages: it goes to the disk without a copy in between.
        """
        fd = self._opener.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self._at, aligned=True)
        try:
            write_all(fd, data)
        finally:
            os.close(fd)

    def append(self, name: str, data: bytes) -> None:
        """Durable when it returns (a new file needs `sync` as well)."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self._at)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            os.fsync(fd)
        finally:
            os.close(fd)

    def read(self, name: str, pieces: Sequence[Piece]) -> None:
        """Fills each piece's buffer from its offset. Raises `EOFError` when the file ends before, `OSError`."""
        aligned = all(not (piece.offset | len(piece.into)) % PAGE_BYTES for piece in pieces)
        fd = self._opener.open(name, os.O_RDONLY, self._at, aligned=aligned)
        try:
            for piece in pieces:
                read_all(fd, piece.into, piece.offset, name)
        finally:
            os.close(fd)

    def punch(self, name: str, offset: int, length: int) -> None:
        """Gives that range back to the file system; it reads as zeros afterwards. Raises `OSError` where it cannot."""
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._at)
        try:
            where, count = ctypes.c_int64(offset), ctypes.c_int64(length)
            if _libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, where, count):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), name)
        finally:
            os.close(fd)

    def map(self, name: str, size_bytes: int) -> RealMapping:
        """Maps a file, made with that size if there is none. Raises `ValueError` when it has another size."""
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._at)
        try:
            found = os.fstat(fd).st_size
            if found == 0:
                # Allocated: a store into a page that the disk has no room for would end this process (SIGBUS).
                os.posix_fallocate(fd, 0, size_bytes)
            elif found != size_bytes:
                raise ValueError(f"{name} has {found} bytes, not {size_bytes}")
            return RealMapping(mmap.mmap(fd, size_bytes))
        finally:
            os.close(fd)

    def close(self) -> None:
        """Idempotent."""
        for fd in (self._lock, self._fd):
            if fd is not None:
                os.close(fd)
        self._lock = self._fd = None


_libc = ctypes.CDLL(None, use_errno=True)

"""Shared memory that no holder can pull away: memfds, backed, sealed, and never inherited by a fork.

Allocated before it is shared (a later touch cannot fail, or be charged to the toucher), sealed against SHRINK, GROW and
SEAL (a holder that truncates it would kill every other by SIGBUS), mapped MADV_DONTFORK (a forked child of a dead
writer must not go on writing): hazards M1, M2.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_POPULATE_READ, _POPULATE_WRITE = 22, 23
"""madvise of Linux 5.14; not in Python's mmap yet."""


def populate(memory: memoryview, *, writable: bool) -> bool:
    """Maps the pages of page-aligned `memory` into this process now, so that no copy meets a page fault. Changes no byte.

    What a first touch costs a copy was not measured apart from other changes (docs/benchmarks.md). Blocks, without the
    interpreter's lock. False where the kernel cannot: then each page is mapped when it is touched.
    """
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    advice = _POPULATE_WRITE if writable else _POPULATE_READ
    return bool(_libc.madvise(address, len(memory), advice) == 0)


class MappedMemory:
    """A sealed memfd mapped into this process. Owns `fd`; closing it does not disturb other holders."""

    def __init__(self, fd: int, size_bytes: int, *, writable: bool = True) -> None:
        self._fd: int | None = fd
        self._size_bytes = size_bytes
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED, prot=protection)
        self._map.madvise(mmap.MADV_DONTFORK)
        self._view = memoryview(self._map)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def view(self) -> memoryview:
        return self._view

    @property
    def fd(self) -> int:
        if self._fd is None:
            raise ValueError("this shared memory is closed")
        return self._fd

    def read_into(self, offset: int, into: memoryview) -> None:
        """By a system call: a fresh mapping of a large slab costs a page fault every 4 KiB, several times the copy."""
        at = 0
        while at < len(into):
            got = os.preadv(self.fd, [into[at:]], offset + at)
            if got <= 0:
                raise ValueError(f"bytes {offset} to {offset + len(into)} do not lie in this memory")
            at += got

    def write_at(self, offset: int, data: memoryview) -> None:
        if offset < 0 or offset + len(data) > self._size_bytes:
            raise ValueError(f"bytes {offset} to {offset + len(data)} do not lie in this memory")
        at = 0
        while at < len(data):
            at += os.pwrite(self.fd, data[at:], offset + at)

    def open_read_only(self) -> int:
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Closes the descriptor, and unmaps once nobody (an array, a slice) looks into the view any more. Idempotent."""
        if self._fd is None:
            return
        os.close(self._fd)
        self._fd = None
        with contextlib.suppress(BufferError):
            self._view.release()
            self._map.close()


def create_memory(name: str, size_bytes: int) -> MappedMemory:
    """Blocks while the kernel clears the pages (about 1 s a gigabyte or less): call it off the loop when it is large.

    Raises `ValueError` for a size that is not positive, `MemoryError` when the machine cannot back all of it now.
    """
    if size_bytes <= 0:
        raise ValueError(f"shared memory {name!r} of {size_bytes} bytes: the size must be positive")
    free = available_bytes()
    if size_bytes > free:
        # Asking the kernel would not fail: it would end processes to find the memory.
        raise MemoryError(_too_large(name, size_bytes, f"{free / 2**30:.2f} GiB are available"))
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return MappedMemory(fd, size_bytes)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise MemoryError(_too_large(name, size_bytes, os.strerror(error.errno))) from error
        raise
    except BaseException:
        os.close(fd)
        raise


def map_memory(fd: int, size_bytes: int, *, writable: bool) -> MappedMemory:
    """Maps memory that another process handed over, and owns `fd` from now on, also when it raises.

    Raises `ValueError` when it is not sealed or not of that size: touching it could end this process.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if seals & SEALS != SEALS:
            raise ValueError("the shared memory received is not sealed against truncation; it was not mapped")
        if size_bytes <= 0 or os.fstat(fd).st_size < size_bytes:
            raise ValueError(
                f"the shared memory received holds {os.fstat(fd).st_size} bytes, not {size_bytes}"
            )
        return MappedMemory(fd, size_bytes, writable=writable)
    except OSError as error:
        os.close(fd)
        raise ValueError(
            f"the descriptor received is no shared memory that can be mapped: {error}"
        ) from error
    except BaseException:
        os.close(fd)
        raise


def available_bytes() -> int:
    """What this machine, and this process's cgroup, can still give without ending anybody."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        entry = next(e for e in Path("/proc/self/cgroup").read_text().splitlines() if e.startswith("0::"))
        group = Path("/sys/fs/cgroup") / entry[3:].lstrip("/")
        limit = int((group / "memory.max").read_text())  # "max" is no number: no limit here
        # File cache is given back under pressure, so it counts as free.
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stats["inactive_file"])
        available = min(available, max(0, limit - used))
    return available


def _too_large(name: str, size_bytes: int, reason: str) -> str:
    return f"shared memory {name!r} of {size_bytes / 2**30:.2f} GiB cannot be had: {reason}; make the store smaller"

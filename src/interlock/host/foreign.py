"""Memory by address: copies with the interpreter's lock released, and reads of another process's memory.

Scattered memory is an array of (address, length) pairs, `struct iovec` as the kernel has it, so that a thousand pieces are one call and no
Python object each. Whoever passes addresses holds the buffers they lie in.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from interlock.core.limits import PIECES_PER_CALL_MAX

Iovecs = npt.NDArray[np.uint64]
"""Shape (n, 2): address, length in bytes."""
COPY_LOOK_BYTES = 1024 * 1024
VIEW_BYTES_MAX = 64 * 1024
VIEWS_MAX = 8192
_libc = ctypes.CDLL(None, use_errno=True)
_memmove = _libc.memmove
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memmove.restype = ctypes.c_void_p
_vm_readv = _libc.process_vm_readv
_vm_readv.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]
_vm_readv.restype = ctypes.c_ssize_t


def address_of(view: memoryview) -> int:
    """Where a contiguous view begins; valid while it, or what it views, is held."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def copy_memory(to: int, source: int, count: int) -> None:
    """memcpy without the interpreter's lock."""
    _memmove(to, source, count)


def copy_pieces(into: Iovecs, origins: npt.NDArray[np.uint64], stopped: Callable[[], bool]) -> bool:
    """`copy_memory` of each piece; False: it stopped before the last, having looked after every COPY_LOOK_BYTES or piece."""
    left, move = COPY_LOOK_BYTES, _memmove
    for to, count, origin in zip(into[:, 0].tolist(), into[:, 1].tolist(), origins.tolist(), strict=True):
        if left <= 0:
            if stopped():
                return False
            left = COPY_LOOK_BYTES
        move(to, origin, count)
        left -= count
    return True


class PieceCopies:
    """The same pieces copied again and again: what can be done once for all is done here.

    Pieces up to VIEW_BYTES_MAX go through memory views, for a quarter of what a call of the C library costs, but with the interpreter's lock; it is
    offered to others between two of them, as between any two lines. Larger ones, and those above VIEWS_MAX, go as in `copy_pieces`.
    The caller holds both memories at each `run`.
    """

    def __init__(self, into: Iovecs, origins: npt.NDArray[np.uint64]) -> None:
        small = into[:, 1] <= VIEW_BYTES_MAX
        small[np.flatnonzero(small)[VIEWS_MAX:]] = False
        self._into, self._origins = into[~small], origins[~small]
        self._groups: list[list[tuple[memoryview, memoryview]]] = []
        left = 0
        for (to, count), origin in zip(into[small].tolist(), origins[small].tolist(), strict=True):
            if left <= 0:
                self._groups.append([])
                left = COPY_LOOK_BYTES
            self._groups[-1].append((view_of(to, count), view_of(origin, count)))
            left -= count

    def run(self, stopped: Callable[[], bool]) -> bool:
        """False: it stopped before the last, having looked after every COPY_LOOK_BYTES or piece."""
        for number, group in enumerate(self._groups):
            if number and stopped():
                return False
            for into, source in group:
                into[:] = source
        return not len(self._into) or copy_pieces(self._into, self._origins, stopped)


def view_of(address: int, count: int) -> memoryview:
    """The bytes at an address, writable. The caller holds whatever they lie in."""
    array: Any = (ctypes.c_ubyte * count).from_address(address)
    return memoryview(array).cast("B")


def read_process(pid: int, into: Iovecs, source: Iovecs) -> None:
    """Copies `source`, addresses in process `pid`, to `into`, addresses here; equal shapes and lengths.

    Raises `PermissionError` (the kernel does not let us), `ProcessLookupError`, `BufferError` when not all of it is mapped
    there.
    """
    for mine, theirs in cut_for_calls(into, source):
        _read_process(pid, mine, theirs)


def cut_for_calls(into: Iovecs, source: Iovecs) -> Iterator[tuple[Iovecs, Iovecs]]:
    """As many pieces at a time as one call of the kernel takes."""
    for start in range(0, len(into), PIECES_PER_CALL_MAX):
        stop = start + PIECES_PER_CALL_MAX
        yield np.ascontiguousarray(into[start:stop]), np.ascontiguousarray(source[start:stop])


def _read_process(pid: int, mine: Iovecs, theirs: Iovecs) -> None:
    wanted = int(mine[:, 1].sum())
    got = _vm_readv(pid, mine.ctypes.data, len(mine), theirs.ctypes.data, len(theirs), 0)
    if got == wanted:
        return
    if got > 0:
        # A call moves 2 GiB at most, and stops before what is not mapped: the second try tells which it was.
        _read_process(pid, advance(mine, got), advance(theirs, got))
        return
    if got == 0:
        raise BufferError(f"process {pid} has not all of that memory mapped")
    error = ctypes.get_errno()
    if error == 14:  # EFAULT
        raise BufferError(f"process {pid} has not all of that memory mapped")
    raise OSError(error, os.strerror(error))


def advance(pieces: Iovecs, count: int) -> Iovecs:
    """What is left of `pieces` after their first `count` bytes; the array given is not changed."""
    ends = np.cumsum(pieces[:, 1])
    at = int(np.searchsorted(ends, count, side="right"))
    rest = pieces[at:]
    if at < len(pieces):
        cut = count - (int(ends[at - 1]) if at else 0)
        if cut:
            rest = rest.copy()
            rest[0, 0] += np.uint64(cut)
            rest[0, 1] -= np.uint64(cut)
    return rest

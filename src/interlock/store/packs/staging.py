"""Page-aligned memory for bytes on their way between the slab and the disk: reused, and never more than its bound.

Fresh memory has to be cleared by the kernel at each first touch, which costs a quarter of a disk's speed; so buffers are kept.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

from interlock.core.errors import InterlockError
from interlock.host.threads import Lock

_SMALL_BYTES = 64 * 1024


class StagingFull(InterlockError):  # noqa: N818 - says what is
    """No memory is left for this; it was not begun and may be tried again."""


class Staging:
    """Buffers of together at most `bytes_max`. Thread-safe."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._lock = Lock()
        self._free: list[mmap.mmap] = []
        self.bytes_held = 0
        """Mapped, in use or kept."""
        self.bytes_in_use = 0

    @contextlib.contextmanager
    def take(self, size_bytes: int) -> Iterator[memoryview]:
        """Memory of that many bytes, as it was left by whoever had it before. Raises `StagingFull` at once."""
        buffer = self._take(-(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        try:
            yield memoryview(buffer)[:size_bytes]
        finally:
            self._give_back(buffer)

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            fitting = [i for i, buffer in enumerate(self._free) if size <= len(buffer) <= 4 * size]
            if fitting:
                buffer = self._free.pop(min(fitting, key=lambda i: len(self._free[i])))
                self.bytes_in_use += len(buffer)
                return buffer
            while self._free and self.bytes_held + size > self.bytes_max:
                self.bytes_held -= len(self._free.pop(0))
            if self.bytes_held + size > self.bytes_max:
                raise StagingFull(
                    f"{size} bytes of staging memory cannot be had: {self.bytes_in_use} of {self.bytes_max} are in use",
                    retryable=True,
                )
            self.bytes_held += size
            self.bytes_in_use += size
        return mmap.mmap(-1, size)

    def _give_back(self, buffer: mmap.mmap) -> None:
        with self._lock:
            self.bytes_in_use -= len(buffer)
            if len(buffer) <= _SMALL_BYTES and len(self._free) >= 16:
                self.bytes_held -= len(buffer)
            else:
                self._free.append(buffer)

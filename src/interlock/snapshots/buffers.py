"""Staging memory: page-aligned, counted references, and used again, for fresh pages cost a save as much as its copy."""

from __future__ import annotations

from interlock.core.limits import SNAPSHOT_SPARE_BYTES_MAX
from interlock.host.direct import PAGE_BYTES
from interlock.host.trees import Changes, page_memory


class Buffer:
    """Memory of one snapshot. Whoever reads it holds it; with the last `release` it is used again."""

    def __init__(self, pool: Buffers, memory: memoryview, size_bytes: int) -> None:
        self._pool, self._memory = pool, memory
        self.view = memory[:size_bytes]
        self._holders = 1

    def hold(self) -> Buffer:
        """Only by one who knows that it is held."""
        assert self._holders > 0
        self._holders += 1
        return self

    def release(self) -> None:
        """Once for each `hold`, and for having taken it. Call with the pool's mutex held."""
        assert self._holders > 0
        self._holders -= 1
        if self._holders == 0:
            self._pool.give(self._memory)


class Buffers:
    """Not locked by itself: `take`, and releases, are called with the desk's mutex held."""

    def __init__(self, spare_bytes_max: int = SNAPSHOT_SPARE_BYTES_MAX) -> None:
        self._spare: list[memoryview] = []
        self._spare_bytes_max = spare_bytes_max
        self.spare_bytes = 0

    def find(self, size_bytes: int) -> memoryview | None:
        """A spare one that fits and wastes less than a quarter."""
        fitting = [
            each for each in self._spare if size_bytes <= len(each) <= size_bytes * 5 // 4 + PAGE_BYTES
        ]
        if not fitting:
            return None
        best = min(fitting, key=len)
        self._spare = [each for each in self._spare if each is not best]
        self.spare_bytes -= len(best)
        return best

    def take(self, mutex: Changes, size_bytes: int) -> Buffer:
        """New memory is got outside the mutex: it may take milliseconds."""
        with mutex:
            found = self.find(size_bytes)
        return Buffer(self, found if found is not None else page_memory(size_bytes), size_bytes)

    def give(self, memory: memoryview) -> None:
        if self.spare_bytes + len(memory) <= self._spare_bytes_max:
            self._spare.append(memory)
            self.spare_bytes += len(memory)

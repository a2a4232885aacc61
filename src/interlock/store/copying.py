"""Bytes between a caller's arrays and the slots of a slab: as few copies as the places allow, by two threads where that pays.

Slots in a row that take arrays in a row are one copy (`rank_slots.runs`). The C library writes a copy of about a megabyte
and more past the caches, which nearly doubles its speed; block by block, blocks of 256 KiB never get that. One core does not
use up a machine's memory either: a second thread copies the other half of a large call (NumPy and xxhash let go of the
interpreter's lock). docs/benchmarks.md has what each of the two brings.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import numpy as np
from numpy.lib.stride_tricks import as_strided

from interlock.core.limits import SLOT_GRAIN_BYTES
from interlock.host.threads import start_thread
from interlock.store.buffers import Bytes, Parts
from interlock.store.mapping import MappedSlab
from interlock.store.rank_slots import runs

BYTES_FOR_TWO = 8 * 1024 * 1024
"""Below, starting a thread costs more than it saves."""
CHUNK_BYTES = 4 * 1024 * 1024
"""What is copied before it is checked: enough for a fast copy, and still in the caches of most processors then."""


class SlotCopier:
    """Copies between one slab's slots and `parts`, of one block each. Raises `IndexError` for a slot outside the slab."""

    def __init__(self, slab: MappedSlab) -> None:
        self._slab = slab
        self._memory: Bytes = np.frombuffer(slab.view, dtype=np.uint8)

    def of(self, slot: int) -> Bytes:
        """The block's bytes where they stand."""
        at = self._slab.offset(slot)
        return self._memory[at : at + self._slab.layout.block_bytes]

    def put(self, slots: Sequence[int], parts: Parts, indexes: Sequence[int]) -> None:
        """`parts[indexes[i]]` into `slots[i]`."""
        for into, source in self._pairs(slots, parts, indexes):
            np.copyto(into, source)

    def get(self, slots: Sequence[int], parts: Parts, indexes: Sequence[int]) -> None:
        """`slots[i]` into `parts[indexes[i]]`."""
        for source, into in self._pairs(slots, parts, indexes):
            np.copyto(into, source)

    def _pairs(self, slots: Sequence[int], parts: Parts, indexes: Sequence[int]) -> list[tuple[Bytes, Bytes]]:
        if not isinstance(parts, np.ndarray):
            return [(self.of(slot), parts[index]) for slot, index in zip(slots, indexes, strict=True)]
        pairs = []
        for run in runs(slots, indexes):
            first, last = slots[run.start], slots[run.stop - 1]
            start, _ = self._slab.offset(first), self._slab.offset(last)
            shape = (run.stop - run.start, self._slab.layout.block_bytes)
            stored = as_strided(self._memory[start:], shape, (run.slot_step * SLOT_GRAIN_BYTES, 1))
            pairs.append((stored, parts[run.chosen(indexes[run.start])]))
        return pairs


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def by_two(count: int, each_bytes: int, work: Callable[[range], None]) -> None:
    """`work` over ranges that make up `range(count)`, in this thread and, where that pays, another; returns when both did.

    Raises what one of them raised; even then both have ended.
    """
    if not _pays(count, each_bytes):
        work(range(count))
        return
    with _helper(lambda: work(range(count // 2, count))):
        work(range(count // 2))


def copy_and_check(
    count: int,
    each_bytes: int,
    copy: Callable[[range], None],
    check: Callable[[range], None],
    *,
    copied_first: bool,
) -> None:
    """Both over ranges that make up `range(count)`: `check` here and, where that pays, `copy` by another thread beside it.

    Large copies hold no lock of the interpreter, the small sums of a check take it again and again: two threads that both
    sum up wait for each other. `copied_first`: a range is checked once it is copied. Where one thread does both, each block
    is copied while its check has left it in the caches, or the other way round. Raises what one of them raised; even then
    both have ended.
    """
    if not _pays(count, each_bytes):
        first, second = (copy, check) if copied_first else (check, copy)
        for n in range(count):
            first(range(n, n + 1))
            second(range(n, n + 1))
        return
    step = max(1, CHUNK_BYTES // each_bytes)
    chunks = [range(at, min(at + step, count)) for at in range(0, count, step)]
    copied: SimpleQueue[bool] = SimpleQueue()

    def copy_all() -> None:
        try:
            for chunk in chunks:
                copy(chunk)
                copied.put(True)
        finally:
            copied.put(False)

    with _helper(copy_all):
        for chunk in chunks:
            if copied_first and not copied.get():
                break
            check(chunk)


def _pays(count: int, each_bytes: int) -> bool:
    return count > 1 and count * each_bytes >= BYTES_FOR_TWO and usable_cores() > 1


@contextlib.contextmanager
def _helper(work: Callable[[], None]) -> Iterator[None]:
    """A thread that does `work` beside the block of the `with`. It has ended when that is left, however it is left."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = start_thread("interlock-store-copy", run)
    try:
        yield
    finally:
        thread.join()
    if failed:
        raise failed[0]

"""A rank's loader: one thread that takes loads in order and tells what became of each, once, when it is released.

Two ends of a load must not be confused (hazards W1). Its *outcome* is known by its deadline: what was not checked by
then is a miss. Its *release* is when nothing can touch its KV blocks any more; only then may vLLM hear of it, because
vLLM gives the blocks away at once. Here both are one moment: this thread copies synchronously out of mapped memory and
asks for the time between batches, so when it speaks it has let go.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable

import msgspec

from interlock.connectors.vllm.metadata import LoadTask
from interlock.connectors.vllm.movers import Mover
from interlock.core.limits import LOAD_SECONDS_MAX, LOADS_QUEUED_MAX
from interlock.host.threads import monotonic_s, start_thread
from interlock.store.mapping import MappedSlab
from interlock.store.rank_slots import GOOD, LATE, MISMATCH

_log = logging.getLogger(__name__)


class Loaded(msgspec.Struct, frozen=True):
    """A load that is released: per block GOOD, MISMATCH or LATE. `why`: what failed the whole load, as a counter's name."""

    task: LoadTask
    outcomes: list[str]
    why: str = ""

    @property
    def failed_blocks(self) -> set[int]:
        return {block for block, what in zip(self.task.block_ids, self.outcomes, strict=True) if what != GOOD}

    @property
    def mismatched(self) -> set[tuple[int, int]]:
        return {(self.task.attempt, i) for i, what in enumerate(self.outcomes) if what == MISMATCH}


class Loader:
    """`submit` and the results are used by the engine's thread, the copies are made by the loader's own."""

    def __init__(
        self,
        mover: Mover,
        slab_of: Callable[[int], MappedSlab | None],
        *,
        clock: Callable[[], float] = monotonic_s,
    ) -> None:
        self._mover = mover
        self._slab_of = slab_of
        self._clock = clock
        self._tasks: queue.Queue[tuple[LoadTask, float] | None] = queue.Queue(LOADS_QUEUED_MAX)
        self._released: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._highest = 0
        self._outstanding = 0
        self.repeated = 0
        """Loads that were submitted twice, and ignored."""
        self._thread = start_thread("interlock-loader", self._run)

    @property
    def outstanding(self) -> int:
        """Loads submitted whose release was not taken yet."""
        return self._outstanding

    def submit(self, task: LoadTask) -> None:
        """Never blocks. A load that does not fit into the queue is released at once, untouched."""
        if task.attempt <= self._highest:
            # vLLM counts reports, not ranks: one load reported twice by us could hide another rank's silence.
            self.repeated += 1
            return
        self._highest = task.attempt
        self._outstanding += 1
        try:
            self._tasks.put_nowait((task, self._clock() + LOAD_SECONDS_MAX))
        except queue.Full:
            self._released.put(untouched(task, "load_queue_full"))

    def take(self, wait_s: float = 0.0) -> list[Loaded]:
        """Loads released since the last call, each exactly once; waits up to `wait_s` for a first one if any is out."""
        found: list[Loaded] = []
        try:
            while True:
                wait = wait_s if not found and self._outstanding else 0.0
                found.append(self._released.get(block=wait > 0, timeout=wait or None))
                self._outstanding -= 1
        except queue.Empty:
            return found

    def close(self, timeout_s: float) -> bool:
        """Ends the thread after the load in hand; True when it is gone, so that KV memory may go too."""
        while True:
            try:
                self._tasks.get_nowait()
            except queue.Empty:
                break
        self._tasks.put_nowait(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None:
            task, deadline = item
            self._released.put(self._load(task, deadline))

    def _load(self, task: LoadTask, deadline: float) -> Loaded:
        try:
            slab = self._slab_of(task.source.slab)
            if slab is None:
                return untouched(task, "load_slab_gone")
            outcomes = self._mover.load(
                slab, task.keys, task.source.locations, task.block_ids, lambda: self._clock() < deadline
            )
            return Loaded(task, outcomes)
        except Exception:
            _log.exception("a load of %d blocks failed; they are recomputed", len(task.block_ids))
            # What the mover had copied when it failed is unknown, so every block of the load is recomputed.
            return untouched(task, "load_error")


def untouched(task: LoadTask, why: str) -> Loaded:
    """A load of which every block is to be recomputed."""
    return Loaded(task, [LATE] * len(task.block_ids), why)

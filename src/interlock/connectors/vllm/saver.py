"""A rank's saver: the model's thread copies blocks out of the KV tensors, another sums them up and fills their slots.

The hook that saves runs inside the model's step, so only what must happen there does: one strided copy from the KV tensors to
staging (the source fence, hazards W2). Checksums are of that copy, so a second thread can make them, fill the slot, and then
report: the promise not to touch the slots comes from the code that copied, and after it. Where every staging is taken, the
model's thread does the whole batch itself: it never waits for the other one, and memory stays bounded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from interlock.connectors.vllm.movers import Mover, Staging
from interlock.core.limits import SAVE_STAGING_BUFFERS_MAX, SAVES_QUEUED_MAX
from interlock.host.threads import Lock, Worker, WorkerBusyError
from interlock.store.mapping import MappedSlab

_log = logging.getLogger(__name__)

Done = Callable[[list[bool], list[list[int]]], None]


class _Save:
    """One save under way: which of its blocks are good so far, and how many batches are to come."""

    def __init__(
        self, slab: MappedSlab, keys: Sequence[bytes], slots: Sequence[int], batches: int, done: Done
    ) -> None:
        self.slab, self.keys, self.slots = slab, keys, slots
        self._good = [False] * len(slots)
        self._sums: list[list[int]] = [[] for _ in slots]
        self._left = batches
        self._done = done
        self._lock = Lock()

    def ended(self, batch: range, sums: list[list[int]] | None) -> None:
        """The batch is stored, or (None) is not and never will be: nothing touches its slots any more."""
        with self._lock:
            if sums is not None:
                self._good[batch.start : batch.stop] = [True] * len(batch)
                self._sums[batch.start : batch.stop] = sums
            self._left -= 1
            last = self._left == 0
        if last:
            self._done(self._good, self._sums)


class Saver:
    """`save` is called by the model's thread alone."""

    def __init__(self, mover: Mover, *, buffers_max: int = SAVE_STAGING_BUFFERS_MAX) -> None:
        self._mover = mover
        self._lock = Lock()
        self._free: list[Staging] = []
        self._unmade = buffers_max
        self._own: Staging | None = None
        self._worker = Worker("interlock-saver", SAVES_QUEUED_MAX)
        self.inline_batches = 0
        """Batches that the model's thread had to do itself."""

    def save(
        self,
        slab: MappedSlab,
        keys: Sequence[bytes],
        slots: Sequence[int],
        blocks: Sequence[int],
        done: Done,
    ) -> None:
        """Copies KV blocks on their way to slots; on return no KV block is read any more. Never raises.

        `done(good, checksums)`, a value per block, is called once, from either thread, when no slot is touched any more.
        """
        batches = self._mover.batches(len(blocks))
        save = _Save(slab, keys, slots, len(batches), done)
        gathered: list[tuple[range, Staging]] = []
        for batch in batches:
            staging = self._take()
            if staging is None:
                self._hand_over(save, gathered)
                self._inline(save, batch, blocks[batch.start : batch.stop])
            elif self._gather(save, batch, blocks[batch.start : batch.stop], staging):
                gathered.append((batch, staging))
            else:
                self._give_back(staging)
        self._hand_over(save, gathered)

    def _gather(self, save: _Save, batch: range, blocks: Sequence[int], staging: Staging) -> bool:
        """False: the batch is reported bad."""
        try:
            self._mover.gather(blocks, staging)
        except Exception:
            _log.exception(
                "%d blocks could not be copied out of the KV cache; they are reported bad", len(batch)
            )
            save.ended(batch, None)
            return False
        return True

    def _hand_over(self, save: _Save, gathered: list[tuple[range, Staging]]) -> None:
        """To the other thread, when all is copied: beside it, it would take half of the memory's speed from this one."""
        for batch, staging in gathered:
            try:
                self._worker.submit(self._finish, save, batch, staging, True)
            except WorkerBusyError:  # done here, as if no staging had been free
                self.inline_batches += 1
                self._finish(save, batch, staging, True)
        gathered.clear()

    def _inline(self, save: _Save, batch: range, blocks: Sequence[int]) -> None:
        self.inline_batches += 1
        try:
            own = self._own = self._own or self._mover.staging()
        except Exception:
            _log.exception("no memory for a staging of saves: %d blocks are reported bad", len(batch))
            save.ended(batch, None)
            return
        if self._gather(save, batch, blocks, own):
            self._finish(save, batch, own, False)

    def _finish(self, save: _Save, batch: range, staging: Staging, lent: bool) -> None:
        sums = None
        try:
            some = slice(batch.start, batch.stop)
            sums = self._mover.put(save.slab, save.keys[some], save.slots[some], staging)
        except Exception:
            _log.exception("%d blocks could not be stored; they are reported bad", len(batch))
        if lent:
            self._give_back(staging)
        save.ended(batch, sums)

    def _take(self) -> Staging | None:
        """Made when first needed: an engine that saves little holds little."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._unmade == 0:
                return None
            self._unmade -= 1
        try:
            return self._mover.staging()
        except Exception:
            _log.exception("no memory for another staging of saves")
            return None

    def _give_back(self, staging: Staging | None) -> None:
        if staging is not None:
            with self._lock:
                self._free.append(staging)

    def close(self, timeout_s: float) -> bool:
        """Finishes what was copied; False when that takes longer: then the process's exit is its promise."""
        return self._worker.close(timeout_s)

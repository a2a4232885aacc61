"""What a store node does by the clock: deadlines pass, frozen writers end, and the books are checked when nobody asks.

Nothing here may end the loop: without ticks no deadline would ever pass again.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

from interlock.host.base import Clock
from interlock.store.blocks import BlockStore
from interlock.store.witness import Witness

TICK_SECONDS = 0.5
IDLE_SECONDS = 5.0
FROZEN_BLOCKS_MIN = 16384
CHECKED_SLOTS_MAX = 16384
"""Looking at more than that takes tens of milliseconds, in which no look-up is answered."""
_log = logging.getLogger(__name__)


class Housekeeping:
    """One for each node; `run` until it is cancelled."""

    def __init__(
        self, clock: Clock, store: BlockStore, witness: Witness, check: Callable[[], None], tick_s: float
    ) -> None:
        """`check` raises `AssertionError` when the books do not balance."""
        self._clock, self._tick_s = clock, tick_s
        self._store, self._witness, self._check = store, witness, check
        self._frozen_blocks = 0
        """Blocks there were when the garbage collector was last told to leave them alone."""
        self._heard_s: float | None = None
        """When a message came, or None: the books were checked since then."""

    def heard(self) -> None:
        """A message came that may have changed the books."""
        self._heard_s = self._clock.monotonic_s()

    async def run(self) -> None:
        """Ticks until it is cancelled."""
        while True:
            await self._clock.sleep_s(self._tick_s)
            try:
                now_s = self._clock.monotonic_s()
                self._store.tick(now_s)
                self._spare_the_collector()
                self._witness.end_frozen(now_s)
                self._check_when_idle(now_s)
            except Exception:  # a defect of ours
                self._store.counters["internal_errors"] += 1
                _log.exception("a tick of the store failed")

    def _spare_the_collector(self) -> None:
        """Takes the index out of the garbage collector's sight each time it has doubled.

        A full collection walks it, 24 ms for a million blocks, in which no look-up is answered; and finds nothing there.
        """
        if len(self._store) > 2 * self._frozen_blocks + FROZEN_BLOCKS_MIN:
            self._frozen_blocks = len(self._store)
            gc.collect()
            gc.freeze()

    def _check_when_idle(self, now_s: float) -> None:
        """Once after each burst of messages: do the books balance? A metric says when they did not."""
        if self._heard_s is None or now_s - self._heard_s < IDLE_SECONDS:
            return
        self._heard_s = None
        if sum(self._store.slots.count.values()) > CHECKED_SLOTS_MAX:
            return
        try:
            self._check()
        except AssertionError:
            self._store.counters["integrity_failures"] += 1
            _log.exception("the store's books do not balance")

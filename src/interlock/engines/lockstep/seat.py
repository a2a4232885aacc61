"""One rank's place in its group: `core/lockstep` between the thread that hears the leader and the one that computes.

A rank inside a collective must still answer a new leader's fence, for that leader has to learn of the grant that put it there.
So words are heard in the loop's thread at any time, and the ends of steps come from the engine's thread; a lock is between them.
"""

from __future__ import annotations

from collections.abc import Callable

from interlock.core.lockstep import (
    Fence,
    Grant,
    RankEvent,
    RankReport,
    RankState,
    Report,
    RunStep,
    StepEnded,
    transition_rank,
)
from interlock.host.threads import Lock


class Seat:
    """`on_run` is called when a step is to be run: from `hear`'s thread, or from `ended`'s."""

    def __init__(self, rank: int, on_run: Callable[[], None]) -> None:
        self._on_run = on_run
        self._lock = Lock()
        self._state = RankState(rank)
        self._step: int | None = None

    @property
    def report(self) -> RankReport:
        return self._state.report

    @property
    def step(self) -> int | None:
        """To be run, or running."""
        return self._step

    @property
    def tokens(self) -> int:
        """What the grant in force allows in each step."""
        return self._state.tokens

    def hear(self, word: Fence | Grant) -> bool:
        """Whether the leader has to be told now: a fence, or a word said again or too late. A new grant is answered by the
        step's end. Raises `RemoteProtocolError`."""
        before = self._state
        runs = self._apply(word)
        if runs:
            self._on_run()
        return isinstance(word, Fence) or self._state == before

    def ended(self, step: int) -> None:
        """This step is over, its collectives included."""
        if self._apply(StepEnded(step)):
            self._on_run()

    def _apply(self, event: RankEvent) -> bool:
        """Whether a step is to be run now."""
        with self._lock:
            self._state, effects = transition_rank(self._state, event)
            if isinstance(event, StepEnded):
                self._step = None
            for effect in effects:
                match effect:
                    case RunStep(step):
                        self._step = step
                        return True
                    case Report():  # the caller sends one that says more
                        pass
        return False

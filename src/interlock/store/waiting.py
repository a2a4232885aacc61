"""How long a request waits for blocks that are on their way to its store, from a disk or a peer; for every engine the same."""

from __future__ import annotations

from interlock.core.limits import PROMOTION_POLL_SECONDS, PROMOTION_WAIT_SECONDS_MAX


class ComingWait:
    """One request's: bounded over its whole life (hazards F7: "ask me later" without end starves it)."""

    def __init__(self) -> None:
        self._until_s: float | None = None
        self._next_s = 0.0

    def may_wait(self, now_s: float) -> bool:
        """Whether it may ask once more instead of taking what there is."""
        if self._until_s is None:
            self._until_s = now_s + PROMOTION_WAIT_SECONDS_MAX
        self._next_s = now_s + PROMOTION_POLL_SECONDS
        return now_s < self._until_s

    def too_early(self, now_s: float) -> bool:
        """Whether it asked a moment ago."""
        return now_s < self._next_s and self._until_s is not None and now_s < self._until_s

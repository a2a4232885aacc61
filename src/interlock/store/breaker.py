"""A circuit breaker: after a few time-outs in a row a slow store is not asked again until it answered a probe.

Without it every step of the engine waits the full limit for a store that is gone, for as long as it is gone
(vLLM #49328). Time is passed in; the caller holds the lock.
"""

from __future__ import annotations

from interlock.core.limits import BREAKER_FAILURES_MAX, BREAKER_PROBE_SECONDS


class Breaker:
    """Opens after `failures_max` failures in a row; then one attempt each `probe_s` is let through, until one succeeds."""

    def __init__(
        self, *, failures_max: int = BREAKER_FAILURES_MAX, probe_s: float = BREAKER_PROBE_SECONDS
    ) -> None:
        self._failures_max = failures_max
        self._probe_s = probe_s
        self._failures = 0
        self._probe_at_s = 0.0

    @property
    def open(self) -> bool:
        """Whether only probes are let through."""
        return self._failures >= self._failures_max

    def admits(self, now_s: float) -> bool:
        """Whether to ask now. While open, one question per `probe_s` is let through as the probe."""
        if not self.open:
            return True
        if now_s < self._probe_at_s:
            return False
        self._probe_at_s = now_s + self._probe_s
        return True

    def answered(self) -> None:
        """An answer came in time, whatever it said."""
        self._failures = 0

    def failed(self, now_s: float) -> None:
        """No answer in time."""
        self._failures += 1
        self._probe_at_s = now_s + self._probe_s

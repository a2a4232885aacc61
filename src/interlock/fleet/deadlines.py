"""When requests must have ended, on a clock that stands still while the fleet is suspended."""

from __future__ import annotations

import heapq

from interlock.host.base import Clock

REMINDERS_SLACK = 1024
"""Reminders of requests that have ended are kept until there are so many more of them than requests."""


class Deadlines:
    """Mutable, one a front. Whoever `begin`s a request `end`s it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ends_s: dict[str, float] = {}
        self._reminders: list[tuple[float, str]] = []
        self._stood_s = 0.0

    def __contains__(self, request: str) -> bool:
        return request in self._ends_s

    def __len__(self) -> int:
        return len(self._ends_s)

    def begin(self, request: str, seconds: float) -> None:
        """It must have ended so long from now."""
        if len(self._reminders) > 2 * len(self._ends_s) + REMINDERS_SLACK:
            self._reminders = [(ends_s, name) for name, ends_s in self._ends_s.items()]
            heapq.heapify(self._reminders)
        ends_s = self._ends_s[request] = self._now_s() + seconds
        heapq.heappush(self._reminders, (ends_s, request))

    def end(self, request: str) -> None:
        """It has ended. Idempotent."""
        self._ends_s.pop(request, None)

    def left_s(self, request: str) -> float:
        """Until its deadline; 0 where that has passed."""
        return max(0.0, self._ends_s[request] - self._now_s())

    def stand_still(self, seconds: float) -> None:
        """The fleet was suspended for so long."""
        self._stood_s += seconds

    def due(self) -> list[str]:
        """Requests that have reached theirs, each once."""
        now, late = self._now_s(), []
        while self._reminders and self._reminders[0][0] <= now:
            ends_s, request = heapq.heappop(self._reminders)
            if self._ends_s.get(request) == ends_s:
                late.append(request)
        return late

    def check_integrity(self) -> None:
        """Raises AssertionError when a request that has not ended would not be thought of."""
        assert set(self._ends_s) <= {request for _, request in self._reminders}

    def _now_s(self) -> float:
        return self._clock.monotonic_s() - self._stood_s

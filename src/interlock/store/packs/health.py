"""When a disk that failed is asked again: after a pause that doubles, and with one try."""

from __future__ import annotations

import errno

from interlock.core.limits import DISK_RETRY_SECONDS_MAX, DISK_RETRY_SECONDS_MIN

OK, FULL, FAILING = "ok", "full", "failing"


class Health:
    """Of one direction, reading or writing. `patience`: failures in a row that are borne before it is left alone."""

    def __init__(self, patience: int = 1) -> None:
        self.state = OK
        self.reason = ""
        self._patience = patience
        self._failures = 0
        self._pause_s = DISK_RETRY_SECONDS_MIN
        self._next_s = 0.0

    def may_try(self, now_s: float) -> bool:
        """Whether it is asked now."""
        return self.state == OK or now_s >= self._next_s

    def wait_s(self, now_s: float) -> float:
        """How long until the next try; 0 when it may be tried now."""
        return 0.0 if self.state == OK else max(0.0, self._next_s - now_s)

    def failed(self, error: OSError, now_s: float) -> bool:
        """True when this is news: the state changed."""
        self._failures += 1
        if self._failures < self._patience:
            return False
        before = self.state
        self.state = FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else FAILING
        self.reason = str(error)
        if before != OK:
            self._pause_s = min(2 * self._pause_s, DISK_RETRY_SECONDS_MAX)
        self._next_s = now_s + self._pause_s
        return self.state != before

    def worked(self) -> bool:
        """True when it had not before."""
        before, self.state, self.reason = self.state, OK, ""
        self._failures, self._pause_s = 0, DISK_RETRY_SECONDS_MIN
        return before != OK

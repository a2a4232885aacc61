"""How a command ends when it does not end well. The message is one sentence that says what to do."""

from __future__ import annotations

FAILED, ASKED_WRONGLY, REFUSED, TOO_LATE = 1, 2, 3, 4
"""Exit statuses. Scripts tell by them what to do next: nothing was changed by what was refused; what is too late may still
come."""


class Usage(Exception):  # noqa: N818 - says what is, as the others do
    """Asked wrongly: exit status 2."""


class Failure(Exception):  # noqa: N818 - says what is, as the others do
    """Asked rightly, and it failed: exit status 1, or the one given."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status

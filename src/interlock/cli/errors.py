"""How a command ends when it does not end well. The message is one sentence that says what to do."""

from __future__ import annotations


class Usage(Exception):  # noqa: N818 - says what is, as the others do
    """Asked wrongly: exit status 2."""


class Failure(Exception):  # noqa: N818 - says what is, as the others do
    """Asked rightly, and it failed: exit status 1."""

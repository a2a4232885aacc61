"""What the node answers when it will not: a code for programs, a sentence for people."""

from __future__ import annotations

from interlock.core.errors import InterlockError


class Refusal(InterlockError):  # noqa: N818 - what it is to the client: an answer
    """Nothing was changed. `code` is one word that clients count by."""

    def __init__(self, code: str, message: str, *, retryable: bool = False, hint: str = "") -> None:
        super().__init__(message, retryable=retryable, hint=hint, code=code)
        self.code = code

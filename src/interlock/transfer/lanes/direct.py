"""A prepared read that the calling thread itself takes over one connection, and waits for.

It is used in that connection's turn alone, by one thread: so it has neither locks nor futures, which cost more than the system calls of a small read.
What goes wrong for another reason than the owner's refusal or the deadline is an ordinary transfer's to mend, on whatever lane is left.
"""

from __future__ import annotations

from collections import deque

from interlock.transfer.outcomes import Outcome
from interlock.transfer.pieces import Chunk
from interlock.transfer.prepared import PreparedRead


class DirectRead:
    """To a connection it is as a `Transfer`: it gives chunks, and hears what becomes of them."""

    def __init__(self, prepared: PreparedRead, deadline_s: float) -> None:
        self.plan = prepared.plan
        self.deadline_s = deadline_s
        self.over = False
        """It was refused, or its deadline passed: nothing more is taken into its memory."""
        self._pending: deque[Chunk] = deque(prepared.chunks(1))
        self._size_bytes = 0
        self._failure: tuple[str, str] | None = None
        self._has_left = False

    @property
    def has_left(self) -> bool:
        """The connection touches its memory no more."""
        return self._has_left

    def take(self, _: object) -> Chunk | None:
        """As `Transfer.take`."""
        return self._pending.popleft() if self._pending and not self.over else None

    def done(self, _: object, lane: str) -> None:  # noqa: ARG002 - there is one lane
        """As `Transfer.done`; what is left to take is in `_pending`."""
        self._size_bytes = self.plan.size_bytes - sum(chunk.size_bytes for chunk in self._pending)

    def give_back(self, _: object, moved_bytes: int, lane: str) -> None:
        """Its connection broke: whoever takes it up reads all of it."""

    def leave(self, _: object, trouble: str = "") -> None:  # noqa: ARG002 - the ordinary transfer finds out
        """As `Transfer.leave`."""
        self._has_left = True

    def fail(self, code: str, message: str) -> bool:
        """As `Transfer.fail`; True: it was decided here."""
        if self.over:
            return False
        self.over, self._failure = True, (code, message)
        return True

    def outcome(self, kind: str) -> Outcome | None:
        """Once it `has_left`. None: its connection broke before it was through."""
        owner = self.plan.owner
        if self._failure is not None:
            code, message = self._failure
            lanes = {kind: self._size_bytes} if self._size_bytes else {}
            return Outcome(False, self._size_bytes, code, message, owner, lanes)
        if self._size_bytes < self.plan.size_bytes:
            return None
        return Outcome(True, self._size_bytes, peer=owner, lanes={kind: self._size_bytes})

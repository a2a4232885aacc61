"""A read that is done again and again: its pieces are checked, joined and cut once.

A lane may keep with it what it found out for it (`way`): where the segments lie, so that a call only copies. What may change between two calls is
looked at in each: that the peer is connected, in the life that the segments are of, and that they are registered.
"""

from __future__ import annotations

from typing import Any

from interlock.transfer.pieces import Chunk, Plan


class PreparedRead:
    """Made by `TransferEngine.prepare`, read as often as wanted, from any thread. Its local buffers are held as long as it is.

    `is_once`: it will not be read again, so finding out more for it than one read needs would be in vain.
    """

    def __init__(self, plan: Plan, *, is_once: bool = False) -> None:
        self.plan, self.is_once = plan, is_once
        self.way: Any = None
        """Of the lane that read it last; that lane's alone to understand."""
        self._chunks: dict[int, list[Chunk]] = {}

    def chunks(self, ways: int) -> list[Chunk]:
        """See `Plan.chunks`."""
        if ways not in self._chunks:
            self._chunks[ways] = self.plan.chunks(ways)
        return self._chunks[ways]

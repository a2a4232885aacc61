"""Lanes whose bytes do not go over their connections: those carry questions, and carriers of the lane's own move the bytes.

A carrier that entered may be in a buffer until it left, so the lane's end waits for all of them. Shared memory and NIXL are such lanes.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

from interlock.host.threads import Lock
from interlock.transfer.lanes.pulling import PullConnection
from interlock.transfer.lanes.sockets import SocketLane
from interlock.transfer.outcomes import Carrier, Outcome, Transfer
from interlock.transfer.prepared import PreparedRead


class CarriedLane(SocketLane):
    """Subclasses say what carries a transfer (`_employ`), and what is given up when nobody carries any more (`_left`)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._inside: set[object] = set()
        self._lock = Lock()
        self._empty: Future[None] | None = None

    def _employ(self, transfer: Transfer, carrier: Carrier) -> bool:
        """The carrier entered and joined the transfer; False: it did not, for there is nothing left to carry, or the lane ends."""
        if not self.enter(carrier):
            return False
        if not transfer.join(carrier):
            self.leave(carrier)
            return False
        return True

    def read_now(self, prepared: PreparedRead, deadline_s: float) -> Outcome | None:  # noqa: ARG002
        """See `Lane.read_now`. Not over its connections, which carry questions."""
        return None

    def enter(self, carrier: object) -> bool:
        """From any thread. False: the lane ends, nothing of it may be touched."""
        with self._lock:
            if self._empty is not None:
                return False
            self._inside.add(carrier)
            return True

    def leave(self, carrier: object) -> None:
        """The carrier touches nothing of this lane any more."""
        with self._lock:
            self._inside.discard(carrier)
            empty = self._empty if not self._inside else None
        if empty is not None and not empty.done():
            empty.set_result(None)

    @property
    def is_ending(self) -> bool:
        """Carriers shall leave soon."""
        return self._destroyed

    def asker(self) -> PullConnection | None:
        """A connection over which the owner can be asked."""
        return next((pull for pull in self.pulls if not pull.is_ending), None)

    async def destroy(self) -> None:
        """See `Lane.destroy`; returns when no carrier is in it."""
        self._destroyed = True
        with self._lock:
            self._empty = Future()
            if not self._inside:
                self._empty.set_result(None)
        await super().destroy()
        await asyncio.wrap_future(self._empty)
        self._left()

    def _left(self) -> None:
        """Nobody is in the lane any more."""

"""One connection of a lane, used by whichever thread comes first: the turn, the waiting, the end.

Whoever has something for it (the pool when its socket is ready, a transfer that begins, one that is over) calls `look`. It takes the turn, or
leaves word for whoever has it; that one looks again before it goes. So no word is lost, and no thread waits for another.
The socket is closed in a turn, so never under a thread that is in a call of it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from interlock.core.errors import RemoteProtocolError
from interlock.core.limits import BULK_PATIENCE_SECONDS
from interlock.host.bulk import BulkSocket
from interlock.host.bulk_pool import NOTHING, BulkPool
from interlock.host.threads import Lock, monotonic_s
from interlock.transfer.segments import PieceRefused

GOOD_MOVE_BYTES = 64 * 1024
HURRIED_CALLS = 16
"""So many calls do not wait, after one that waited and got little: a trickling peer holds a thread for a seventeenth of its time."""


class Connection:
    """Subclasses implement `advance` and `left`. `on_end` is called once, on any thread, when it ended by itself."""

    def __init__(self, sock: BulkSocket, pool: BulkPool, on_end: Callable[[Connection, str], None]) -> None:
        self.sock, self._pool = sock, pool
        self._on_end = on_end
        self._turn = Lock()
        self._again = False
        self._ending = ""
        self._told = False
        self._armed = NOTHING
        self.closed: Future[None] = Future()
        self.moved_s = monotonic_s()
        """When bytes were moved last."""
        self.waiting = False
        """For the peer, in the middle of something."""
        self._called_s = 0.0
        self._hurried = 0

    def begin(self) -> None:
        """From now on threads serve it."""
        self.sock.to_threads()
        self._pool.add(self.sock.fileno(), self._ready)
        self.look()

    def _ready(self) -> None:
        self._armed = NOTHING  # what fired is armed no more
        self.look()

    def look(self) -> None:
        self._again = True
        while self._again and self._turn.acquire(blocking=False):
            try:
                self._again = False
                self._take_turn()
            finally:
                self._turn.release()

    def end(self, reason: str) -> None:
        """From any thread; nobody is told, `closed` is set when no thread is in it. Idempotent."""
        self._told = True
        self._stop(reason)

    def _stop(self, reason: str) -> None:
        self._ending = self._ending or reason
        self.sock.shutdown()
        self.look()

    def stall(self, now_s: float, seconds_max: float) -> None:
        """Ends it, as broken, when it has waited for the peer for so long."""
        if self.waiting and not self._ending and now_s - self.moved_s > seconds_max:
            self._stop(f"{self.sock.peer.address} moved nothing for {seconds_max} s")

    def patience(self) -> bool:
        """Shall the next call wait in the kernel for more? Not for a peer that lately made us wait for nothing."""
        self._called_s = monotonic_s()
        return self._hurried == 0

    def judge_pace(self, moved_bytes: int) -> None:
        """After a call that may have waited: did it pay?"""
        now_s = monotonic_s()
        if moved_bytes:
            self.moved_s = now_s
        if self._hurried:
            self._hurried -= 1
        elif now_s - self._called_s >= BULK_PATIENCE_SECONDS * 0.9 and moved_bytes < GOOD_MOVE_BYTES:
            self._hurried = HURRIED_CALLS

    def _take_turn(self) -> None:
        if self.closed.done():
            self.left(self._ending)  # what was given to it while it ended, when nobody looked any more
            return
        wanted = self.advance_safely()
        if self._ending:
            self._finish()
        else:
            self.arm(wanted)

    def arm(self, wanted: int) -> None:
        """In the turn. What is armed already costs no call."""
        if wanted not in (NOTHING, self._armed):
            self._armed = wanted
            self._pool.arm(self.sock.fileno(), wanted)

    def advance_safely(self) -> int:
        """In the turn."""
        if self._ending:
            return NOTHING
        try:
            return self.advance()
        except EOFError:
            self._ending = f"{self.sock.peer.address} closed the connection"
        except (ConnectionError, RemoteProtocolError, PieceRefused) as error:
            self._ending = str(error)
        return NOTHING

    def _finish(self) -> None:
        self.sock.shutdown()
        self._pool.remove(self.sock.fileno())
        self.sock.close()
        self.left(self._ending)
        self.closed.set_result(None)
        if not self._told:
            self._told = True
            self._on_end(self, self._ending)

    def advance(self) -> int:
        """Moves what can be moved; what to wait for. Raises `EOFError`, `ConnectionError`, `RemoteProtocolError`."""
        raise NotImplementedError

    def left(self, reason: str) -> None:
        """The connection is closed: give back what is in hand. May be called again, for what came meanwhile."""
        raise NotImplementedError

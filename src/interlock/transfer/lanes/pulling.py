"""The reader's end of a connection: takes chunks of transfers, asks for them, receives straight into their memory.

A transfer that is over while its bytes still come does not cost the connection: the thread that has the turn stops touching the memory
within BULK_PATIENCE_SECONDS, says so (that is the release), and the rest of the answer is poured away.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable
from enum import Enum

import msgspec
import numpy as np

from interlock.core.errors import RemoteProtocolError
from interlock.core.limits import BULK_PATIENCE_SECONDS
from interlock.host.bulk import BulkSocket
from interlock.host.bulk_pool import HANGUP, NOTHING, READABLE, WRITABLE, BulkPool
from interlock.host.foreign import Iovecs, address_of, advance
from interlock.host.threads import monotonic_s
from interlock.transfer.lanes import frames
from interlock.transfer.lanes.connection import Connection
from interlock.transfer.lanes.direct import DirectRead
from interlock.transfer.outcomes import Outcome, Transfer
from interlock.transfer.pieces import Chunk
from interlock.transfer.prepared import PreparedRead
from interlock.transfer.segments import Requests

WINDOW = 1024
WASTE_BYTES = 64 * 1024
TURN_BYTES = 64 * 1024 * 1024


class MapAnswer(msgspec.Struct, frozen=True):
    """What became of a question for a segment's mapping. `refused` says why there is none."""

    detail: bytes = b""
    fds: tuple[int, ...] = ()
    refused: frames.Refused | None = None
    broken: str = ""


class _Map(msgspec.Struct):
    segment: int
    incarnation: int
    tell: Callable[[MapAnswer], None]


_Read = Transfer | DirectRead


class _State(Enum):
    IDLE = 0
    ASKING = 1
    ANSWER = 2
    DETAIL = 3
    BODY = 4
    WASTE = 5


class PullConnection(Connection):
    """`kind` names the lane in outcomes."""

    def __init__(
        self, sock: BulkSocket, pool: BulkPool, on_end: Callable[[Connection, str], None], kind: str
    ) -> None:
        super().__init__(sock, pool, on_end)
        self._kind = kind
        self._jobs: deque[_Read | _Map] = deque()
        self._job: _Read | _Map | None = None
        self._chunk: Chunk | None = None
        self._state = _State.IDLE
        self._number = 0
        self._asking = memoryview(b"")
        self._heard = bytearray()
        self._fds: list[int] = []
        self._status, self._detail, self._left = 0, 0, 0
        self._window: Iovecs = np.empty((0, 2), np.uint64)
        self._next = 0
        self._moved = 0
        self._is_here = False
        """A thread that asked is in the turn, and may wait in the kernel for the answer."""
        self._waste: Iovecs | None = None
        self._waste_view = memoryview(b"")

    @property
    def is_idle(self) -> bool:
        """Nothing is under way on it, nothing waits."""
        return self._state is _State.IDLE and not self._jobs and not self._ending

    @property
    def is_ending(self) -> bool:
        """It takes no more work."""
        return bool(self._ending)

    def _is_over(self) -> bool:
        return bool(self._ending)

    # --- from any thread -------------------------------------------------------------------------------------------

    def carry(self, transfer: Transfer) -> bool:
        """Takes chunks of it until none is left; False when it cannot."""
        if self._ending or not transfer.join(self):
            return False
        self._jobs.append(transfer)
        self.look()
        if self.closed.done():  # it ended meanwhile, and nobody looks into the queue any more
            transfer.leave(self, self._ending)
            return False
        return True

    def carry_here(self, transfer: Transfer) -> bool:
        """As `carry`, with this thread doing what a thread of the pool would, until the transfer is over."""
        if self.is_ending or not self._turn.acquire(blocking=False):
            return self.carry(transfer)
        try:
            if not self.is_idle or not transfer.join(self):
                return False
            self._carry_to_end(transfer)
        finally:
            self._end_turn()
        return True

    def read_now(self, prepared: PreparedRead, deadline_s: float) -> Outcome | None:
        """See `Lane.read_now`; None also when somebody else uses this connection, or it broke."""
        if self.is_ending or not self._turn.acquire(blocking=False):
            return None
        read = DirectRead(prepared, deadline_s)
        try:
            if not self.is_idle or self.closed.done():
                return None
            self._carry_to_end(read)
            assert read.has_left, "a connection kept a read that nobody waits for"
        finally:
            self._end_turn()
        return read.outcome(self._kind)

    def _end_turn(self) -> None:
        """However short it was: who came meanwhile left word, and counts on it."""
        self._turn.release()
        if self._again:
            self.look()

    def _carry_to_end(self, read: _Read) -> None:
        """In the turn, until the connection is through with it, or ended."""
        poll, armed = None, -1
        self._jobs.append(read)
        self._is_here = True
        try:
            while True:
                wanted = self.advance_safely()
                if self._is_over() or (self._job is not read and read not in self._jobs):
                    break
                if monotonic_s() >= read.deadline_s:  # also while it waits behind another
                    read.fail("deadline", "its deadline passed")
                    continue
                if self._state in (_State.ANSWER, _State.DETAIL):
                    continue  # it waited for them
                poll = poll or select.poll()
                if wanted != armed:
                    events = select.POLLIN if wanted == READABLE else select.POLLOUT
                    poll.register(self.sock.fileno(), events)
                    armed = wanted
                poll.poll(int(BULK_PATIENCE_SECONDS * 1000))
        except BaseException as error:
            # A thread of the user's may be interrupted anywhere, also before what the kernel moved was noted: the stream is of no more use.
            read.fail("cancelled", f"the thread that read was interrupted by {type(error).__name__}")
            self._ending = self._ending or "the thread that read over it was interrupted"
            self._finish()
            raise
        finally:
            self._is_here = False
        if self._is_over():
            self._finish()
        else:
            self.arm(wanted)

    def ask_map(self, segment: int, incarnation: int, tell: Callable[[MapAnswer], None]) -> None:
        """`tell` is called once, on any thread; descriptors belong to it."""
        job = _Map(segment, incarnation, tell)
        self._jobs.append(job)
        self.look()
        if self.closed.done() and job in self._jobs:
            self._jobs.remove(job)
            tell(MapAnswer(broken=self._ending))

    # --- in the turn -----------------------------------------------------------------------------------------------

    def advance(self) -> int:
        begun = self._moved_in_turn = 0
        while self._moved_in_turn - begun < TURN_BYTES:
            self._mind_the_end()
            match self._state:
                case _State.IDLE:
                    if not self._begin():
                        self.waiting = False
                        return self._await_nothing()
                case _State.ASKING:
                    sent = self.sock.send(self._asking)
                    self._asking = self._asking[sent:]
                    if len(self._asking):
                        return WRITABLE
                    self._state = _State.ANSWER
                    if not self._is_here:
                        return READABLE  # it takes a round trip at least
                case _State.ANSWER | _State.DETAIL:
                    if not self._hear():
                        return READABLE
                case _State.BODY:
                    if not self._receive():
                        return READABLE
                case _State.WASTE:
                    if not self._pour_away():
                        return READABLE
        return READABLE

    def _await_nothing(self) -> int:
        """An idle connection's end is the lane's, and is watched; nothing may come unasked, and is found when it is asked next.

        Were its bytes watched too, the answer to a thread that carries by itself (`carry_here`) would wake one of the pool besides.
        """
        if self._is_here:
            return HANGUP
        data = self.sock.receive(1, self._fds)
        if data is not None:
            raise RemoteProtocolError(f"{self.sock.peer.address} sent bytes that nobody asked for")
        return HANGUP

    def _mind_the_end(self) -> None:
        """A transfer that is over is left at once; what still comes for it is waste. Who carries it here is its only clock."""
        job = self._job
        if not isinstance(job, _Read):
            return
        if self._is_here and not job.over and monotonic_s() >= job.deadline_s:
            job.fail("deadline", "its deadline passed")
        if job.over:
            self._job = self._chunk = None
            if self._state is _State.BODY:
                self._state = _State.WASTE
            job.leave(self)

    def _begin(self) -> bool:
        while True:
            if self._job is None:
                if not self._jobs:
                    return False
                self._job = self._jobs.popleft()
            job = self._job
            if isinstance(job, _Map):
                rows = np.array([[job.segment, 0, 1]], np.uint64)
                self._ask(frames.MAP, job.incarnation, rows)
                return True
            self._chunk = job.take(self)
            if self._chunk is not None:
                self._ask(frames.READ, job.plan.incarnation, self._chunk.requests)
                return True
            self._job = None
            job.leave(self)

    def _ask(self, kind: int, incarnation: int, rows: Requests) -> None:
        self._number += 1
        self._asking = memoryview(frames.request(kind, self._number, incarnation, rows))
        self._state = _State.ASKING
        self._moved = 0
        self.waiting, self.moved_s = True, monotonic_s()

    def _hear(self) -> bool:
        """The answer's header, or its detail."""
        wanted = frames.HEADER.size if self._state is _State.ANSWER else self._detail
        if len(self._heard) < wanted:
            data = self.sock.receive(wanted - len(self._heard), self._fds, patient=self._is_here)
            if data is None:
                return False
            self._heard += data
            self.moved_s = monotonic_s()
            if len(self._heard) < wanted:
                return True
        heard, self._heard = bytes(self._heard), bytearray()
        if self._state is _State.ANSWER:
            self._status, self._detail, self._left = frames.read_answer(heard, self._number)
            if self._detail:
                self._state = _State.DETAIL
            else:
                self._answered()
            return True
        self._detailed(heard)
        return True

    def _answered(self) -> None:
        if self._chunk is None:
            self._state = _State.WASTE if self._left else _State.IDLE
            return
        if self._left != self._chunk.size_bytes:
            raise RemoteProtocolError(
                f"{self.sock.peer.address} sends {self._left} bytes, asked were {self._chunk.size_bytes}"
            )
        self._window, self._next = self._window[:0], 0
        self._state = _State.BODY

    def _detailed(self, heard: bytes) -> None:
        job, self._state = self._job, _State.IDLE
        if isinstance(job, _Map):
            self._job = None
            refused = frames.read_refusal(heard) if self._status == frames.REFUSED else None
            fds, self._fds = tuple(self._fds), []
            job.tell(MapAnswer(heard, fds, refused))
            return
        if self._status != frames.REFUSED:
            raise RemoteProtocolError(f"{self.sock.peer.address} answered a read with a mapping")
        refused = frames.read_refusal(heard)
        if job is not None:
            self._job = self._chunk = None
            job.fail(refused.code, refused.message)
            job.leave(self)

    def _receive(self) -> bool:
        chunk = self._chunk
        assert chunk is not None
        if not len(self._window):
            self._window = np.ascontiguousarray(chunk.into[self._next : self._next + WINDOW])
            self._next += len(self._window)
        got = self.sock.receive_pieces(self._window, patient=self.patience())
        self.judge_pace(got)
        if not got:
            return False
        self._moved += got
        self._moved_in_turn += got
        self._left -= got
        if self._left:
            self._window = advance(self._window, got)
        else:
            job = self._job
            assert isinstance(job, _Read)
            self._state, self._chunk, self._window = _State.IDLE, None, self._window[:0]
            job.done(self, self._kind)
        return True

    def _pour_away(self) -> bool:
        if self._waste is None:
            self._waste_view = memoryview(bytearray(WASTE_BYTES))
            self._waste = np.array([[address_of(self._waste_view), WASTE_BYTES]], np.uint64)
        self._waste[0, 1] = min(WASTE_BYTES, self._left)
        got = self.sock.receive_pieces(self._waste, patient=False)
        if not got:
            return False
        self.moved_s = monotonic_s()
        self._moved_in_turn += got
        self._left -= got
        if not self._left:
            self._state, self._waste, self._waste_view = _State.IDLE, None, memoryview(b"")
        return True

    def left(self, reason: str) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        jobs, self._jobs = [self._job, *self._jobs], deque()
        in_body = self._state is _State.BODY
        self._job = self._chunk = None
        for job in jobs:
            if isinstance(job, _Read):
                if job is jobs[0]:
                    job.give_back(self, self._moved if in_body else 0, self._kind)
                job.leave(self, reason)
            elif job is not None:
                job.tell(MapAnswer(broken=reason))


__all__ = ["NOTHING", "MapAnswer", "PullConnection"]

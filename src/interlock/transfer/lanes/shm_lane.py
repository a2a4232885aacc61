"""The reader's end of a shared-memory lane: how each segment is reached (lanes/shm says which ways there are; lanes/shm_copy copies)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from interlock.core.limits import SEGMENTS_MAX
from interlock.host.foreign import address_of, read_process
from interlock.host.memory import MappedMemory, map_memory
from interlock.transfer.lanes.carriers import CarriedLane
from interlock.transfer.lanes.pulling import MapAnswer, PullConnection
from interlock.transfer.lanes.shm_copy import MAPPED, PROCESS, SOCKET, Copy, View, Way, find_way
from interlock.transfer.outcomes import Outcome, Transfer
from interlock.transfer.prepared import PreparedRead
from interlock.transfer.segments import PieceRefused

BOARD_BYTES = 8 * SEGMENTS_MAX
BOARD = 0
"""The number under which the board itself is asked for; segments count from 1."""
INLINE_BYTES = 64 * 1024
"""So little is copied by whoever asks, also on the loop: handing it to a thread would take longer."""
_log = logging.getLogger(__name__)


class ShmMapping(msgspec.Struct, frozen=True, array_like=True):
    """The owner's answer. For the board, `address` is where `nonce` stands in the owner's memory, for a probe."""

    how: str
    size_bytes: int
    address: int = 0
    offset: int = 0
    nonce: bytes = b""


_mappings = msgspec.msgpack.Decoder(ShmMapping)


class ShmLane(CarriedLane):
    """Its connections carry questions for mappings, and bytes only of segments that can be reached no other way."""

    def __init__(self, *arguments: Any, reads_processes: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._reads_processes = reads_processes
        self._views: dict[int, View] = {}
        self._asked: dict[int, list[Callable[[], None]]] = {}
        self._board: memoryview | None = None
        self._board_memory: MappedMemory | None = None
        self._pid = 0
        self._no_process = "" if reads_processes else "it is switched off"
        self.copied_bytes = 0

    # --- transfers -------------------------------------------------------------------------------------------------

    def _carry(self, transfer: Transfer, *, here: bool) -> bool:
        if not self._may_carry(transfer) or not self.pulls or not transfer.plan.is_on_host:
            return False
        copy = Copy(self, transfer)
        if not self._employ(transfer, copy):
            return transfer.over or not transfer.has_pending
        if here or transfer.plan.size_bytes <= INLINE_BYTES:
            copy.run()
        else:
            self._pool.run(copy.run)
        return True

    def by_socket(self, transfer: Transfer) -> bool:
        """The bytes of segments that can be neither mapped nor read."""
        return super()._carry(transfer, here=False)

    def read_now(self, prepared: PreparedRead, deadline_s: float) -> Outcome | None:
        """See `Lane.read_now`. What was found out at the call before is used again while it is true; that is looked at each time."""
        if prepared.is_once:
            return None
        way = prepared.way
        if not isinstance(way, Way) or way.lane is not self:
            if not self._listed or prepared.plan.incarnation != self.pairing.theirs.incarnation:
                return None
            way = prepared.way = find_way(self, prepared.plan)
            if way is None:
                return None
        visit = object()
        if not self.enter(visit):
            return None
        try:
            if not way.is_true():
                prepared.way = None
                return None
            return way.read(deadline_s)
        finally:
            self.leave(visit)

    # --- views -----------------------------------------------------------------------------------------------------

    def view(self, number: int) -> View | None:
        """How that segment is reached; None: nobody asked yet."""
        return self._views.get(number)

    def stands(self, number: int) -> bool:
        """Does the owner's board still show the segment?"""
        board = self._board
        return board is not None and board[number % SEGMENTS_MAX] == number

    def ask(self, number: int, incarnation: int, then: Callable[[], None]) -> bool:
        """`then` is called on some thread when `view(number)` is known, or will never be. False: nobody can be asked."""
        with self._lock:
            waiting = self._asked.get(number)
            if waiting is not None:
                waiting.append(then)
                return True
            pull = self.asker()
            if pull is None:
                return False
            self._asked[number] = [then]
        self._ask(pull, number, incarnation)
        return True

    def _ask(self, pull: PullConnection, number: int, incarnation: int) -> None:
        if self._board is None:
            pull.ask_map(
                BOARD, incarnation, lambda answer: self._got_board(answer, pull, number, incarnation)
            )
        else:
            pull.ask_map(number, incarnation, lambda answer: self._got(answer, number))

    def _got_board(self, answer: MapAnswer, pull: PullConnection, number: int, incarnation: int) -> None:
        try:
            mapping = _decode(answer)
            if mapping.size_bytes != BOARD_BYTES or len(answer.fds) != 1:
                raise ValueError("the peer's board is none")
            memory = map_memory(answer.fds[0], BOARD_BYTES, writable=False)
        except (ValueError, PieceRefused) as error:
            self._known(number, View(SOCKET, 0, 0, f"the owner's board cannot be had: {error}"))
            return
        if self._board is None:
            self._board_memory = memory
            self._probe(pull, mapping)
            self._board = memory.view.cast("Q")
        pull.ask_map(number, incarnation, lambda mapped: self._got(mapped, number))

    def _probe(self, pull: PullConnection, mapping: ShmMapping) -> None:
        """May we read the owner's process? On a number that it told us, and that no other process has there."""
        if not self._reads_processes:
            return
        pid = pull.sock.peer.pid or 0
        seen = bytearray(len(mapping.nonce))
        try:
            if not pid or not seen:
                raise ProcessLookupError("its process has no number here (another PID namespace)")
            into = np.array([[address_of(memoryview(seen)), len(seen)]], np.uint64)
            read_process(pid, into, np.array([[mapping.address, len(seen)]], np.uint64))
            if bytes(seen) != mapping.nonce:
                raise ProcessLookupError("another process has its number here")
        except (OSError, BufferError) as error:
            self._no_process = f"process_vm_readv is not possible: {error}"
            _log.info("shm lane to %s: %s", self.pairing.peer, self._no_process)
            return
        self._pid = pid

    def _got(self, answer: MapAnswer, number: int) -> None:
        try:
            mapping = _decode(answer)
            self._known(number, self._make_view(mapping, answer.fds))
        except PieceRefused as refused:
            self._known(number, View(refused.code, 0, 0, refused.message))
        except ValueError as error:
            self._known(number, View(SOCKET, 0, 0, str(error)))

    def _make_view(self, mapping: ShmMapping, fds: tuple[int, ...]) -> View:
        if mapping.how == MAPPED and len(fds) == 1:
            memory = map_memory(fds[0], mapping.address, writable=False)
            if not 0 <= mapping.offset <= mapping.address - mapping.size_bytes:
                memory.close()
                raise ValueError("the owner's segment does not lie in the memory that it handed over")
            return View(MAPPED, address_of(memory.view) + mapping.offset, mapping.size_bytes, memory=memory)
        for fd in fds:
            os.close(fd)
        if self._pid and not self._no_process:
            return View(PROCESS, mapping.address, mapping.size_bytes, "it is not in shared memory")
        return View(SOCKET, 0, mapping.size_bytes, f"it is not in shared memory, and {self._no_process}")

    def _known(self, number: int, view: View) -> None:
        with self._lock:
            waiting = self._asked.pop(number, [])
            if view.how in (MAPPED, PROCESS, SOCKET):
                self._views[number] = view
        for then in waiting:
            then()

    def check(self, now_s: float) -> None:
        """Also lets go of mappings whose segments were revoked: their pages cost memory until then."""
        super().check(now_s)
        with self._lock:
            if self._inside or self._asked or self._board is None:
                return
            gone = [number for number in self._views if not self.stands(number)]
            views = [self._views.pop(number) for number in gone]
        for view in views:
            if view.memory is not None:
                view.memory.close()

    def process(self) -> int:
        return self._pid

    def owner_lives(self) -> bool:
        """A connection that is open shows that the process we read from is the one that we probed."""
        return any(not pull.is_ending for pull in self.pulls)

    # --- life ------------------------------------------------------------------------------------------------------

    def _left(self) -> None:
        for view in self._views.values():
            if view.memory is not None:
                view.memory.close()
        self._views.clear()
        if self._board is not None and self._board_memory is not None:
            self._board.release()
            self._board_memory.close()
            self._board = None

    def explain(self) -> list[str]:
        words = super().explain()
        for number, view in sorted(self._views.items())[:16]:
            words.append(
                f"segment {number} of {self.pairing.peer} is read by way of {view.how}"
                + (f": {view.why}" if view.why else "")
            )
        return words


def _decode(answer: MapAnswer) -> ShmMapping:
    """Raises `PieceRefused`, `ValueError`; descriptors that came in vain are closed."""
    try:
        if answer.broken:
            raise ValueError(answer.broken)
        if answer.refused is not None:
            raise PieceRefused(answer.refused.code, answer.refused.message)
        mapping = _mappings.decode(answer.detail)
        if mapping.size_bytes <= 0 or mapping.address < 0:
            raise ValueError("the owner's answer makes no sense")
        return mapping
    except (msgspec.MsgspecError, ValueError, PieceRefused):
        for fd in answer.fds:
            os.close(fd)
        raise

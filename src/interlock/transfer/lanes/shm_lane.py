"""The reader's end of a shared-memory lane: how each segment is reached, and the copying (lanes/shm says which ways there are)."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec
import numpy as np

from interlock.core.limits import SEGMENTS_MAX
from interlock.host.foreign import address_of, copy_pieces, read_process
from interlock.host.memory import MappedMemory, map_memory
from interlock.host.threads import Lock
from interlock.transfer.lanes.pulling import MapAnswer, PullConnection
from interlock.transfer.lanes.sockets import SocketLane
from interlock.transfer.outcomes import Transfer
from interlock.transfer.pieces import Chunk
from interlock.transfer.segments import PieceRefused, Requests

BOARD_BYTES = 8 * SEGMENTS_MAX
BOARD = 0
"""The number under which the board itself is asked for; segments count from 1."""
INLINE_BYTES = 64 * 1024
"""So little is copied by whoever asks, also on the loop: handing it to a thread would take longer."""
MAPPED, PROCESS, SOCKET = "mapped", "process_vm_readv", "socket"
_log = logging.getLogger(__name__)


class ShmMapping(msgspec.Struct, frozen=True, array_like=True):
    """The owner's answer. For the board, `address` is where `nonce` stands in the owner's memory, for a probe."""

    how: str
    size_bytes: int
    address: int = 0
    offset: int = 0
    nonce: bytes = b""


_mappings = msgspec.msgpack.Decoder(ShmMapping)


class _View(msgspec.Struct):
    """One segment as this reader reaches it."""

    how: str
    address: int
    size_bytes: int
    why: str = ""
    memory: MappedMemory | None = None


class ShmLane(SocketLane):
    """Its connections carry questions for mappings, and bytes only of segments that can be reached no other way."""

    def __init__(self, *arguments: Any, reads_processes: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._reads_processes = reads_processes
        self._views: dict[int, _View] = {}
        self._asked: dict[int, list[Callable[[], None]]] = {}
        self._lock = Lock()
        self._board: memoryview | None = None
        self._board_memory: MappedMemory | None = None
        self._pid = 0
        self._no_process = "" if reads_processes else "it is switched off"
        self._copies: set[_Copy] = set()
        self._idle: Future[None] | None = None
        self.copied_bytes = 0

    # --- transfers -------------------------------------------------------------------------------------------------

    def _carry(self, transfer: Transfer, *, here: bool) -> bool:
        if not self._listed or self._destroyed or not self.pulls or not transfer.plan.is_on_host:
            return False
        copy = _Copy(self, transfer)
        with self._lock:
            if self._idle is not None:
                return False
            self._copies.add(copy)
        if not transfer.join(copy):
            self.ended(copy)
            return transfer.over or not transfer.has_pending
        if here or transfer.plan.size_bytes <= INLINE_BYTES:
            copy.run()
        else:
            self._pool.run(copy.run)
        return True

    def by_socket(self, transfer: Transfer) -> bool:
        """The bytes of segments that can be neither mapped nor read."""
        return super()._carry(transfer, here=False)

    def ended(self, copy: _Copy) -> None:
        with self._lock:
            self._copies.discard(copy)
            idle = self._idle if not self._copies else None
        if idle is not None and not idle.done():
            idle.set_result(None)

    @property
    def is_ending(self) -> bool:
        return self._destroyed

    # --- views -----------------------------------------------------------------------------------------------------

    def view(self, number: int) -> _View | None:
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
            pull = next((pull for pull in self.pulls if not pull.is_ending), None)
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
            self._known(number, _View(SOCKET, 0, 0, f"the owner's board cannot be had: {error}"))
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
            self._known(number, _View(refused.code, 0, 0, refused.message))
        except ValueError as error:
            self._known(number, _View(SOCKET, 0, 0, str(error)))

    def _make_view(self, mapping: ShmMapping, fds: tuple[int, ...]) -> _View:
        if mapping.how == MAPPED and len(fds) == 1:
            memory = map_memory(fds[0], mapping.address, writable=False)
            if not 0 <= mapping.offset <= mapping.address - mapping.size_bytes:
                memory.close()
                raise ValueError("the owner's segment does not lie in the memory that it handed over")
            return _View(MAPPED, address_of(memory.view) + mapping.offset, mapping.size_bytes, memory=memory)
        for fd in fds:
            os.close(fd)
        if self._pid and not self._no_process:
            return _View(PROCESS, mapping.address, mapping.size_bytes, "it is not in shared memory")
        return _View(SOCKET, 0, mapping.size_bytes, f"it is not in shared memory, and {self._no_process}")

    def _known(self, number: int, view: _View) -> None:
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
            if self._copies or self._asked or self._board is None:
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

    async def destroy(self) -> None:
        self._destroyed = True
        with self._lock:
            self._idle = Future()
            if not self._copies:
                self._idle.set_result(None)
        await super().destroy()
        await asyncio.wrap_future(self._idle)
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


class _Copy:
    """One transfer's copying, on one thread at a time."""

    def __init__(self, lane: ShmLane, transfer: Transfer) -> None:
        self._lane, self._transfer = lane, transfer
        self._lock = Lock()
        self._waits = self._has_left = False

    def look(self) -> None:
        """The copying thread looks after each piece; while there is none, because a mapping is asked for, nothing can land."""
        with self._lock:
            if not self._waits or self._has_left:
                return
            self._has_left = True
        self._leave("")

    def _leave(self, trouble: str) -> None:
        self._transfer.leave(self, trouble)
        self._lane.ended(self)

    def _resume(self) -> bool:
        with self._lock:
            self._waits = False
            return not self._has_left

    def run(self) -> None:
        lane, transfer = self._lane, self._transfer
        trouble = ""
        while (chunk := transfer.take(self)) is not None:
            try:
                how = self._copy(chunk)
            except PieceRefused as refused:
                transfer.fail(refused.code, refused.message)
                break
            if how == "wait":
                return
            if how != "done":
                trouble = how
                transfer.give_back(self, 0, lane.name.kind)
                break
            transfer.done(self, lane.name.kind)
        if trouble == SOCKET and lane.by_socket(transfer):
            trouble = ""
        self._leave(trouble)

    def _copy(self, chunk: Chunk) -> str:
        """ "done", "wait" (it comes again by itself), or why not. Raises `PieceRefused`."""
        lane, transfer = self._lane, self._transfer
        views: dict[int, _View] = {}
        numbers = chunk.requests[:, 0]
        is_one = len(numbers) == 1 or bool((numbers == numbers[0]).all())
        for number in numbers[:1] if is_one else np.unique(numbers):
            view = lane.view(int(number))
            if view is None:
                return self._ask(int(number))
            if view.how == SOCKET:
                return SOCKET
            views[int(number)] = view
        for number, view in views.items():
            _check(chunk.requests if is_one else chunk.requests[numbers == number], number, view)
            self._check_stands(number)
        for number, view in views.items():
            rows: Any = slice(None) if is_one else numbers == number
            into = chunk.into[rows]
            origins = chunk.requests[rows, 1] + np.uint64(view.address)
            if view.how == MAPPED:
                if not copy_pieces(into, origins, lambda: transfer.over or lane.is_ending):
                    return "the lane was destroyed"
            else:
                source = np.stack((origins, into[:, 1]), axis=1)
                try:
                    read_process(lane.process(), into, source)
                except (OSError, BufferError) as error:
                    self._check_stands(number)
                    return f"process_vm_readv failed: {error}"
                if not lane.owner_lives():
                    return "the owner's process may be gone"
        for number in views:
            self._check_stands(number)
        lane.copied_bytes += chunk.size_bytes
        return "done"

    def _ask(self, number: int) -> str:
        lane, transfer = self._lane, self._transfer
        transfer.give_back(self, 0, lane.name.kind)

        def then() -> None:
            if not self._resume():
                return
            if lane.view(number) is None:  # refused, revoked: the socket's owner says why
                transfer_goes = lane.by_socket(transfer)
                self._leave("" if transfer_goes else "the segment cannot be mapped")
            else:
                self.run()

        with self._lock:
            self._waits = True
        if not lane.ask(number, transfer.plan.incarnation, then):
            if self._resume():
                self._leave("nobody could be asked for a mapping")
        elif transfer.over:
            self.look()
        return "wait"

    def _check_stands(self, number: int) -> None:
        if not self._lane.stands(number):
            raise PieceRefused(
                "revoked", f"segment {number} of {self._lane.pairing.peer} is not registered any more"
            )


def _check(rows: Requests, number: int, view: _View) -> None:
    size = np.uint64(view.size_bytes)
    bad = (rows[:, 1] > size) | (rows[:, 2] > size - np.minimum(rows[:, 1], size))
    if bad.any():
        raise PieceRefused("bounds", f"a piece does not lie in segment {number} of {view.size_bytes} bytes")

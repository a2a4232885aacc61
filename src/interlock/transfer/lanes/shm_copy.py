"""The copying of a shared-memory lane: a transfer's chunks, or a prepared read's pieces, straight to where they are wanted.

Nobody asks the owner for each piece here, so each copy looks by itself: the piece must lie in its segment, and the owner's board must show the
segment before the copy and after it. What was revoked in between is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from interlock.host.foreign import Iovecs, PieceCopies, copy_pieces, cut_for_calls, read_process
from interlock.host.memory import MappedMemory
from interlock.host.threads import Lock, monotonic_s
from interlock.transfer.outcomes import Outcome, Transfer
from interlock.transfer.pieces import Chunk, Plan
from interlock.transfer.segments import PieceRefused, Requests

if TYPE_CHECKING:
    from interlock.transfer.lanes.shm_lane import ShmLane

MAPPED, PROCESS, SOCKET = "mapped", "process_vm_readv", "socket"


class View(msgspec.Struct):
    """One segment as this reader reaches it."""

    how: str
    address: int
    size_bytes: int
    why: str = ""
    memory: MappedMemory | None = None


class _Share(msgspec.Struct, frozen=True):
    """The pieces of one segment."""

    number: int
    requests: Requests
    into: Iovecs

    def check(self, view: View) -> None:
        """Raises `PieceRefused` for what does not lie in the segment."""
        size = np.uint64(view.size_bytes)
        offsets, lengths = self.requests[:, 1], self.requests[:, 2]
        bad = (offsets > size) | (lengths > size - np.minimum(offsets, size))
        if bad.any():
            raise PieceRefused(
                "bounds", f"a piece does not lie in segment {self.number} of {view.size_bytes} bytes"
            )

    def origins(self, view: View) -> npt.NDArray[np.uint64]:
        return self.requests[:, 1] + np.uint64(view.address)

    def source(self, view: View) -> Iovecs:
        return np.stack((self.origins(view), self.into[:, 1]), axis=1)


def _shares(requests: Requests, into: Iovecs) -> Iterator[_Share]:
    numbers = requests[:, 0]
    if len(numbers) == 1 or (numbers == numbers[0]).all():
        yield _Share(int(numbers[0]), requests, into)
        return
    for number in np.unique(numbers):
        rows = numbers == number
        yield _Share(int(number), requests[rows], into[rows])


def _check_stands(lane: ShmLane, number: int) -> None:
    if not lane.stands(number):
        raise PieceRefused("revoked", f"segment {number} of {lane.pairing.peer} is not registered any more")


def _read_process(lane: ShmLane, number: int, into: Iovecs, source: Iovecs) -> str:
    """Why it could not; empty: it did. Raises `PieceRefused`."""
    try:
        read_process(lane.process(), into, source)
    except (OSError, BufferError) as error:
        _check_stands(lane, number)
        return f"process_vm_readv failed: {error}"
    return "" if lane.owner_lives() else "the owner's process may be gone"


class Copy:
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
        self._lane.leave(self)

    def _resume(self) -> bool:
        with self._lock:
            self._waits = False
            return not self._has_left

    def run(self) -> None:
        """Copies chunks until none is left, or a mapping must be asked for."""
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
        shares = list(_shares(chunk.requests, chunk.into))
        found: list[tuple[View, _Share]] = []
        for share in shares:
            view = lane.view(share.number)
            if view is None:
                return self._ask(share.number)
            if view.how == SOCKET:
                return SOCKET
            found.append((view, share))
        for view, share in found:
            share.check(view)
            _check_stands(lane, share.number)
        for view, share in found:
            if view.how == MAPPED:
                origins = share.origins(view)
                if not copy_pieces(share.into, origins, lambda: transfer.over or lane.is_ending):
                    return "the lane was destroyed"
            else:
                trouble = _read_process(lane, share.number, share.into, share.source(view))
                if trouble:
                    return trouble
        for share in shares:
            _check_stands(lane, share.number)
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


def find_way(lane: ShmLane, plan: Plan) -> Way | None:
    """How those pieces are read over that lane, whatever can be found out beforehand; None: not by copying, or not yet."""
    if not plan.is_on_host:
        return None
    shares = list(_shares(plan.requests, plan.into))
    views = [(share.number, lane.view(share.number)) for share in shares]
    found = [(number, view) for number, view in views if view is not None and view.how != SOCKET]
    return Way(lane, plan, shares, found) if len(found) == len(shares) else None


class Way:
    """A prepared read's way over one lane. Its addresses are used only between the lane's `enter` and `leave`, and while `is_true`."""

    def __init__(
        self, lane: ShmLane, plan: Plan, shares: list[_Share], views: list[tuple[int, View]]
    ) -> None:
        self.lane, self._plan, self._views = lane, plan, views
        self._refused: PieceRefused | None = None
        self._copies: list[PieceCopies] = []
        self._calls: list[tuple[int, Iovecs, Iovecs]] = []
        for share, (_, view) in zip(shares, views, strict=True):
            try:
                share.check(view)
            except PieceRefused as refused:
                self._refused = refused
            if view.how == MAPPED:
                self._copies.append(PieceCopies(share.into, share.origins(view)))
            else:
                for into, source in cut_for_calls(share.into, share.source(view)):
                    self._calls.append((share.number, into, source))

    def is_true(self) -> bool:
        """The lane still reaches each segment where it did."""
        return all(self.lane.view(number) is view for number, view in self._views)

    def read(self, deadline_s: float) -> Outcome | None:
        """None: an ordinary transfer finds out what is wrong, and another way."""
        try:
            how = self._read(deadline_s)
        except PieceRefused as refused:
            return Outcome(False, 0, refused.code, refused.message, self._plan.owner)
        if how == "done":
            size, kind = self._plan.size_bytes, self.lane.name.kind
            self.lane.copied_bytes += size
            return Outcome(True, size, peer=self._plan.owner, lanes={kind: size})
        if how == "deadline":
            return Outcome(False, 0, "deadline", "its deadline passed", self._plan.owner)
        return None

    def _read(self, deadline_s: float) -> str:
        lane = self.lane
        if self._refused is not None:
            raise self._refused

        def stopped() -> bool:
            return lane.is_ending or monotonic_s() >= deadline_s

        for number, _ in self._views:
            _check_stands(lane, number)
        if stopped():
            return "" if lane.is_ending else "deadline"
        for copies in self._copies:
            if not copies.run(stopped):
                return "" if lane.is_ending else "deadline"
        for number, into, source in self._calls:
            if _read_process(lane, number, into, source):
                return ""
            if stopped():
                return "" if lane.is_ending else "deadline"
        for number, _ in self._views:
            _check_stands(lane, number)
        return "done"

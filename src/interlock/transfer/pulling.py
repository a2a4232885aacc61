"""A write is a read by the owner: nobody writes another's memory (DESIGN §3; hazards M3). Both sides of it.

The writer names its segments and the owner's; the owner reads, into its own memory, only where the segment was registered with
`takes_writes`, and says when it is over: outcome and release in one word. The question is repeated until then, also after the deadline:
the writer's memory is released when the owner says so, or when another life of the owner is there.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from interlock.core.errors import InterlockError, LocalProtocolError
from interlock.core.limits import PIECES_PER_TRANSFER_MAX, TRANSFERS_UNDER_WAY_MAX
from interlock.host.threads import monotonic_s
from interlock.transfer.outcomes import Outcome, Transfer, check_timeout
from interlock.transfer.peer import Peer
from interlock.transfer.pieces import Part, as_rows, check_rows
from interlock.transfer.segments import PieceRefused, RemoteSegment, Segment, SegmentTable
from interlock.wire.identity import Identity
from interlock.wire.transfer_messages import Pull, Pulled

REPEAT_SECONDS = 0.5
REMEMBERED_MAX = 1024
ROW = 5
ANY_SIZE = 1 << 62
PAIRS_MAX = 64
"""Pairs of segments that one write may name; ours names one."""
PULL_SECONDS_MAX = 3600.0
"""A peer's word is no reason to hold a segment for longer."""
_log = logging.getLogger(__name__)


class Write:
    """Made by `TransferEngine.write`; as a `Transfer`: outcome by the deadline, release when the owner reads no more."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[Outcome] = loop.create_future()
        self._released: asyncio.Future[None] = loop.create_future()

    async def outcome(self) -> Outcome:
        """By the deadline. Never raises for what befell the write: see `Outcome.check`."""
        return await asyncio.shield(self._outcome)

    async def release(self) -> None:
        """From then on the source may change."""
        await asyncio.shield(self._released)

    def cancel(self) -> None:
        """The owner goes on until its own deadline; release follows then."""
        self.decide(Outcome(False, 0, "cancelled", "it was cancelled", self.peer))

    def decide(self, outcome: Outcome) -> None:
        """The outcome, if none was decided."""
        if not self._outcome.done():
            self._outcome.set_result(outcome)

    def let_go(self) -> None:
        """The source may change; idempotent."""
        if not self._released.done():
            self._released.set_result(None)

    @property
    def released(self) -> bool:
        """The owner reads the source no more."""
        return self._released.done()


class Writes:
    """What this engine wants others to pull."""

    def __init__(self) -> None:
        self._number = 0
        self._asked: dict[tuple[str, int], tuple[Write, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(
        self,
        target: RemoteSegment,
        source: Segment,
        pieces: Any,
        timeout_s: float,
        peer: Peer,
    ) -> Write:
        """`pieces`: rows of (remote offset, local offset, bytes). Raises `LocalProtocolError`."""
        check_timeout(timeout_s)
        if not target.takes_writes:
            raise LocalProtocolError(f"segment {target.number} of {target.owner} takes no writes")
        if pieces is None:
            pieces = [(0, 0, source.memory.size_bytes)]
        rows = as_rows(Part(target, source.memory, pieces))
        check_rows(rows, target, source.memory)
        if len(rows) > PIECES_PER_TRANSFER_MAX or len(self._asked) >= TRANSFERS_UNDER_WAY_MAX:
            raise LocalProtocolError("too many pieces, or too many writes under way")
        packed = np.empty((len(rows), ROW), "<i8")
        packed[:, 0], packed[:, 1] = source.remote.number, rows[:, 1]
        packed[:, 2], packed[:, 3], packed[:, 4] = target.number, rows[:, 0], rows[:, 2]
        self._number += 1
        pull = Pull(self._number, target.incarnation, timeout_s, packed.tobytes())
        write = Write(target.owner)
        self._asked[target.owner, pull.number] = (write, target.incarnation)
        peer.begin_use()  # before its task begins: until then another's endpoint could take the place of this one
        task = asyncio.create_task(self._ask(write, pull, monotonic_s() + timeout_s, peer))
        self._tasks.add(task)

        def done(_: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._asked.pop((write.peer, pull.number), None)
            peer.end_use()

        task.add_done_callback(done)
        return write

    async def _ask(self, write: Write, pull: Pull, deadline_s: float, peer: Peer) -> None:
        """Until it is released."""
        while not write.released:
            left_s = deadline_s - monotonic_s()
            if left_s <= 0:
                write.decide(Outcome(False, 0, "deadline", f"{write.peer} did not pull in time", write.peer))
            theirs = peer.driver.state.theirs
            if theirs is not None and theirs.incarnation > pull.incarnation:
                why = f"{write.peer} is in another life now"
                write.decide(Outcome(False, 0, "stale", why, write.peer))
                write.let_go()
                return
            peer.link.post(Pull(pull.number, pull.incarnation, max(0.0, left_s), pull.rows))
            pause_s = min(REPEAT_SECONDS, left_s) if left_s > 0 else REPEAT_SECONDS
            await asyncio.wait((write._released,), timeout=pause_s)

    def answered(self, sender: Identity, said: Pulled) -> None:
        """The owner's word about one of our writes; of another life it is not heard."""
        write, incarnation = self._asked.get((sender.name, said.number), (None, 0))
        if write is None or incarnation != sender.incarnation:
            return
        write.decide(Outcome(said.ok, said.size_bytes, said.code, said.message, sender.name))
        write.let_go()

    async def close(self) -> None:
        """When the segments are revoked and the lanes gone: then no owner can read them, or take what it read for good."""
        for write, _ in self._asked.values():
            write.decide(Outcome(False, 0, "closed", "this engine was closed", write.peer))
            write.let_go()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Pulls:
    """What others want this engine to pull. A question that is repeated is answered again, not done again."""

    def __init__(self, segments: SegmentTable, read: Callable[[str, list[Part], float], Transfer]) -> None:
        self._segments, self._read = segments, read
        self._done: OrderedDict[tuple[str, int, int], Pulled | None] = OrderedDict()
        self._forgotten: dict[str, tuple[int, int]] = {}
        """For each writer (life, the highest number whose answer was forgotten): what is below it was done, and must not be again,
        for its writer may have been told so and uses the memory for something else."""
        self._tasks: set[asyncio.Task[None]] = set()

    def asked(self, sender: Identity, said: Pull, answer: Callable[[Pulled], None]) -> None:
        """A peer asks us to pull. Asked again, it is answered again and not done again."""
        key = (sender.name, sender.incarnation, said.number)
        if key in self._done:
            done = self._done[key]
            if done is not None:
                answer(done)
            return
        if (sender.incarnation, said.number) <= self._forgotten.get(sender.name, (0, 0)):
            answer(Pulled(said.number, False, 0, "stale", "this write came after too many later ones"))
            return
        if len(self._tasks) >= TRANSFERS_UNDER_WAY_MAX:
            return  # it will be asked for again
        self._done[key] = None
        self._forget()
        task = asyncio.create_task(self._pull(key, said, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _forget(self) -> None:
        """The oldest answers; never of a pull that is under way."""
        for key in list(self._done)[: max(0, len(self._done) - REMEMBERED_MAX)]:
            if self._done[key] is not None:
                del self._done[key]
                name, incarnation, number = key
                self._forgotten[name] = max(self._forgotten.get(name, (0, 0)), (incarnation, number))

    async def _pull(self, key: tuple[str, int, int], said: Pull, answer: Callable[[Pulled], None]) -> None:
        try:
            outcome = await self._carry_out(key[0], key[1], said)
            pulled = Pulled(said.number, outcome.ok, outcome.size_bytes, outcome.code, outcome.message[:1024])
        except PieceRefused as refused:
            pulled = Pulled(said.number, False, 0, refused.code, refused.message)
        except InterlockError as error:
            pulled = Pulled(said.number, False, 0, "refused", str(error)[:1024])
        except Exception:  # its writer keeps its memory until it is answered
            _log.exception("a write of %s could not be pulled", key[0])
            pulled = Pulled(said.number, False, 0, "refused", "the pull failed; see the log there")
        self._done[key] = pulled
        answer(pulled)

    async def _carry_out(self, sender: str, incarnation: int, said: Pull) -> Outcome:
        parts, used = self._parts(sender, incarnation, said)
        transfer = self._read(sender, parts, min(said.seconds, PULL_SECONDS_MAX))
        holder = _Holder(transfer)
        if not self._segments.hold(used, holder):
            transfer.cancel()
        try:
            await transfer.release()
            return await transfer.outcome()
        finally:
            transfer.cancel()
            await asyncio.shield(transfer.release())
            self._segments.let_go(used, holder)

    def _parts(self, sender: str, incarnation: int, said: Pull) -> tuple[list[Part], list[Segment]]:
        """What is to be read into which of our segments. Raises `PieceRefused`."""
        if not 0 <= said.seconds < math.inf:
            raise PieceRefused(
                "deadline", f"the deadline of this write, {said.seconds} s, is over or is none"
            )
        if not said.rows or len(said.rows) % (8 * ROW):
            raise PieceRefused("refused", "the rows of this write are none")
        rows = np.frombuffer(said.rows, "<i8").reshape(-1, ROW)
        pairs = np.unique(rows[:, (2, 0)], axis=0)
        if len(pairs) > PAIRS_MAX or int(pairs.min()) < 1:
            raise PieceRefused(
                "refused", f"one write may name {PAIRS_MAX} pairs of segments, from number 1 on"
            )
        parts, used = [], []
        for mine, theirs in pairs.tolist():
            segment = self._segments.named(mine, said.incarnation)
            if not segment.remote.takes_writes:
                raise PieceRefused("refused", f"{segment} takes no writes")
            those = rows[(rows[:, 2] == mine) & (rows[:, 0] == theirs)]
            source = RemoteSegment(sender, incarnation, theirs, ANY_SIZE)
            parts.append(Part(source, segment.memory, those[:, [1, 3, 4]]))
            used.append(segment)
        return parts, used

    async def close(self) -> None:
        """Cancels those under way; returns when none touches a segment."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _Holder:
    """A pull into a segment: it ends when the segment is wanted back."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def end(self, reason: str) -> None:
        self._transfer.fail("revoked", reason)

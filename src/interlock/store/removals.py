"""Removals that last: what is deleted at one node is deleted at all of them, also at those that were away (core/removals).

A removal is written down, then swept here and said to every peer. One that does not answer is named to whoever asked; it hears of the
removal as soon as it is met again, and nobody takes from it what the removal is of. What the disk does not let through is tried again
until it does, also in the next life; until then nothing of it comes up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

import msgspec

from interlock.core import limits
from interlock.core.errors import InterlockError, LocalProtocolError
from interlock.core.removals import EVERYTHING, Removal, RemovalBook, What
from interlock.host.base import Host
from interlock.host.state_file import StateFile
from interlock.store.refusal import Refusal
from interlock.wire.identity import Identity
from interlock.wire.store_messages import Done, Remove

FILE = "removals"
KIND = "store removals"
Removed = Annotated[list[Removal], msgspec.Meta(max_length=limits.REMOVALS_TOLD_MAX)]
_log = logging.getLogger(__name__)


class RemoveHere(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Carry this out. Answered by `Done` when it is."""

    removal: Removal


class TellRemovals(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """These I know. Which do you know, after number `after` of the life with slab `slab`?"""

    slab: int
    after: Annotated[int, msgspec.Meta(ge=0)]
    removals: Removed


class RemovalsTold(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Up to number `last` of the life with slab `slab`. As many as a message takes: there may be more."""

    slab: int
    last: int
    removals: Removed


class Meeting(msgspec.Struct):
    """How far this node and one peer have told each other what they know."""

    slab: int = 0
    """Of the peer's life."""
    told: int = 0
    heard: int = 0


class _Kept(msgspec.Struct, frozen=True):
    disk: str
    """The directory of packs in which those were done that are done."""
    removals: list[Removal]


Ask = Callable[[str, msgspec.Struct, type], Awaitable[Any]]
Sweep = Callable[[What], Awaitable[tuple[int, bool]]]
_kept = msgspec.msgpack.Decoder(_Kept)


class Removals:
    """One node's removals, and its part in those of others.

    `sweep`: takes away what is here, with all that is on its way; how many blocks, and whether nothing is left. `ask`: a peer's
    answer; raises what `TransferEngine.ask` does. `file`: where they are kept; None: for this life only.
    """

    def __init__(self, host: Host, me: Identity, slab: int, file: StateFile | None, sweep: Sweep) -> None:
        self._host, self._me, self._slab, self._file, self._sweep = host, me, slab, file, sweep
        self.book = RemovalBook()
        self._disk = ""
        self._peers: Sequence[str] = ()
        self._ask: Ask | None = None
        self._keeping, self._sweeping = asyncio.Lock(), asyncio.Lock()
        self._wake = asyncio.Event()

    def with_peers(self, peers: Sequence[str], ask: Ask) -> None:
        """Where else a removal is to be carried out."""
        self._peers, self._ask = peers, ask

    # --- what is kept ----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Reads what earlier lives kept. Raises `OSError` when the file cannot be read: nothing is lost yet."""
        if self._file is None:
            return
        try:
            body = await self._host.in_thread(self._file.load)
            if body is not None:
                kept = _kept.decode(body)
                self._disk, self.book = kept.disk, RemovalBook(kept.removals)
        except (ValueError, msgspec.MsgspecError) as error:
            aside = await self._host.in_thread(self._file.set_aside)
            _log.error(
                "%s: what was removed is not known any more, so everything is, here and at the peers; the file is now %s",
                error,
                aside,
            )
            self._begin(EVERYTHING)
            await self._keep()

    def disk_opened(self, identity: str, *, empty: bool) -> None:
        """The directory that is open now. In another than the last one nothing is done yet."""
        if identity != self._disk:
            self._disk = identity
            if not empty:
                self.book.undo()
        self._wake.set()

    def without_disk(self) -> None:
        """There is no directory in this life: what is done in it is done in none, also not in that of an earlier life."""
        self._disk = ""

    async def _keep(self) -> None:
        """Raises `OSError`."""
        if self._file is None:
            return
        async with self._keeping:
            body = msgspec.msgpack.encode(_Kept(self._disk, list(self.book)))
            await self._host.in_thread(self._file.save, body)

    # --- what is said ----------------------------------------------------------------------------------------------

    async def everywhere(self, body: Remove) -> Done:
        """Here and at every peer. `Done.missed`: the nodes that did not carry it out yet; they will. Raises `Refusal`."""
        removal = self._begin(What(body.tenant, body.prefix))
        await self._write_down()
        asking = asyncio.gather(*(self._at(peer, RemoveHere(removal)) for peer in self._peers))
        gone, whole = await self._carry_out(removal)
        there = await asking
        missed = [peer for peer, count in zip(self._peers, there, strict=True) if count is None]
        return Done(gone + sum(count or 0 for count in there), missed if whole else [self._me.name, *missed])

    def _begin(self, what: What) -> Removal:
        # Incarnations rise also where the clock stepped back and the file is lost: so do epochs.
        at_least = max(self._host.clock.wall_ns(), self._me.incarnation)
        try:
            return self.book.begin(what, self._me.name, at_least)
        except LocalProtocolError as error:
            raise Refusal("too_many_removals", str(error)) from error

    async def _write_down(self) -> None:
        try:
            await self._keep()
        except OSError as error:
            self._wake.set()
            raise Refusal(
                "not_kept",
                f"the removal could not be written down, so it may not outlast this process: {error}",
                retryable=True,
            ) from error

    async def _at(self, peer: str, question: RemoveHere) -> int | None:
        assert self._ask is not None
        try:
            done: Done = await self._ask(peer, question, Done)
            return done.count
        except (InterlockError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            _log.warning("node %s has not carried out a removal yet: %s", peer, error)
            return None

    # --- what is heard ---------------------------------------------------------------------------------------------

    async def asked(self, peer: str, question: RemoveHere) -> Done:
        """A peer was asked for it, and asks us. Raises `Refusal` when it could not be carried out now."""
        removal = question.removal
        if removal.what == EVERYTHING:
            raise Refusal("bad_remove", f"{peer} would have everything removed without saying so")
        await self._learn([removal])
        gone, whole = await self._carry_out(removal)
        if not whole:
            raise Refusal("not_removed", "the disk did not let it through; it is tried again", retryable=True)
        return Done(gone)

    async def told(self, question: TellRemovals) -> RemovalsTold:
        """What a peer knows, for what we know. Raises `Refusal`."""
        await self._learn(question.removals)
        after = question.after if question.slab == self._slab else 0
        removals, last = self.book.page(after, limits.REMOVALS_TOLD_MAX)
        return RemovalsTold(self._slab, last, removals)

    async def _learn(self, said: Sequence[Removal]) -> None:
        """All for which there is room; those of names that are known need none. Raises `Refusal` when there was not enough."""
        before = self.book.number
        full: LocalProtocolError | None = None
        for removal in said:
            try:
                self.book.heard(removal)
            except LocalProtocolError as error:
                full = error
        if self.book.number != before:
            self._wake.set()
            await self._write_down()
        if full is not None:
            raise Refusal("too_many_removals", str(full)) from full

    async def meet(self, peer: str, meeting: Meeting) -> None:
        """Tells the peer what is new here, and hears what is new there. Raises what `ask` does, and `Refusal`."""
        assert self._ask is not None
        while True:
            mine, told = self.book.page(meeting.told, limits.REMOVALS_TOLD_MAX)
            answer: RemovalsTold = await self._ask(
                peer, TellRemovals(meeting.slab, meeting.heard, mine), RemovalsTold
            )
            await self._learn(answer.removals)
            again = meeting.slab not in (0, answer.slab)
            meeting.slab, meeting.heard, meeting.told = answer.slab, answer.last, 0 if again else told
            if meeting.told >= self.book.number and len(answer.removals) < limits.REMOVALS_TOLD_MAX:
                return

    def stats(self) -> dict[str, float]:
        """Gauges by metric name."""
        return {
            "interlock_store_removals_number": float(len(self.book)),
            "interlock_store_removals_pending_number": float(len(self.book.pending())),
        }

    # --- what is done ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Carries out what was heard of, and what could not be carried out before. Until cancelled."""
        while True:
            for removal in self.book.pending():
                try:
                    await self._carry_out(removal)
                except Exception:
                    # A defect of ours. It stays pending, so nothing of it comes up, and is tried again.
                    _log.exception("%s could not be carried out", removal.what)
            self._wake.clear()
            if not self.book.pending():
                await self._wake.wait()
            else:
                await self._host.clock.sleep_s(limits.REMOVAL_RETRY_SECONDS)

    async def _carry_out(self, removal: Removal) -> tuple[int, bool]:
        async with self._sweeping:
            newest = self.book.get(removal.name)
            assert newest is not None
            if newest.done:  # a sweep that began after both of them
                return 0, True
            gone, whole = await self._sweep(newest.what)
            if not whole:
                self._wake.set()  # `run` tries it again
            elif self.book.done(newest):
                try:
                    await self._keep()
                except OSError as error:  # the next life carries it out once more
                    _log.warning("that a removal is done could not be written down: %s", error)
            return gone, whole

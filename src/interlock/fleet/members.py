"""The coordinator's members: a record of each (`core/roster`), its connection, and the proof of its exit.

Silence and a closed connection make a member SUSPECT after a while. The exit of the process at the other end makes it
SUSPECT at once, or LOST where no launcher answers for the whole tree of processes (`exit_is_proof`): an engine's workers may
outlive the process that speaks for them, and LOST lets others take its memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import msgspec

from interlock.core.errors import InterlockError
from interlock.core.identity import Epoch
from interlock.core.limits import MEMBERS_MAX, SILENCE_SECONDS_MAX
from interlock.core.roster import (
    AnswerStale,
    Gone,
    MemberRecord,
    Reported,
    RosterEvent,
    Sight,
    Silent,
    register,
    transition,
)
from interlock.core.targets import State
from interlock.fleet.coordinator_state import KnownMember
from interlock.host.base import Host, Watch
from interlock.wire.channel import Channel
from interlock.wire.fleet_messages import EngineFacts, Load, Member, MemberReport, Memory


class Seat(msgspec.Struct):
    """One member: what `core` knows of it, and what only the driver needs."""

    record: MemberRecord
    facts: EngineFacts
    load: Load
    heard_s: float
    memory: Memory | None = None
    channel: Channel | None = None
    watch: Watch | None = None
    watching: asyncio.Task[None] | None = None


class Members:
    """`on_change` is called with the record after each change that watchers and commands must see."""

    def __init__(self, host: Host, *, exit_is_proof: bool, on_change: Callable[[MemberRecord], None]) -> None:
        self._host, self._exit_is_proof, self._on_change = host, exit_is_proof, on_change
        self._seats: dict[str, Seat] = {}
        self._ends: dict[str, int] = {}
        """Ends told of names that had no seat, or by fronts: the highest life that is over."""

    def restore(self, known: Iterable[KnownMember]) -> None:
        """Lives of which the last coordinator knew: awaited, and suspect until they are heard."""
        for member in known:
            record = MemberRecord(member.name, member.incarnation, State.STARTING, sight=Sight.SUSPECT)
            self._seats[member.name] = Seat(record, member.facts, Load(), self._host.clock.monotonic_s())

    def known(self) -> list[KnownMember]:
        """For the state file: every life not seen to end."""
        return [
            KnownMember(seat.record.name, seat.record.incarnation, seat.facts)
            for seat in self._seats.values()
            if seat.record.sight is not Sight.LOST
        ]

    def records(self) -> list[MemberRecord]:
        return [seat.record for seat in self._seats.values()]

    def record(self, name: str) -> MemberRecord:
        """Raises KeyError for who never reported."""
        return self._seats[name].record

    def seats(self) -> list[Seat]:
        return list(self._seats.values())

    def listing(self, epoch: Epoch) -> list[Member]:
        """As told to fronts and administrators."""
        return [
            Member(
                seat.record.name,
                seat.record.incarnation,
                seat.facts,
                seat.record.word,
                seat.record.standing == epoch,
                seat.record.version,
                seat.load,
                seat.memory,
            )
            for _, seat in sorted(self._seats.items())
        ]

    def memories(self) -> dict[tuple[str, int], Memory]:
        """By name and incarnation, of those that said."""
        return {
            (seat.record.name, seat.record.incarnation): seat.memory
            for seat in self._seats.values()
            if seat.memory is not None
        }

    def lives(self) -> dict[str, int]:
        """The newest of each name that is known."""
        seated = {name: seat.record.incarnation for name, seat in self._seats.items()}
        return {name: max(self._ends.get(name, 0), seated.get(name, 0)) for name in self._ends | seated}

    def forget_lost(self) -> None:
        """New lives are launched: those that are over are waited for no more. That they are over is remembered."""
        for name, seat in list(self._seats.items()):
            if seat.record.sight is Sight.LOST:
                self.forbid(name, seat.record.incarnation)
                self._leave(self._seats.pop(name))

    def report(self, channel: Channel, said: MemberReport) -> AnswerStale | None:
        """A member's word. Returns what to answer to a life that is over.

        Raises ValueError for a state that does not exist, InterlockError when there is no seat left.
        """
        name, incarnation = channel.peer.name, channel.peer.incarnation
        event = Reported(incarnation, State(said.state), said.epoch, said.standing, said.version, said.failed)
        if incarnation <= self._ends.get(name, 0):
            return AnswerStale(self._ends[name])
        seat = self._seats.get(name)
        if seat is None:
            seat = self._take_seat(name, register(name, event), said)
            self._on_change(seat.record)
        else:
            before = seat.record
            seat.record, effects = transition(before, event)
            stale = [effect for effect in effects if isinstance(effect, AnswerStale)]
            if stale:
                return stale[0]
            if seat.record.incarnation != before.incarnation:
                self._leave(seat)
            if effects:
                self._on_change(seat.record)
        seat.facts, seat.load, seat.heard_s = said.facts, said.load, self._host.clock.monotonic_s()
        seat.memory = said.memory
        if seat.channel is not channel:
            seat.channel = channel
            self._watch_exit(seat, channel)
        return None

    def gone(self, name: str, incarnation: int) -> None:
        """The launcher's word. 0: every life of that name so far."""
        seat = self._seats.get(name)
        if seat is None:
            self.forbid(name, incarnation)
            return
        self._event(seat, Gone(incarnation))

    def forbid(self, name: str, incarnation: int) -> None:
        """A front's word: up to this life all are over. No proof of anybody's exit, so a seat stays as it is; but who reports as
        such a life is told so, leaves, and comes back as a newer one."""
        if name in self._ends or len(self._ends) < MEMBERS_MAX:
            self._ends[name] = max(self._ends.get(name, 0), incarnation)

    def look(self) -> None:
        """Whoever was not heard for too long is suspected."""
        now = self._host.clock.monotonic_s()
        for seat in self._seats.values():
            if seat.record.sight is Sight.HEARD and now - seat.heard_s > SILENCE_SECONDS_MAX:
                self._event(seat, Silent(seat.record.incarnation))

    def unbind(self, channel: Channel) -> None:
        """A connection ended: no proof of anything, but nothing can be told over it."""
        for seat in self._seats.values():
            if seat.channel is channel:
                seat.channel = None

    async def close(self) -> None:
        tasks = [seat.watching for seat in self._seats.values() if seat.watching is not None]
        for seat in self._seats.values():
            self._leave(seat)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take_seat(self, name: str, record: MemberRecord, said: MemberReport) -> Seat:
        if len(self._seats) >= MEMBERS_MAX:
            lost = [n for n, s in self._seats.items() if s.record.sight is Sight.LOST]
            if not lost:
                raise InterlockError(
                    f"{MEMBERS_MAX} members are registered, {name} cannot be", hint="stop some"
                )
            self._leave(self._seats.pop(lost[0]))
        seat = self._seats[name] = Seat(record, said.facts, said.load, self._host.clock.monotonic_s())
        return seat

    def _event(self, seat: Seat, event: RosterEvent) -> None:
        seat.record, effects = transition(seat.record, event)
        if effects:
            self._on_change(seat.record)

    def _watch_exit(self, seat: Seat, channel: Channel) -> None:
        if seat.watch is not None or channel.peer_process is None:
            return
        try:
            watch = self._host.watch(channel.peer_process.pid)
        except ProcessLookupError:
            return  # its silence, or its launcher, will tell
        if channel.peer_process.exited:
            watch.close()  # the number may be somebody else's by now
            return
        seat.watch = watch
        seat.watching = asyncio.create_task(
            self._report_exit(seat, watch, channel.peer.incarnation), name=f"exit of {channel.peer}"
        )

    async def _report_exit(self, seat: Seat, watch: Watch, incarnation: int) -> None:
        await watch.wait_exited()
        self._event(seat, Gone(incarnation) if self._exit_is_proof else Silent(incarnation))

    def _leave(self, seat: Seat) -> None:
        """Let go of a life's process; its successor brings its own."""
        if seat.watching is not None:
            seat.watching.cancel()
        if seat.watch is not None:
            seat.watch.close()
        seat.watch = seat.watching = None

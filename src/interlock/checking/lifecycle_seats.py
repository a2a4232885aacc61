"""When two states of a fleet's world are one: what no core looks at any more is dropped, and members have no names."""

from __future__ import annotations

from typing import Any

import msgspec

from interlock.checking.parts import Machine, Mail
from interlock.core.fleet_state import FleetState, Phase
from interlock.core.identity import Epoch
from interlock.core.lifecycle import MemberState
from interlock.core.roster import MemberRecord, Sight
from interlock.core.targets import FINISHED, State, Target

NOBODY = -1
"""No record of this member."""
ALIVE, DEAD = range(2)
Seat = tuple[int, int, int, int, str]
"""Of one member: (core, record, mail, life, what it loads)."""


class Fleet(msgspec.Struct, frozen=True, array_like=True):
    """Of the whole world. Cores are numbers of their machines; tuples have one place for each member."""

    fleet: int
    records: tuple[int, ...]
    members: tuple[int, ...]
    mail: tuple[int, ...]
    """Targets told to this member and not outdated yet (bits)."""
    life: tuple[int, ...]
    loading: tuple[str, ...]
    """Which weights a member loads while it is UPDATING."""
    asked: int
    """Commands accepted so far (bits)."""
    promised: int
    """Owners who were told that their pause stands, and have not released it (bits)."""
    deaths_left: int
    freezes_left: int
    failures_left: int
    restarts_left: int
    front: int = 0
    """The target that a front was told last (a bit), 0: none."""
    updated: bool = False
    """Somebody was told that the fleet stands with weights that are not the first."""


class Seats:
    """Reduces the states of one world, whose cores it is given."""

    def __init__(
        self,
        fleets: Machine[Any, Any, Any],
        members: Machine[Any, Any, Any],
        records: Machine[Any, Any, Any],
        mail: Mail[Target],
        *,
        fails: bool,
    ) -> None:
        """`fails`: steps of members may fail."""
        self.fails = fails
        self.fleets, self.members, self.records, self.mail = fleets, members, records, mail
        self._seats: dict[tuple[int, int, int, int, str, Epoch | None], Seat] = {}
        self._names: dict[tuple[int, tuple[int, ...]], int] = {}

    def canonical(self, state: Fleet) -> Fleet:
        """The one state that stands for all that are like this one; seats have no names."""
        fleet: FleetState = self.fleets[state.fleet]
        number = state.fleet
        seats = [self.seat(state, who, fleet) for who in range(len(state.members))]
        if fleet.awaited:
            order = sorted(range(len(state.members)), key=lambda who: (seats[who], str(who) in fleet.awaited))
            number = self._renamed(number, tuple(order))
            seats = [seats[who] for who in order]
        else:
            seats.sort()
        members, records, mail, life, loading = zip(*seats, strict=True)
        return Fleet(
            number,
            records,
            members,
            mail,
            life,
            loading,
            state.asked,
            state.promised,
            state.deaths_left,
            state.freezes_left,
            state.failures_left,
            state.restarts_left,
            state.front,
            state.updated,
        )

    def seat(self, state: Fleet, who: int, fleet: FleetState) -> Seat:
        """What is in this seat, without what changes nothing any more."""
        epoch = fleet.epoch if fleet.phase is Phase.LEADING else None
        key = (
            state.members[who],
            state.records[who],
            state.mail[who],
            state.life[who],
            state.loading[who],
            epoch,
        )
        seat = self._seats.get(key)
        if seat is None:
            seat = self._seats[key] = self._plain(*key)
        return seat

    def _plain(
        self, number: int, recorded: int, mail: int, life: int, loading: str, epoch: Epoch | None
    ) -> Seat:
        """What is in this seat, without what is dead.

        Of a member: its step's attempt, for the driver's ends name the one under way, and for which lower epoch that was begun. Of its mail: targets that are not
        above what it heard. Of the record: what is only shown to people, suspicion among it; and which older epochs it
        repeats, for those who do not repeat the newest were told it, and its words in the mail stay. Of a member that is
        dead and not recorded as living: everything.
        """
        core: MemberState = self.members[number]
        record: MemberRecord | None = None if recorded == NOBODY else self.records[recorded]
        if record is not None:
            now = epoch is not None and record.epoch == epoch
            record = MemberRecord(
                "",
                1,
                State.STARTING,
                epoch=record.epoch if now and record.failed else Epoch(),
                standing=record.standing if record.standing == epoch else None,
                failed=record.failed if now else None,
                sight=Sight.LOST if record.sight is Sight.LOST else Sight.HEARD,
            )
        if life == DEAD:
            if record is None or record.sight is Sight.LOST:
                core = MemberState()
            mail = 0
        origin = core.origin if core.state in FINISHED else State.STARTING
        current = self.fails and core.state in FINISHED and core.begun_for == core.epoch
        begun_for = core.epoch if current else Epoch()
        core = msgspec.structs.replace(core, attempt=1, origin=origin, begun_for=begun_for)
        return (
            self.members.number(core),
            NOBODY if record is None else self.records.number(record),
            self._heeded(mail, core.epoch),
            life,
            loading if life == ALIVE else "",
        )

    def _heeded(self, mail: int, epoch: Epoch) -> int:
        kept = 0
        for target in self.mail.read(mail):
            if target.epoch > epoch:
                kept |= self.mail.bit(target)
        return kept

    def _renamed(self, number: int, order: tuple[int, ...]) -> int:
        key = (number, order)
        new = self._names.get(key)
        if new is None:
            fleet: FleetState = self.fleets[number]
            awaited = frozenset(str(order.index(int(name))) for name in fleet.awaited)
            new = self._names[key] = self.fleets.number(msgspec.structs.replace(fleet, awaited=awaited))
        return new

"""One member as the coordinator sees it, and the judgement whether the fleet is where it was told to be.

What can go wrong. An idle engine is taken for a dead one and reaped (LMCache #4715); a restart between two heartbeats
goes unseen, and the new life is believed to hold what the old one held (LMCache #4642); a frozen engine is called lost,
the pause returns, a trainer takes its memory, and it thaws and writes (hazards F5); a fleet without members is PAUSED
because nobody objects.

Why it cannot here. Silence makes a member SUSPECT, no more: its next word makes it heard again. Only a seen exit, or a
newer incarnation of the same name, makes a life LOST, and that is final: what it says afterwards is answered with what
is known, and changes nothing. A report names its incarnation, so a restart is another member. The fleet stands when
every member stands at the very epoch, is gone, or (where the caller allows it) cannot be seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from interlock.core.errors import LocalProtocolError
from interlock.core.identity import Epoch
from interlock.core.targets import State

WHY_CHARS_MAX = 400
"""Of one member's reason, in the message of a command that failed for it."""


class Sight(StrEnum):
    """What the coordinator knows of a life; SUSPECT and LOST stand in for the member's own word in `Member.state`."""

    HEARD = "HEARD"
    SUSPECT = "SUSPECT"
    LOST = "LOST"


class MemberRecord(msgspec.Struct, frozen=True):
    """The last that one name said, in its newest life."""

    name: str
    incarnation: int
    state: State
    epoch: Epoch = Epoch()
    """The highest it has heard."""
    standing: Epoch | None = None
    version: str | None = None
    failed: str | None = None
    """Why its last step towards `epoch` failed."""
    sight: Sight = Sight.HEARD

    @property
    def word(self) -> str:
        """For people and fronts: SUSPECT, LOST, or the member's own state."""
        return self.state if self.sight is Sight.HEARD else self.sight


# --- events ------------------------------------------------------------------------------------------------------


class Reported(msgspec.Struct, frozen=True):
    """The member's word of itself: a level, repeated at heartbeats."""

    incarnation: int
    state: State
    epoch: Epoch
    standing: Epoch | None
    version: str | None
    failed: str | None = None


class Silent(msgspec.Struct, frozen=True):
    """Heartbeats of this life are missing, or its connection ended: no proof of anything."""

    incarnation: int


class Gone(msgspec.Struct, frozen=True):
    """All processes of this life are seen to have ended. 0: every life of this name so far."""

    incarnation: int


RosterEvent = Reported | Silent | Gone


# --- effects -----------------------------------------------------------------------------------------------------


class AnswerStale(msgspec.Struct, frozen=True):
    """The sender is a life that is over: tell it the newest incarnation known; it drops everything and stops."""

    known: int


class Changed(msgspec.Struct, frozen=True):
    """Tell the watchers of membership."""


RosterEffect = AnswerStale | Changed
RosterOutcome = tuple[MemberRecord, tuple[RosterEffect, ...]]


def register(name: str, report: Reported) -> MemberRecord:
    """The first word of a name makes it a member."""
    return MemberRecord(
        name=name,
        incarnation=report.incarnation,
        state=report.state,
        epoch=report.epoch,
        standing=report.standing,
        version=report.version,
        failed=report.failed,
    )


def register_lost(name: str, incarnation: int) -> MemberRecord:
    """A life ended before its first word was heard; the word may still come."""
    return MemberRecord(name=name, incarnation=incarnation, state=State.STOPPED, sight=Sight.LOST)


def transition(record: MemberRecord, event: RosterEvent) -> RosterOutcome:
    """The only way a record changes. Late words of older lives change nothing: they are ordinary."""
    match event:
        case Reported():
            return _report(record, event)
        case Silent(incarnation):
            if incarnation != record.incarnation or record.sight is not Sight.HEARD:
                return record, ()
            return msgspec.structs.replace(record, sight=Sight.SUSPECT), (Changed(),)
        case Gone(incarnation):
            if incarnation > record.incarnation:
                return register_lost(record.name, incarnation), (Changed(),)
            if incarnation not in (0, record.incarnation) or record.sight is Sight.LOST:
                return record, ()
            return msgspec.structs.replace(record, sight=Sight.LOST), (Changed(),)
        case _:
            raise LocalProtocolError(f"{event!r} is no event of the record of {record.name}")


def _report(record: MemberRecord, report: Reported) -> RosterOutcome:
    older = report.incarnation < record.incarnation
    over = report.incarnation == record.incarnation and record.sight is Sight.LOST
    if older or over:
        return record, (AnswerStale(record.incarnation),)
    if report.incarnation == record.incarnation and report.epoch < record.epoch:
        return record, ()  # an earlier word that comes late: a life's epoch only grows
    heard = register(record.name, report)
    return heard, (() if heard == record else (Changed(),))


def needs_telling(record: MemberRecord, epoch: Epoch) -> bool:
    """Whether the target of this epoch is to be told again: until the report repeats it."""
    return record.sight is not Sight.LOST and record.epoch < epoch


# --- is the fleet there? -----------------------------------------------------------------------------------------


class Outcome(StrEnum):
    """Of one member, towards one epoch."""

    WAITING = "waiting"
    STANDING = "standing"
    GONE = "gone"
    UNKNOWN = "unknown"
    FAILED = "failed"


class Condition(msgspec.Struct, frozen=True):
    """How far the fleet is. `done`: nothing more will be waited for; `ok`: and it is where it was told to be."""

    members: tuple[tuple[MemberRecord, Outcome], ...]
    done: bool
    ok: bool
    message: str


def outcome(record: MemberRecord, epoch: Epoch, *, expired: bool) -> Outcome:
    """What a command reports of this member at `epoch`. `expired`: the command's deadline is over."""
    if record.sight is Sight.LOST:
        return Outcome.GONE
    if record.standing == epoch:
        return Outcome.STANDING  # also when silent: it leaves this epoch only for a higher one
    if record.failed is not None and record.epoch == epoch:
        return Outcome.FAILED
    return Outcome.UNKNOWN if expired and record.sight is Sight.SUSPECT else Outcome.WAITING


def condition(
    records: Iterable[MemberRecord],
    epoch: Epoch,
    target: State,
    *,
    unseen: Iterable[str] = (),
    expired: bool = False,
    allow_unknown: bool = False,
) -> Condition:
    """Judge the fleet against the target of this epoch; O(members), asked for at changes while a command is open.

    `unseen`: names that are expected and were never heard (`FleetState.awaited`). `expired`: the command's deadline has
    passed, so what cannot be seen is unknown now, and what is still under way fails it. A fleet of which nobody is left
    stands only where STOPPED was asked for.
    """
    judged = tuple((record, outcome(record, epoch, expired=expired)) for record in records)
    names = {of: [record.name for record, o in judged if o is of] for of in Outcome}
    names[Outcome.UNKNOWN if expired else Outcome.WAITING] += sorted(
        set(unseen) - {record.name for record, _ in judged}
    )
    if not judged and not any(names.values()):
        stopped = target is State.STOPPED
        message = "nothing runs" if stopped else "there is no member to command"
        return Condition(judged, done=True, ok=stopped, message=message)
    if names[Outcome.WAITING] and not expired:
        waiting = ", ".join(names[Outcome.WAITING])
        return Condition(judged, done=False, ok=False, message=f"waiting for {waiting} to be {target}")
    faults = [
        f"{record.name} failed on the way: {(record.failed or '')[:WHY_CHARS_MAX]}"
        for record, o in judged
        if o is Outcome.FAILED
    ]
    faults += [
        text.format(", ".join(names[of]))
        for of, text in (
            (Outcome.WAITING, "{} did not get there by the deadline"),
            (Outcome.UNKNOWN, "{} cannot be seen"),
        )
        if names[of] and not (of is Outcome.UNKNOWN and allow_unknown)
    ]
    if not names[Outcome.STANDING] and target is not State.STOPPED and not faults:
        faults.append("no member is left that could be " + target)
    if faults:
        return Condition(judged, done=True, ok=False, message="; ".join(faults))
    return Condition(judged, done=True, ok=True, message=f"every member is {target}, gone or excused")

"""The coordinator's side: which command is legal, whose holds keep the fleet paused, and what target that makes.

What can go wrong. Two clients interleave signals and each takes the fleet's state for its own: trainer A loads new
weights, operator B unpauses, and the fleet decodes with half of them (hazards W4). A client dies
between PAUSE and STOP and leaves the fleet half stopped (F1).

Why it cannot here. Legality is judged once, here, on the fleet's *target*, at the moment an epoch is allotted; members
then walk (`core/lifecycle`). `LEGAL` is the whole table; what it lacks is refused with the state, the command and what
to do instead, and changes nothing. A pause is a hold with an owner: the fleet runs when no hold remains and its
weights are known. A hold that reaches its deadline is released as if its owner had said UNPAUSE, where that is legal,
and not before. Every change is persisted before it is told.
The unit of state is the fleet's target (`core/fleet_state`), not its members: those are records of their own
(`core/roster`), so that a report costs the same whatever their number. A life's beginning is told in `core/recovery`.
"""

from __future__ import annotations

import msgspec

from interlock.core.errors import LocalProtocolError, ProtocolError
from interlock.core.fleet_state import (
    Accept,
    Commanded,
    Excused,
    FleetEvent,
    FleetOutcome,
    FleetState,
    Heard,
    Launch,
    Persist,
    Phase,
    Remembered,
    Settled,
    Tick,
    allot,
)
from interlock.core.identity import Epoch
from interlock.core.limits import HOLDS_MAX
from interlock.core.recovery import excused, heard, lead, remembered
from interlock.core.targets import Command, Hold, State, strictest

C, S = Command, State
LEGAL: dict[tuple[Command, State], State] = {
    (C.START, S.STOPPED): S.RUNNING,  # new incarnations are launched
    (C.PAUSE, S.RUNNING): S.PAUSED,
    (C.PAUSE, S.PAUSED): S.PAUSED,  # adds the caller's hold; the stricter mode wins
    (C.UNPAUSE, S.PAUSED): S.RUNNING,  # PAUSED while a hold remains
    (C.UPDATE, S.PAUSED): S.PAUSED,  # at the new version
    (C.SUSPEND, S.PAUSED): S.SUSPENDED,
    (C.RESUME, S.SUSPENDED): S.PAUSED,
    (C.STOP, S.PAUSED): S.STOPPED,
    (C.STOP, S.SUSPENDED): S.STOPPED,
}
"""(command, fleet's target) → new target: the table of DESIGN §8."""

LEGAL_WITHOUT_WEIGHTS = frozenset({C.UPDATE, C.STOP, C.START})
"""While the version is unknown (an update under way, failed or interrupted). START must name one then."""

INSTEAD: dict[tuple[Command, State], str] = {
    (C.START, S.RUNNING): "nothing has to be done: it runs",
    (C.START, S.PAUSED): "UNPAUSE lets it run again",
    (C.START, S.SUSPENDED): "RESUME, then UNPAUSE let it run again",
    (C.PAUSE, S.SUSPENDED): "it already does no work; RESUME makes it PAUSED",
    (C.PAUSE, S.STOPPED): "it already does no work; START launches it",
    (C.UNPAUSE, S.RUNNING): "nothing has to be done: it runs",
    (C.UNPAUSE, S.SUSPENDED): "RESUME first: it takes memory back, and the fleet is PAUSED",
    (C.UNPAUSE, S.STOPPED): "START launches it",
    (C.UPDATE, S.RUNNING): "PAUSE first: weights change only while nothing runs",
    (C.UPDATE, S.SUSPENDED): "RESUME first: weights need the memory that was given up",
    (C.UPDATE, S.STOPPED): "START launches it; give the version there",
    (C.SUSPEND, S.RUNNING): "PAUSE first",
    (C.SUSPEND, S.SUSPENDED): "nothing has to be done: it is suspended",
    (C.SUSPEND, S.STOPPED): "START launches it",
    (C.RESUME, S.RUNNING): "nothing has to be done: it runs",
    (C.RESUME, S.PAUSED): "to let it run again (vLLM's resume), the command is UNPAUSE",
    (C.RESUME, S.STOPPED): "START launches it",
    (C.STOP, S.RUNNING): "PAUSE first, or ask for the composite that pauses and then stops",
    (C.STOP, S.STOPPED): "nothing has to be done: it is stopped",
}
"""What to do instead, for every pair that `LEGAL` lacks."""


class CommandRefused(ProtocolError):  # noqa: N818
    """A command that is not legal now. Fields: command, state (the fleet's target), epoch, hint, retryable."""


# --- transition --------------------------------------------------------------------------------------------------


def transition(fleet: FleetState, event: FleetEvent) -> FleetOutcome:
    """The only way the fleet's target changes. Raises CommandRefused, and then nothing has changed."""
    match event:
        case Commanded():
            return _command(fleet, event)
        case Heard():
            return heard(fleet, event)
        case Remembered(target):
            return remembered(fleet, target)
        case Excused(member, incarnation):
            return excused(fleet, member, incarnation)
        case Settled(epoch, ok):
            return _settled(fleet, epoch, ok)
        case Tick(now_s):
            return _tick(fleet, now_s)
        case _:
            raise LocalProtocolError(f"{event!r} is no event of a fleet at {fleet.epoch}")


def _accepted(fleet: FleetState, command: Command) -> FleetOutcome:
    epoch = Epoch(fleet.epoch.term, fleet.epoch.number + 1)
    return allot(fleet, Accept(command, epoch))


def _refuse(
    fleet: FleetState, command: Command, why: str, hint: str, *, retryable: bool = False
) -> CommandRefused:
    return CommandRefused(
        f"{command} is refused at epoch {fleet.epoch.number}: {why}",
        hint=hint,
        retryable=retryable,
        command=command,
        state=fleet.state,
        epoch=fleet.epoch,
    )


def _command(fleet: FleetState, ask: Commanded) -> FleetOutcome:
    command = ask.command
    if fleet.phase is Phase.RECOVERING:
        why = "the coordinator lost its state and is still hearing what its members stand at"
        raise _refuse(fleet, command, why, "ask again in a few seconds", retryable=True)
    if fleet.phase is Phase.DEPOSED:
        raise _refuse(fleet, command, "a newer coordinator leads", "ask that one", retryable=True)
    composite = command is C.STOP and ask.composite and fleet.state is S.RUNNING
    state = S.PAUSED if composite else LEGAL.get((command, fleet.state))
    if state is None:
        raise _refuse(fleet, command, f"the fleet's target is {fleet.state}", INSTEAD[command, fleet.state])
    if not fleet.version_known and command not in LEGAL_WITHOUT_WEIGHTS:
        why = (
            f"the update to version {fleet.version!r} is under way or has failed, so the weights are unknown"
        )
        raise _refuse(fleet, command, why, "await it, UPDATE again, or STOP")
    match command:
        case C.PAUSE | C.STOP if command is C.PAUSE or composite:
            return _pause(fleet, ask, composite)
        case C.UNPAUSE:
            return _unpause(fleet, ask)
        case C.UPDATE | C.START:
            return _with_version(fleet, ask, state)
        case _:
            return _accepted(msgspec.structs.replace(fleet, state=state, stop_for=None), command)


def _pause(fleet: FleetState, ask: Commanded, composite: bool) -> FleetOutcome:
    """Add the caller's hold. Its mode only becomes stricter, its end only later: a repetition changes nothing."""
    held = {hold.owner: hold for hold in fleet.holds}
    mine = held.get(ask.owner)
    if mine is None:
        if len(held) >= HOLDS_MAX:
            why = f"{HOLDS_MAX} holds are placed already"
            raise _refuse(fleet, ask.command, why, "release some with UNPAUSE, or break them by name")
        hold = Hold(ask.owner, ask.mode, ask.deadline_s)
    else:
        mode = strictest(mine.mode, ask.mode)
        hold = Hold(ask.owner, mode, _later(mine.deadline_s, ask.deadline_s))
    if hold == mine:
        return fleet, (Accept(ask.command, fleet.epoch),)
    holds = tuple(sorted((held | {ask.owner: hold}).values(), key=lambda hold: hold.owner))
    stop_for = ask.owner if composite else fleet.stop_for
    changed = msgspec.structs.replace(fleet, state=S.PAUSED, holds=holds, stop_for=stop_for)
    return _accepted(changed, ask.command)


def _later(a: float | None, b: float | None) -> float | None:
    """None is never, the latest of all."""
    return None if a is None or b is None else max(a, b)


def _unpause(fleet: FleetState, ask: Commanded) -> FleetOutcome:
    owner = ask.break_hold_of or ask.owner
    if all(hold.owner != owner for hold in fleet.holds):
        names = ", ".join(hold.owner for hold in fleet.holds)
        hint = f"the owners are {names}: each says UNPAUSE, or an administrator breaks a hold by its owner's name"
        raise _refuse(fleet, ask.command, f"{owner!r} holds nothing", hint)
    return _accepted(_release(fleet, frozenset({owner})), ask.command)


def _release(fleet: FleetState, owners: frozenset[str]) -> FleetState:
    holds = tuple(hold for hold in fleet.holds if hold.owner not in owners)
    return msgspec.structs.replace(
        fleet,
        state=S.PAUSED if holds else S.RUNNING,
        holds=holds,
        stop_for=None if fleet.stop_for in owners else fleet.stop_for,
    )


def _with_version(fleet: FleetState, ask: Commanded, state: State) -> FleetOutcome:
    """UPDATE leaves the version unknown until the members stand; START launches members that have none yet."""
    epoch = Epoch(fleet.epoch.term, fleet.epoch.number + 1)
    starts = ask.command is C.START
    version = ask.version or (fleet.version if starts and fleet.version_known else None)
    if not version:
        raise _refuse(fleet, ask.command, "it names no version", "say which weights")
    holds = () if starts else fleet.holds
    weights = ask.weights if ask.version else fleet.weights
    if version == fleet.version and weights != fleet.weights:
        why = (
            f"version {version!r} is what was asked for last, from {fleet.weights or 'the configured model'}"
        )
        raise _refuse(fleet, ask.command, why, "other weights need another name")
    changed = msgspec.structs.replace(
        fleet,
        state=state,
        version=version,
        weights=weights,
        version_at=epoch if ask.version else fleet.version_at,
        kv=ask.kv,
        version_known=starts,
        holds=holds,
        awaited=ask.expected if starts else fleet.awaited,
        launch=Launch(epoch, ask.before) if starts else fleet.launch,
    )
    return _accepted(changed, ask.command)


def _settled(fleet: FleetState, epoch: Epoch, ok: bool) -> FleetOutcome:
    """Judgements of earlier epochs are late, and ordinary."""
    if not ok or epoch != fleet.epoch or fleet.phase is not Phase.LEADING:
        return fleet, ()
    if fleet.stop_for is not None and fleet.state is S.PAUSED:
        return allot(msgspec.structs.replace(fleet, state=S.STOPPED, stop_for=None))
    if not fleet.version_known:
        return msgspec.structs.replace(fleet, version_known=True), (Persist(),)
    return fleet, ()


def _tick(fleet: FleetState, now_s: float) -> FleetOutcome:
    if fleet.phase is Phase.RECOVERING:
        return lead(fleet) if now_s >= fleet.deadline_s else (fleet, ())
    over = frozenset(h.owner for h in fleet.holds if h.deadline_s is not None and h.deadline_s <= now_s)
    legal = fleet.phase is Phase.LEADING and fleet.state is S.PAUSED and fleet.version_known
    if not over or not legal:
        return fleet, ()
    return allot(_release(fleet, over))

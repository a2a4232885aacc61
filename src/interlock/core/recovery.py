"""A coordinator's life begins, with or without its state; and what its members remember corrects it.

What can go wrong. A coordinator whose state directory is gone comes back with epoch 0 and is ignored for ever; or it
jumps ahead and unpauses a fleet in the middle of an update (hazards F2).

Why it cannot here. Without state it is RECOVERING: it commands nothing until it has heard the members it expects, or a
deadline has passed. Then it leads in a term above every epoch reported, with the most restrictive target reported and
all holds reported. It does not know the deadlines of holds it did not place, so they have none. A member that turns up
later, with an epoch that nobody told this life of, makes the target stricter in the same way, never laxer; and the weights
that it remembers are taken, unless a command of this life has named others: a fleet never goes back to older weights because
those who knew the newer ones were late. What it remembers counts once: from then on that epoch is known, so that a hold which was
released here does not come back when it is repeated. Whoever hears of an epoch above his own is not the leader any more, and stops.

A member that START launches is awaited as a new life: the life before it may still be on its way out, and neither its last
words nor its end, told late or after this coordinator's restart, are taken for the new one's.

Fronts are witnesses, too: where the disk is lost and every engine was started anew, only they remember. A coordinator
whose clock had stepped back would otherwise begin below the epoch that they know, and they would drop its word until the
clock has caught up. Who is deposed therefore writes down by what: its next life, if it has one, begins above that,
whether the witness speaks again in time or not.
"""

from __future__ import annotations

import msgspec

from interlock.core.fleet_state import FleetOutcome, FleetState, Heard, Persist, Phase, StepDown, allot
from interlock.core.identity import Epoch
from interlock.core.limits import HOLDS_MAX
from interlock.core.targets import TARGETS, Hold, State, Target, strictest

RESTRICTION = {state: rank for rank, state in enumerate(TARGETS)}
S = State


def restarted(
    stored: FleetState | None,
    *,
    term: int,
    version: str,
    deadline_s: float,
    expected: frozenset[str] = frozenset(),
) -> FleetOutcome:
    """The first state of a coordinator's life in this term (embedded: its incarnation).

    One that kept its state tells the same target anew in its own term. One without, or one that was deposed before it
    died, is RECOVERING until the `expected` members have reported or `deadline_s` has passed; whom START had launched is
    awaited as a new life still. `version` counts only where no member has heard of any target: at the very first start.
    """
    if stored is not None and stored.phase is Phase.LEADING:
        again = msgspec.structs.replace(stored, epoch=Epoch(max(term, stored.epoch.term + 1), 0))
        return allot(again)
    fleet = FleetState(
        phase=Phase.RECOVERING,
        epoch=Epoch(term, 0),
        state=S.RUNNING,
        version=version,
        awaited=expected,
        deadline_s=deadline_s,
    )
    if stored is not None:
        fleet = _gather(fleet, stored.target, stored.version if stored.version_known else None)
        fleet = msgspec.structs.replace(fleet, awaited=expected | stored.awaited, launch=stored.launch)
    return fleet, ()


def heard(fleet: FleetState, event: Heard) -> FleetOutcome:
    """A member says which target it heard last; ordinary reports of our own epochs change nothing."""
    launch, target = fleet.launch, event.target
    replaced = launch is not None and launch.is_old(event.member, event.incarnation)
    unaware = launch is not None and replaced and not launch.has_reached(target)
    if (
        target is not None and fleet.phase is Phase.RECOVERING and not unaware
    ):  # its STOPPED is over, and stops nobody
        fleet = _gather(fleet, target, event.version)
    on_its_way_out = unaware or (replaced and event.state in (S.STOPPING, S.STOPPED))
    fleet, effects = (fleet, ()) if on_its_way_out else _attended(fleet, event.member)
    if target is None or fleet.phase is Phase.RECOVERING:
        return fleet, effects
    after, more = _compare(fleet, target, event.version)
    return after, more or effects


def remembered(fleet: FleetState, target: Target) -> FleetOutcome:
    """A front says which target it was told last."""
    if fleet.phase is Phase.RECOVERING:
        return _gather(fleet, target, target.version), ()
    return _compare(fleet, target, target.version)


def _compare(fleet: FleetState, target: Target, version: str | None) -> FleetOutcome:
    """What somebody remembers, who has the weights of `version`, against what a coordinator that has begun to lead knows."""
    if fleet.phase is Phase.DEPOSED:
        return fleet, ()
    if target.epoch > fleet.epoch:
        adopted = _adopt(fleet, target, version)
        deposed = msgspec.structs.replace(adopted, phase=Phase.DEPOSED, epoch=target.epoch)
        return deposed, (Persist(), StepDown(target.epoch))
    if fleet.basis < target.epoch and target.epoch.term < fleet.since_term:
        adopted = _adopt(fleet, target, version)
        known = msgspec.structs.replace(fleet, basis=target.epoch)
        return allot(adopted) if adopted != known else (known, (Persist(),))
    return fleet, ()


def excused(fleet: FleetState, member: str, incarnation: int) -> FleetOutcome:
    """The launcher says that this life is over; it may say so late."""
    if fleet.launch is not None and fleet.launch.is_old(member, incarnation):
        return fleet, ()
    return _attended(fleet, member)


def _attended(fleet: FleetState, member: str) -> FleetOutcome:
    """Nothing more is expected of this member; RECOVERING ends with the last."""
    if member not in fleet.awaited:
        return fleet, ()
    awaited = fleet.awaited - {member}
    fleet = msgspec.structs.replace(fleet, awaited=awaited, launch=fleet.launch if awaited else None)
    if fleet.phase is not Phase.RECOVERING:
        return fleet, (Persist(),)
    return (fleet, ()) if fleet.awaited else lead(fleet)


def _gather(fleet: FleetState, target: Target, version: str | None) -> FleetState:
    """Take what a member remembers into a RECOVERING state: the strictest target, all holds, a term above it."""
    newest = target.epoch >= fleet.basis
    return msgspec.structs.replace(
        fleet,
        epoch=Epoch(max(fleet.epoch.term, target.epoch.term + 1), 0),
        state=_most_restrictive(fleet.state, target.state),
        version=target.version if newest else fleet.version,
        weights=target.weights if newest else fleet.weights,
        kv=target.kv if newest else fleet.kv,
        holds=_all_holds(fleet.holds, target.holds),
        basis=max(fleet.basis, target.epoch),
        versions=fleet.versions | {version, target.version},
    )


def lead(fleet: FleetState) -> FleetOutcome:
    """RECOVERING ends. A fleet PAUSED at several versions may be in the middle of an update: its weights are unknown."""
    known = fleet.state is not S.PAUSED or len(fleet.versions) <= 1
    return allot(
        msgspec.structs.replace(
            fleet,
            phase=Phase.LEADING,
            version_known=known,
            since_term=fleet.epoch.term,
            versions=frozenset(),
        )
    )


def _adopt(fleet: FleetState, target: Target, version: str | None) -> FleetState:
    """Somebody remembers what this lineage of states never knew: become stricter by it, never laxer, and take its weights."""
    state = _most_restrictive(fleet.state, target.state)
    if target.epoch > fleet.version_at:
        weights, kv, asked = target.weights, target.kv, target.version
    else:
        weights, kv, asked = fleet.weights, fleet.kv, fleet.version
    agreed = {asked, fleet.version, target.version, version} == {asked}
    return msgspec.structs.replace(
        fleet,
        state=state,
        holds=_all_holds(fleet.holds, target.holds),
        version=asked,
        weights=weights,
        kv=kv,
        version_known=fleet.version_known and (state is not S.PAUSED or agreed),
        basis=target.epoch,
    )


def _most_restrictive(a: State, b: State) -> State:
    return max(a, b, key=RESTRICTION.__getitem__)


def _all_holds(ours: tuple[Hold, ...], theirs: tuple[Hold, ...]) -> tuple[Hold, ...]:
    """The union by owner, stricter mode first. Deadlines of holds placed in other lives are on a clock unknown here."""
    holds = {hold.owner: hold for hold in ours}
    for hold in theirs:
        mine = holds.get(hold.owner, Hold(hold.owner, hold.mode))
        holds[hold.owner] = Hold(hold.owner, strictest(mine.mode, hold.mode), mine.deadline_s)
    merged = sorted(holds.values(), key=lambda hold: hold.owner)
    if len(merged) > HOLDS_MAX:  # two lives placed that many: none is released, the rest becomes one
        rest = strictest(*(hold.mode for hold in merged[HOLDS_MAX - 1 :]))
        merged = [*merged[: HOLDS_MAX - 1], Hold("holds of an earlier coordinator", rest)]
    return tuple(merged)

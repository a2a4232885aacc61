"""The leader of a lockstep group: fences its ranks once, then says how far they may go (`core/lockstep`)."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.limits import (
    LOCKSTEP_SECONDS_PER_TOKEN,
    LOCKSTEP_STEP_SECONDS,
    LOCKSTEP_STEPS_AHEAD_MAX,
    RANKS_MAX,
)
from interlock.core.lockstep import Fence, Grant, RankReport


class Phase(StrEnum):
    """Of one leader's term over its group."""

    FENCING = "FENCING"
    GRANTING = "GRANTING"
    ENDED = "ENDED"


class GroupState(msgspec.Struct, frozen=True):
    """One group as its leader sees it."""

    leader_epoch: int
    reports: tuple[RankReport | None, ...]
    """The last that each rank said while it obeyed this leader."""
    deadline_s: float | None
    """FENCING: to have heard every rank; GRANTING: for every rank to reach the grant. Monotonic clock. None: the
    next tick sets it."""
    phase: Phase = Phase.FENCING
    granted: int = 0
    tokens: int = 0
    """The most that any rank computes in one of the granted steps that are not reached."""
    pausing: bool = True
    """No step is granted: a new leader begins so, until it is told to proceed."""
    step_seconds: float = LOCKSTEP_STEP_SECONDS
    """Of a step's deadline: what it has beside its tokens' share."""

    @property
    def slowest(self) -> int:
        """The highest step that every rank has finished, as far as is known."""
        return min(report.reached if report else 0 for report in self.reports)

    @property
    def standing(self) -> bool:
        """Every rank has heard the grant and finished it: all between the same two steps, none in a collective."""
        return self.phase is Phase.GRANTING and all(
            report is not None and report.granted == report.reached == self.granted for report in self.reports
        )

    @property
    def paused(self) -> bool:
        """No step is granted and every rank stands at the grant."""
        return self.pausing and self.standing

    @property
    def may_advance(self) -> bool:
        """Whether `Advance` grants a step now: at most LOCKSTEP_STEPS_AHEAD_MAX ahead of the slowest rank."""
        return (
            self.phase is Phase.GRANTING
            and not self.pausing
            and self.granted < self.slowest + LOCKSTEP_STEPS_AHEAD_MAX
        )


def lead(
    leader_epoch: int, ranks: int, *, deadline_s: float, step_seconds: float = LOCKSTEP_STEP_SECONDS
) -> GroupState:
    """A leader's term begins by fencing; `leader_epoch` is above every earlier leader's of this group."""
    if not 0 < ranks <= RANKS_MAX:
        raise LocalProtocolError(f"a lockstep group of {ranks} ranks is outside 1 to {RANKS_MAX}")
    return GroupState(
        leader_epoch=leader_epoch, reports=(None,) * ranks, deadline_s=deadline_s, step_seconds=step_seconds
    )


class Advance(msgspec.Struct, frozen=True):
    """Grant one step more; `tokens` is the most that any rank computes in it."""

    now_s: float
    tokens: int


class Pause(msgspec.Struct, frozen=True):
    """Cease to grant. `Paused` follows when every rank stands at the grant."""


class Proceed(msgspec.Struct, frozen=True):
    """Steps may be granted again."""


class RankLost(msgspec.Struct, frozen=True):
    """The exit of a rank's process was seen."""

    rank: int


class Tick(msgspec.Struct, frozen=True):
    """Time goes on. Monotonic clock, seconds."""

    now_s: float


GroupEvent = RankReport | Advance | Pause | Proceed | RankLost | Tick


class Tell(msgspec.Struct, frozen=True):
    """Say this to every rank until each has reported it."""

    word: Fence | Grant


class Paused(msgspec.Struct, frozen=True):
    """Every rank stands after this step."""

    step: int


class EndGroup(msgspec.Struct, frozen=True):
    """End the processes of all ranks: none of them can be freed from a collective, nor trusted after it."""

    why: str


class StepDown(msgspec.Struct, frozen=True):
    """A rank obeys a newer leader: grant nothing any more."""

    leader_epoch: int


GroupEffect = Tell | Paused | EndGroup | StepDown
GroupOutcome = tuple[GroupState, tuple[GroupEffect, ...]]


TABLE: dict[tuple[Phase, type[GroupEvent]], tuple[Phase, ...]] = {
    (Phase.FENCING, RankReport): (Phase.FENCING, Phase.GRANTING, Phase.ENDED),
    (Phase.FENCING, Pause): (Phase.FENCING,),
    (Phase.FENCING, Proceed): (Phase.FENCING,),
    (Phase.FENCING, RankLost): (Phase.ENDED,),
    (Phase.FENCING, Tick): (Phase.FENCING, Phase.ENDED),
    (Phase.GRANTING, RankReport): (Phase.GRANTING, Phase.ENDED),
    (Phase.GRANTING, Advance): (Phase.GRANTING,),
    (Phase.GRANTING, Pause): (Phase.GRANTING,),
    (Phase.GRANTING, Proceed): (Phase.GRANTING,),
    (Phase.GRANTING, RankLost): (Phase.ENDED,),
    (Phase.GRANTING, Tick): (Phase.GRANTING, Phase.ENDED),
    (Phase.ENDED, RankReport): (Phase.ENDED,),
    (Phase.ENDED, RankLost): (Phase.ENDED,),
    (Phase.ENDED, Tick): (Phase.ENDED,),
}
"""(phase, event) → the phases it may lead to. What is missing is an error."""


def transition(group: GroupState, event: GroupEvent) -> GroupOutcome:
    """The only way a leader's view changes.

    Raises LocalProtocolError for what `TABLE` lacks and for a step that may not be granted now, RemoteProtocolError
    for a rank that is none of the group's or went further than it was granted. After ENDED late words are ordinary.
    """
    if (group.phase, type(event)) not in TABLE:
        raise LocalProtocolError(
            f"{type(event).__name__} does not fit a group that is {group.phase}",
            hint="await its ranks"
            if group.phase is Phase.FENCING
            else "its ranks are started anew, as another group",
            phase=group.phase,
        )
    if group.phase is Phase.ENDED:
        return group, ()
    match event:
        case RankReport():
            return _report(group, event)
        case Advance(now_s, tokens):
            return _advance(group, now_s, tokens)
        case Pause():
            return _when_paused(group, msgspec.structs.replace(group, pausing=True))
        case Proceed():
            return msgspec.structs.replace(group, pausing=False), ()
        case RankLost(rank):
            return _end(group, f"rank {rank} is lost")
        case _:
            return _tick(group, event.now_s)


def _report(group: GroupState, report: RankReport) -> GroupOutcome:
    if not 0 <= report.rank < len(group.reports) or report.reached > report.granted:
        raise RemoteProtocolError(
            f"{report} cannot come from a rank of this group of {len(group.reports)}", rank=report.rank
        )
    if report.leader_epoch > group.leader_epoch:
        ended = msgspec.structs.replace(group, phase=Phase.ENDED)
        return ended, (StepDown(report.leader_epoch),)
    if report.leader_epoch < group.leader_epoch:
        return group, ()
    if group.phase is Phase.GRANTING and report.granted > group.granted:
        raise RemoteProtocolError(
            f"rank {report.rank} was granted step {report.granted}, and its leader {group.leader_epoch} granted "
            f"{group.granted}",
            hint="two leaders use one epoch; end the group",
            rank=report.rank,
        )
    last = group.reports[report.rank]
    if last is not None and (last.granted, last.reached) >= (report.granted, report.reached):
        return group, ()
    reports = (*group.reports[: report.rank], report, *group.reports[report.rank + 1 :])
    heard = msgspec.structs.replace(group, reports=reports)
    if group.phase is Phase.GRANTING:
        return _when_paused(group, heard)
    said = [each for each in reports if each is not None]
    if len(said) < len(reports):
        return heard, ()
    granted = max(each.granted for each in said)
    tokens = max(each.tokens for each in said)
    granting, effects = _when_paused(
        heard,
        msgspec.structs.replace(heard, phase=Phase.GRANTING, granted=granted, tokens=tokens, deadline_s=None),
    )
    return granting, (Tell(Grant(group.leader_epoch, granted, tokens)), *effects)


def _advance(group: GroupState, now_s: float, tokens: int) -> GroupOutcome:
    if not group.may_advance:
        raise LocalProtocolError(
            f"step {group.granted + 1} may not be granted: the group is {group.phase}"
            f"{', pausing' if group.pausing else ''}, and its slowest rank has reached step {group.slowest}",
            step=group.granted + 1,
        )
    granted = group.granted + 1
    tokens = tokens if group.slowest == group.granted else max(tokens, group.tokens)
    advanced = msgspec.structs.replace(group, granted=granted, tokens=tokens)
    return (
        msgspec.structs.replace(advanced, deadline_s=now_s + _seconds(advanced)),
        (Tell(Grant(group.leader_epoch, granted, tokens)),),
    )


def _seconds(group: GroupState) -> float:
    """What the steps that are granted and not reached may take."""
    steps = group.granted - group.slowest
    return steps * (group.step_seconds + group.tokens * LOCKSTEP_SECONDS_PER_TOKEN)


def _tick(group: GroupState, now_s: float) -> GroupOutcome:
    if group.standing:
        return group, ()
    if group.deadline_s is None:
        return msgspec.structs.replace(group, deadline_s=now_s + _seconds(group)), ()
    if now_s < group.deadline_s:
        return group, ()
    what = "fencing" if group.phase is Phase.FENCING else f"step {group.granted}"
    return _end(group, f"{what} missed its deadline, waiting for {_missing(group)}")


def _when_paused(before: GroupState, after: GroupState) -> GroupOutcome:
    """Say so once, when the group comes to stand."""
    return after, ((Paused(after.granted),) if after.paused and not before.paused else ())


def _end(group: GroupState, why: str) -> GroupOutcome:
    return msgspec.structs.replace(group, phase=Phase.ENDED), (EndGroup(why),)


def _missing(group: GroupState) -> str:
    late = [
        f"rank {rank}"
        for rank, report in enumerate(group.reports)
        if report is None or min(report.granted, report.reached) < group.granted
    ]
    return ", ".join(late) or "no rank"

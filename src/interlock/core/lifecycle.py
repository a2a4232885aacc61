"""The life of an engine in a fleet: the words, the target, and the member's total walk towards it.

What can go wrong. Commands sent as signals race: one rank obeys while another has not heard (Megatron-LM #3563); a
PAUSE followed by a STOP reaches an engine that is still pausing and kills it by an assertion; one that missed PAUSE@8
and hears STOPPED@9 finds no row RUNNING × STOP and is wedged for ever; a joiner is told nothing and runs while the
others stand; a second, stricter pause is taken for a repetition and ignored (hazards F1).

Why it cannot here. The coordinator states a *target*, a level: (epoch, state, mode, version, holds). It judged its
legality once, when it allotted the epoch (`core/commands`). A member never refuses a target. `PATH` (`core/targets`) says for every
state, the transitional ones included, and every target which step comes next; the member takes it, and asks again.
It drops a target of a lower epoch and answers it with the higher one it knows, so messages may be lost, repeated and
late. A step under way is finished before the next begins; only a PAUSE may be begun again, more strictly. A newcomer
walks the same table: it stands PAUSED, with the target's weights, before it can run.

    STARTING ─► PENDING_WEIGHTS ─► PAUSING ─► PAUSED ─► UNPAUSING ─► RUNNING
                                     ▲         │ ▲ └─► UPDATING ─► PAUSED
                                     └ RUNNING │ └── RESUMING ◄─ SUSPENDED ◄─ SUSPENDING ◄─ PAUSED
                                               └─► STOPPING ─► STOPPED

A step that fails and cannot say that it changed nothing leaves memory that nobody can describe: the member stops, and
its exit is the proof. Only UPDATE has a softer end: the member stands PAUSED at version None, and serves nothing. Where the
target is STOPPED a failure keeps nobody: what it left behind is not needed any more, and the member stops.

The words and the table `PATH` are in `core/targets`; here stands the member that walks: one life of one engine, with its
memory and its bookkeeping (which target was heard, which step is under way and under which attempt, what is reported).
Three rules keep late words harmless. A target of a lower epoch is
answered with the higher one, its target and holds, and acknowledges nothing. The end of a step counts only for the
attempt under way. A step that failed is repeated when a higher epoch asks for it, or, where the driver knows a cause that
may pass (a full disk, no memory) and nothing was changed, when it has waited and says `TryAgain`: nothing spins, and nobody
stands aside for ever. A failure of a step that was begun for a lower epoch than the one heard meanwhile says nothing of that,
and the walk goes on from where it failed.

Ownership of a step: `Begin` hands it to the driver, which gives it back exactly once, by `StepFinished` or
`StepFailed` with the same attempt. A PAUSE that became stricter meanwhile replaces the one under way: the driver may
cancel that or let it end; its end is not looked at.

The coordinator: what is legal is in `core/commands`, how a life of it begins in `core/recovery`, its state and words in
`core/fleet_state`, its view of one member and whether the fleet is there in `core/roster`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.identity import Epoch
from interlock.core.targets import (
    BEGUN,
    FINISHED,
    KeptCache,
    Mode,
    State,
    Step,
    Target,
    next_step,
    pause_mode,
)

S, P = State, Step


class MemberState(msgspec.Struct, frozen=True):
    """One life of one engine, as it sees itself."""

    state: State = State.STARTING
    version: str | None = None
    """Of the weights in memory (SUSPENDED: when it was suspended); None: unknown, or none."""
    heard: Target | None = None
    """The target of the highest epoch heard."""
    mode: Mode | None = None
    """Of the pause in force or under way."""
    attempt: int = 1
    """Numbers the steps; the first is the start itself."""
    origin: State = State.STARTING
    """Where the step under way began: its end when it fails having changed nothing."""
    begun_for: Epoch = Epoch()
    """The epoch heard when the step under way began."""
    failed: str | None = None
    """Why the last step towards `heard` failed; it is not repeated before a higher epoch, or `TryAgain`."""
    waits: bool = False
    """Whether that may pass: the driver owes a `TryAgain`."""

    @property
    def epoch(self) -> Epoch:
        """Of the highest target heard; (0, 0) before the first."""
        return self.heard.epoch if self.heard else Epoch()

    @property
    def standing(self) -> Epoch | None:
        """The epoch whose target this member has reached as a whole, or None."""
        target = self.heard
        if target is None or self.failed is not None or self.state is not target.state:
            return None
        if self.state is S.STOPPED:
            return target.epoch
        return target.epoch if next_step(self.state, self.version, self.mode, target) is P.STAND else None


class TargetHeard(msgspec.Struct, frozen=True):
    """The coordinator's word, or a repetition of it."""

    target: Target


class StepFinished(msgspec.Struct, frozen=True):
    """The step of this attempt is done. `version`: what the weights are now (None: gone or unknown)."""

    attempt: int
    version: str | None


class StepFailed(msgspec.Struct, frozen=True):
    """The step of this attempt is over and did not succeed. `unchanged`: it left everything as it was before.

    `may_pass` (only where unchanged): so may the cause; the driver waits, and then says `TryAgain`.
    """

    attempt: int
    why: str
    unchanged: bool = False
    may_pass: bool = False


class TryAgain(msgspec.Struct, frozen=True):
    """The driver has waited, and what made the step of this attempt fail may have passed. Late, it is not looked at."""

    attempt: int


MemberEvent = TargetHeard | StepFinished | StepFailed | TryAgain


class Begin(msgspec.Struct, frozen=True):
    """Take this step; end it by StepFinished or StepFailed with its attempt. A PAUSE replaces a PAUSE under way."""

    step: Step
    attempt: int
    mode: Mode
    version: str
    weights: str = ""
    kv: KeptCache = KeptCache.RECOMPUTE


class Report(msgspec.Struct, frozen=True):
    """Tell the coordinator what I am now: state, epoch, standing, version, failed."""


class AnswerHigher(msgspec.Struct, frozen=True):
    """The sender speaks of an old epoch: tell it the highest one heard, its target and holds. Acknowledge nothing."""

    target: Target


class Leave(msgspec.Struct, frozen=True):
    """End the whole process tree: its exit is what the others wait for."""

    why: str


MemberEffect = Begin | Report | AnswerHigher | Leave
MemberOutcome = tuple[MemberState, tuple[MemberEffect, ...]]


def transition(member: MemberState, event: MemberEvent) -> MemberOutcome:
    """The only way a member's state changes.

    Raises RemoteProtocolError when one epoch is told with two targets, LocalProtocolError when a step ends that was
    not begun. An end of an attempt that was replaced meanwhile is ordinary and changes nothing.
    """
    match event:
        case TargetHeard(target):
            return _hear(member, target)
        case StepFinished(attempt, version):
            return _finish(member, version) if _current(member, attempt) else (member, ())
        case StepFailed(attempt):
            return _fail(member, event) if _current(member, attempt) else (member, ())
        case TryAgain(attempt):
            if not member.waits or attempt != member.attempt:
                return member, ()
            return _walk(msgspec.structs.replace(member, failed=None, waits=False))
        case _:
            raise LocalProtocolError(f"{event!r} is no event of a member that is {member.state}")


def _current(member: MemberState, attempt: int) -> bool:
    if attempt > member.attempt or (attempt == member.attempt and member.state not in FINISHED):
        raise LocalProtocolError(
            f"step attempt {attempt} ended, but in {member.state} the last one begun is {member.attempt}",
            attempt=attempt,
            state=member.state,
        )
    return attempt == member.attempt


def _hear(member: MemberState, target: Target) -> MemberOutcome:
    heard = member.heard
    if heard is not None and target.epoch <= heard.epoch:
        if target.epoch < heard.epoch:
            return member, (AnswerHigher(heard),)
        if target != heard:
            raise RemoteProtocolError(
                f"epoch {target.epoch} was told with two targets: {heard.state} and then {target.state}",
                hint="two coordinators use one term; stop one of them",
                epoch=target.epoch,
            )
        return member, (Report(),)
    return _walk(msgspec.structs.replace(member, heard=target, failed=None, waits=False))


def _finish(member: MemberState, version: str | None) -> MemberOutcome:
    if member.state is S.SUSPENDING:
        version = member.version
    state = FINISHED[member.state]
    mode = None if state in (S.RUNNING, S.PENDING_WEIGHTS) else member.mode
    return _walk(msgspec.structs.replace(member, state=state, version=version, mode=mode))


def _fail(member: MemberState, event: StepFailed) -> MemberOutcome:
    why = event.why
    if member.state in (S.STARTING, S.STOPPING):
        return msgspec.structs.replace(member, state=S.STOPPED, failed=why), (Report(), Leave(why))
    if member.heard is not None and member.heard.state is S.STOPPED:
        return _begin(member, P.STOP)
    failed = why if member.begun_for == member.epoch else None
    if event.unchanged:
        # After a stricter pause that failed, take the laxest to be in force: pausing again harms nothing.
        mode = Mode.WAIT if member.state is S.PAUSING else member.mode
        mode = None if member.origin in (S.RUNNING, S.PENDING_WEIGHTS) else mode
        waits = event.may_pass and failed is not None
        return _walk(
            msgspec.structs.replace(member, state=member.origin, mode=mode, failed=failed, waits=waits)
        )
    if member.state is S.UPDATING:
        return _walk(msgspec.structs.replace(member, state=S.PAUSED, version=None, failed=failed))
    return _begin(msgspec.structs.replace(member, failed=why), P.STOP)


def _walk(member: MemberState) -> MemberOutcome:
    """Take the next step towards the target heard, if there is one to take, and say where we are."""
    if member.state is S.STOPPED:
        return member, (Report(), Leave("stopped"))
    if member.heard is None or member.failed is not None:
        return member, (Report(),)
    step = next_step(member.state, member.version, member.mode, member.heard)
    if step in (P.STAND, P.WAIT):
        return member, (Report(),)
    return _begin(member, step)


def _begin(member: MemberState, step: Step) -> MemberOutcome:
    target = member.heard
    assert target is not None, "every step but the start is begun towards a target"
    mode = pause_mode(target)
    begun = msgspec.structs.replace(
        member,
        state=BEGUN[step],
        attempt=member.attempt + 1,
        mode=mode if step is P.PAUSE else member.mode,
        origin=member.origin if member.state is S.PAUSING else member.state,
        begun_for=target.epoch,
    )
    return begun, (
        Report(),
        Begin(step, begun.attempt, mode, target.version, target.weights, target.kv),
    )


class Admission(StrEnum):
    """What a member answers to a dispatch."""

    ADMIT = "admit"
    SENDER_BEHIND = "sender behind"
    """Answered with the higher epoch, its target and holds."""
    NOT_RUNNING = "not running"
    MEMBER_BEHIND = "member behind"
    """This member has not heard that epoch yet: retryable."""


def admission(member: MemberState, epoch: Epoch) -> Admission:
    """Whether work dispatched at this epoch may begin here: only at the epoch heard, standing RUNNING.

    (Acknowledgements and aborts begin nothing: they count in every state, unless their epoch is lower than ours.)
    """
    if epoch < member.epoch:
        return Admission.SENDER_BEHIND
    if epoch > member.epoch:
        return Admission.MEMBER_BEHIND
    running = member.state is S.RUNNING and member.standing == epoch
    return Admission.ADMIT if running else Admission.NOT_RUNNING

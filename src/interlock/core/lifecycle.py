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
its exit is the proof. Only UPDATE has a softer end: the member stands PAUSED at version None, and serves nothing.

This module is the door: the words and the tables are in `core/targets`, the member that walks in `core/member`. The
coordinator: what is legal `core/commands`, how a life of it begins `core/recovery`, its state and words
`core/fleet_state`, its view of one member and whether the fleet is there `core/roster`.
"""

from __future__ import annotations

from interlock.core.member import (
    Admission,
    AnswerHigher,
    Begin,
    Leave,
    MemberEffect,
    MemberEvent,
    MemberState,
    Report,
    StepFailed,
    StepFinished,
    TargetHeard,
    admission,
    transition,
)
from interlock.core.targets import (
    BEGUN,
    FINISHED,
    PATH,
    STRICTNESS,
    TARGETS,
    Command,
    Hold,
    Mode,
    State,
    Step,
    Target,
    next_step,
    stricter,
)

__all__ = [
    "BEGUN",
    "FINISHED",
    "PATH",
    "STRICTNESS",
    "TARGETS",
    "Admission",
    "AnswerHigher",
    "Begin",
    "Command",
    "Hold",
    "Leave",
    "MemberEffect",
    "MemberEvent",
    "MemberState",
    "Mode",
    "Report",
    "State",
    "Step",
    "StepFailed",
    "StepFinished",
    "Target",
    "TargetHeard",
    "admission",
    "next_step",
    "stricter",
    "transition",
]

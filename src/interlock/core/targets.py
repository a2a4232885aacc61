"""The words of a fleet's life, and the table of the walk: from every state, for every target, the next step.

The essay stands in `core/lifecycle`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from interlock.core.identity import Epoch


class State(StrEnum):
    """What a member is. RUNNING, PAUSED, SUSPENDED and STOPPED can be targets; the others are on the way."""

    STARTING = "STARTING"
    PENDING_WEIGHTS = "PENDING_WEIGHTS"
    RUNNING = "RUNNING"
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"
    UNPAUSING = "UNPAUSING"
    UPDATING = "UPDATING"
    SUSPENDING = "SUSPENDING"
    SUSPENDED = "SUSPENDED"
    RESUMING = "RESUMING"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"


class Command(StrEnum):
    """What an administrator asks of the whole fleet."""

    START = "START"
    PAUSE = "PAUSE"
    UNPAUSE = "UNPAUSE"
    UPDATE = "UPDATE"
    SUSPEND = "SUSPEND"
    RESUME = "RESUME"
    STOP = "STOP"


class Mode(StrEnum):
    """What a pause does with running requests, laxest first: let them end, keep them frozen, abort them."""

    WAIT = "wait"
    KEEP = "keep"
    ABORT = "abort"


class Step(StrEnum):
    """What a member does next. STAND: it is there. WAIT: a step is under way. LEAVE: the process exits."""

    START = "START"
    PAUSE = "PAUSE"
    UNPAUSE = "UNPAUSE"
    UPDATE = "UPDATE"
    SUSPEND = "SUSPEND"
    RESUME = "RESUME"
    STOP = "STOP"
    STAND = "STAND"
    WAIT = "WAIT"
    LEAVE = "LEAVE"


TARGETS = (State.RUNNING, State.PAUSED, State.SUSPENDED, State.STOPPED)
"""The states a fleet can be told to be in, least restrictive first."""
STRICTNESS = {Mode.WAIT: 0, Mode.KEEP: 1, Mode.ABORT: 2}


class Hold(msgspec.Struct, frozen=True):
    """Somebody's wish that the fleet stay paused. `deadline_s` is on the coordinator's monotonic clock; None: no end."""

    owner: str
    mode: Mode = Mode.KEEP
    deadline_s: float | None = None


class KeptCache(StrEnum):
    """What an update of weights does with the KV of requests that live through it."""

    RECOMPUTE = "recompute"
    """Dropped, and computed anew by the new weights from prompt and tokens."""
    KEEP = "keep"
    """Gone on from. A request with KV of two versions saves no block any more."""


class Target(msgspec.Struct, frozen=True):
    """Be so. Repeated until the member's report repeats the epoch."""

    epoch: Epoch
    state: State
    mode: Mode
    version: str
    holds: tuple[Hold, ...] = ()
    weights: str = ""
    """Where the checkpoint of `version` lies; empty: what the engine was started with."""
    kv: KeptCache = KeptCache.RECOMPUTE
    """For whoever changes its weights on the way."""


# --- the walk ----------------------------------------------------------------------------------------------------

S, P = State, Step
PATH: dict[tuple[State, State], Step] = {
    (state, target): step
    for state, steps in {
        #                   target: RUNNING    PAUSED   SUSPENDED  STOPPED
        S.STARTING:        (P.WAIT,    P.WAIT,   P.WAIT,    P.STOP),
        S.PENDING_WEIGHTS: (P.PAUSE,   P.PAUSE,  P.PAUSE,   P.STOP),
        S.RUNNING:         (P.STAND,   P.PAUSE,  P.PAUSE,   P.PAUSE),
        S.PAUSING:         (P.WAIT,    P.WAIT,   P.WAIT,    P.WAIT),
        S.PAUSED:          (P.UNPAUSE, P.STAND,  P.SUSPEND, P.STOP),
        S.UNPAUSING:       (P.WAIT,    P.WAIT,   P.WAIT,    P.WAIT),
        S.UPDATING:        (P.WAIT,    P.WAIT,   P.WAIT,    P.WAIT),
        S.SUSPENDING:      (P.WAIT,    P.WAIT,   P.WAIT,    P.WAIT),
        S.SUSPENDED:       (P.RESUME,  P.RESUME, P.STAND,   P.STOP),
        S.RESUMING:        (P.WAIT,    P.WAIT,   P.WAIT,    P.WAIT),
        S.STOPPING:        (P.WAIT,    P.WAIT,   P.WAIT,    P.WAIT),
        S.STOPPED:         (P.LEAVE,   P.LEAVE,  P.LEAVE,   P.LEAVE),
    }.items()
    for target, step in zip(TARGETS, steps, strict=True)
}  # fmt: skip
"""(state, target) → step: total, so that no target can be refused and none can be missed for good."""

BEGUN: dict[Step, State] = {
    P.START: S.STARTING, P.PAUSE: S.PAUSING, P.UNPAUSE: S.UNPAUSING, P.UPDATE: S.UPDATING,
    P.SUSPEND: S.SUSPENDING, P.RESUME: S.RESUMING, P.STOP: S.STOPPING,
}  # fmt: skip
"""The state of a member while it takes a step."""

FINISHED: dict[State, State] = {
    S.STARTING: S.PENDING_WEIGHTS, S.PAUSING: S.PAUSED, S.UNPAUSING: S.RUNNING, S.UPDATING: S.PAUSED,
    S.SUSPENDING: S.SUSPENDED, S.RESUMING: S.PAUSED, S.STOPPING: S.STOPPED,
}  # fmt: skip
"""Where a step ends that went well."""


def stricter(mode: Mode, than: Mode | None) -> bool:
    """Whether `mode` is above `than` in wait < keep < abort; any is above none."""
    return than is None or STRICTNESS[mode] > STRICTNESS[than]


def strictest(*modes: Mode) -> Mode:
    """The highest of them in wait < keep < abort. Raises `ValueError` for none."""
    return max(modes, key=STRICTNESS.__getitem__)


def next_step(state: State, version: str | None, mode: Mode | None, target: Target) -> Step:
    """The step from here towards `target`; total. `mode` is that of the pause in force or under way, None: none.

    Three things refine `PATH`. Weights change only in PAUSED, so a member behind in weights goes there first. A pause
    that is laxer than the target's is taken again. A pause that waits for requests to end, when the fleet shall run
    again, is cut short by one that keeps them.
    """
    step = PATH[state, target.state]
    if target.state is S.STOPPED:
        return step
    if state is S.PAUSING:
        return P.PAUSE if stricter(pause_mode(target), mode) else P.WAIT
    if state is S.PAUSED and target.state is not S.RUNNING and stricter(target.mode, mode):
        return P.PAUSE
    if version != target.version:
        return {S.RUNNING: P.PAUSE, S.PAUSED: P.UPDATE, S.SUSPENDED: P.RESUME}.get(state, step)
    return step


def pause_mode(target: Target) -> Mode:
    """How to pause on the way to this target."""
    return Mode.KEEP if target.state is S.RUNNING else target.mode

"""The coordinator's matters in the words of the wire, and in the types of core. What comes from outside is judged here."""

from __future__ import annotations

from interlock.core.fleet_state import Commanded
from interlock.core.limits import NAME_CHARS_MAX, REQUEST_SECONDS_MAX
from interlock.core.targets import TARGETS, Hold, KeptCache, Mode, State
from interlock.core.targets import Command as Verb
from interlock.core.targets import Target as CoreTarget
from interlock.wire import fleet_messages as say

TERM_MAX = 1 << 62
"""Terms are nanoseconds of a clock (year 2116). Whoever leads next does so above the highest that is remembered: believed, one
word of a broken engine would leave no number that fits into a message."""


def hold_in_words(hold: Hold) -> say.Hold:
    """A hold as messages say it."""
    return say.Hold(hold.owner, hold.mode, hold.deadline_s)


def target_in_words(target: CoreTarget) -> say.Target:
    """A target as messages say it; `target_in_types` is the way back."""
    holds = [hold_in_words(hold) for hold in target.holds]
    return say.Target(
        target.epoch, target.state, target.mode, target.version, holds, target.weights, target.kv
    )


def target_in_types(target: say.Target) -> CoreTarget:
    """What somebody remembers. Raises ValueError for words that do not exist, and for an epoch that no coordinator can have told."""
    if not 0 <= target.epoch.term < TERM_MAX or target.epoch.number < 0:
        raise ValueError(f"no coordinator has told epoch {target.epoch}: terms are below {TERM_MAX}")
    state = State(target.state)
    if state not in TARGETS:
        raise ValueError(f"no coordinator has told anybody to be {state}: targets are {', '.join(TARGETS)}")
    holds = tuple(Hold(hold.owner, Mode(hold.mode), hold.deadline_s) for hold in target.holds)
    return CoreTarget(
        target.epoch,
        state,
        Mode(target.mode),
        target.version,
        holds,
        target.weights,
        KeptCache(target.kv),
    )


def commanded(ask: say.Command, now_s: float) -> Commanded:
    """Raises ValueError in words for what no command may say."""
    if not 0 < ask.timeout_s <= REQUEST_SECONDS_MAX:
        raise ValueError(f"timeout_s must be above 0 and at most {REQUEST_SECONDS_MAX}, not {ask.timeout_s}")
    if ask.hold_seconds is not None and not 0 < ask.hold_seconds < float("inf"):
        raise ValueError(f"hold_seconds must be above 0 and finite, not {ask.hold_seconds}")
    if ask.command not in Verb.__members__:
        raise ValueError(f"{ask.command[:NAME_CHARS_MAX]!r} is no command; there are {', '.join(Verb)}")
    if ask.mode not in set(Mode):
        raise ValueError(f"{ask.mode[:NAME_CHARS_MAX]!r} is no pause mode; there are {', '.join(Mode)}")
    if ask.kv not in set(KeptCache):
        raise ValueError(f"kv is {ask.kv[:NAME_CHARS_MAX]!r}; it is one of {', '.join(KeptCache)}")
    if not ask.command_id:
        raise ValueError("command_id must not be empty: by it the command is asked about later")
    for field in ("command_id", "version", "break_hold_of"):
        if len(getattr(ask, field) or "") > NAME_CHARS_MAX:
            raise ValueError(f"{field} must have at most {NAME_CHARS_MAX} characters")
    return Commanded(
        Verb(ask.command),
        ask.owner,
        Mode(ask.mode),
        None if ask.hold_seconds is None else now_s + ask.hold_seconds,
        ask.version,
        ask.weights,
        KeptCache(ask.kv),
        ask.break_hold_of,
        ask.composite,
    )

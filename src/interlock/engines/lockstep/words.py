"""What a lockstep group's leader, runner and ranks say to each other."""

from __future__ import annotations

import msgspec

from interlock.core import lockstep
from interlock.core.targets import KeptCache
from interlock.engines.base import Capabilities, Progress, RequestState, Work


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What is said between a lockstep engine, its leader and its ranks; what has fields it does not know is refused."""


# --- a leader's ------------------------------------------------------------------------------------------------------


class FenceWord(Message, frozen=True):
    """To a rank: one life of the leader begins; nothing of an earlier one counts any more."""

    word: lockstep.Fence


class GrantWord(Message, frozen=True):
    """To a rank: take this step."""

    word: lockstep.Grant


# --- the runner's ----------------------------------------------------------------------------------------------------


class Hold(Message, frozen=True):
    """Levels, numbered: the requests of this rank are held in this mode ("": not at all). `Said.stood` repeats the number."""

    number: int
    mode: str


class Begin(Message, frozen=True):
    """Answered `Done` when it waits for its first step, or by a fault "rejected"."""

    work: Work


class PutBack(Message, frozen=True):
    """Answered as `Begin`."""

    state: RequestState


class Abort(Message, frozen=True):
    """`told`: its last word, "abort", is wanted; else it is forgotten in silence."""

    key: str
    told: bool


class Take(Message, frozen=True):
    """Answered `Taken`, or by a fault "unknown", "not_standing" or "unable"."""

    key: str


class States(Message, frozen=True):
    """Answered `StatesPage`, or by a fault "not_standing": the states of its requests after the first `after`."""

    after: int


class Update(Message, frozen=True):
    """Answered `Done`, or by a fault "update_failed"."""

    path: str
    version: str
    kv: KeptCache


class Leave(Message, frozen=True):
    """End this process; whoever says it kills what does not."""


# --- a rank's --------------------------------------------------------------------------------------------------------


class Said(Message, frozen=True):
    """What this rank is, and what it wants. Sent when it changes; a level."""

    report: lockstep.RankReport
    wants_tokens: int = 0
    """The most that it would compute in its next step; 0: it has nothing to do."""
    stood: int = 0
    """The highest hold that is in force here."""
    running: int = 0
    waiting: int = 0
    kv_used_share: float = 0.0


class Made(Message, frozen=True):
    """What one step made of this rank's requests, and its counters after it."""

    told: list[tuple[str, Progress]]
    counts: dict[str, int]


class Done(Message, frozen=True):
    """A question that asks for nothing but that it was done, was."""


class Taken(Message, frozen=True):
    """Answers that a request be taken out: its whole state."""

    state: RequestState


class StatesPage(Message, frozen=True):
    """Some of the states asked for; `more`: another page follows."""

    states: list[RequestState]
    more: bool


class Failed(Message, frozen=True):
    """This rank cannot go on: mostly because another left the collective that it was in."""

    why: str


class Started(msgspec.Struct, frozen=True):
    """On the pipe that a rank is started with, once: what it can do, or why it cannot start."""

    capabilities: Capabilities | None = None
    error: str = ""


ToRank = FenceWord | GrantWord | Hold | Begin | PutBack | Abort | Take | States | Update | Leave
FromRank = Said | Made | Done | Taken | StatesPage | Failed

"""What coordinator, engines, fronts, the supervisor and administrators say to each other.

Desired state and actual state are levels: both are repeated until the other side's words show that they were heard.
States and commands are spelled as in `core/lifecycle`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from interlock.core.identity import Epoch
from interlock.core.limits import (
    CAPABILITIES_MAX,
    EVENTS_PER_CALL_MAX,
    FACT_CHARS_MAX,
    HOLDS_MAX,
    MEMBERS_MAX,
    NAME_CHARS_MAX,
)

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Version = Annotated[str, msgspec.Meta(max_length=NAME_CHARS_MAX)]
"""Of weights. Whoever names one is repeated to everybody, so it is short."""


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What a coordinator and its members, fronts and commanders say to each other."""


# --- engine -> coordinator ---------------------------------------------------------------------------------------


class EngineFacts(msgspec.Struct, frozen=True):
    """What does not change in an engine's life; fronts need it to route and to validate."""

    address: Annotated[str, msgspec.Meta(max_length=FACT_CHARS_MAX)]
    """Where fronts connect; empty: nowhere. An attached engine is asked by others, not by our fronts."""
    model: Annotated[str, msgspec.Meta(max_length=FACT_CHARS_MAX)]
    """Identity of the weights' content and configuration; equal models give equal tokens."""
    max_model_tokens: int
    engine: Name
    """Kind: "vllm", "transformers"."""
    capabilities: Annotated[list[Name], msgspec.Meta(max_length=CAPABILITIES_MAX)] = []
    pid: int = 0
    """Process id of the engine's runner on its own host, for the operator's eyes; proof of exit never rests on it."""


class Load(msgspec.Struct, frozen=True):
    """How busy an engine is: requests, and the share (0 to 1) of its KV blocks in use."""

    running: int = 0
    waiting: int = 0
    kv_used_share: float = 0.0


class Memory(msgspec.Struct, frozen=True):
    """What all processes of one engine held when it was last measured (PSS), and how much of it its last SUSPEND gave back."""

    resident_bytes: int = 0
    given_back_bytes: int = 0
    """0 while it is not suspended."""


class MemberReport(Message, frozen=True):
    """This is what I am. Sent on every change and at every heartbeat; the first one registers the member.

    `epoch` is the highest this member has heard; `standing` is the epoch of the target it has reached, as a whole.
    """

    facts: EngineFacts
    state: str
    epoch: Epoch
    standing: Epoch | None
    version: Version | None
    """Weights version, None while unknown (a failed or interrupted update)."""
    load: Load = Load()
    heard: Target | None = None
    """The target of the highest epoch heard, with its holds: what a coordinator that lost its state recovers from, and
    the answer to a lower epoch."""
    failed: str | None = None
    """Why the last step towards `epoch` failed; until a higher epoch, or until it is tried again."""
    memory: Memory | None = None


# --- coordinator -> engine ---------------------------------------------------------------------------------------


class Hold(msgspec.Struct, frozen=True):
    """Somebody's wish that the fleet stay paused. `deadline_s` is on the coordinator's monotonic clock, None: no end."""

    owner: Name
    mode: str
    deadline_s: float | None = None


class Target(Message, frozen=True):
    """Be so. Repeated until the member's report repeats the epoch."""

    epoch: Epoch
    state: str
    mode: str
    version: Version
    holds: Annotated[list[Hold], msgspec.Meta(max_length=HOLDS_MAX)] = []
    weights: Annotated[str, msgspec.Meta(max_length=FACT_CHARS_MAX)] = ""
    """Where the checkpoint of `version` lies; empty: what the engine was started with."""
    kv: str = "recompute"


# --- front <-> coordinator ---------------------------------------------------------------------------------------


class LifeOver(msgspec.Struct, frozen=True):
    """This life of that name is over, and so is every earlier one."""

    name: Name
    incarnation: int


class WatchMembership(Message, frozen=True):
    """Send me `Membership` now, on each change and at every heartbeat."""

    heard: Target | None = None
    """The target of the highest epoch that this front was told: a coordinator that lost its state recovers from it, too, and
    one that speaks of a lower epoch learns that fronts would drop its word."""
    over: Annotated[list[LifeOver], msgspec.Meta(max_length=MEMBERS_MAX)] = []
    """Lives that this front saw to end or saw succeeded: a coordinator that forgot them must not take an older one (a clock that
    stepped back, a state directory lost) for a member, which no front would believe."""
    keeps: bool = False
    """It keeps its requests on disk over a suspension: the fleet is SUSPENDED when it has, at that epoch."""
    kept: Epoch | None = None
    """The epoch of SUSPENDED at which its requests are on disk."""
    trouble: Annotated[str, msgspec.Meta(max_length=FACT_CHARS_MAX)] = ""
    """Why they are not."""
    trouble_at: Epoch | None = None
    """The epoch at which that was so: what was asked for later is tried anew."""


class Member(msgspec.Struct, frozen=True):
    """One member as the coordinator sees it. `state` is the member's own word, or SUSPECT or LOST."""

    name: Name
    incarnation: int
    facts: EngineFacts
    state: str
    standing: bool
    version: Version | None
    load: Load = Load()
    memory: Memory | None = None


class Membership(Message, frozen=True):
    """The whole fleet as the coordinator sees it: a level, said at every change."""

    epoch: Epoch
    target: str
    version: Version
    holds: Annotated[list[Hold], msgspec.Meta(max_length=HOLDS_MAX)]
    members: Annotated[list[Member], msgspec.Meta(max_length=MEMBERS_MAX)]
    weights: Annotated[str, msgspec.Meta(max_length=FACT_CHARS_MAX)] = ""
    kv: str = "recompute"
    weights_known: bool = True
    """False from UPDATE until every engine has them, and after one that failed."""
    awaited: Annotated[list[Name], msgspec.Meta(max_length=MEMBERS_MAX)] = []
    """Members that are expected and were not heard by this coordinator: they stand in `members` once they report."""


# --- launcher -> coordinator -------------------------------------------------------------------------------------


class MemberGone(Message, frozen=True):
    """All processes of this member's life are proven ended. Final for that incarnation."""

    name: Name
    incarnation: int
    """0: every life of it so far."""
    again: bool = False
    """The next life of that name may have begun when this was said: nobody is waited for the less by it."""


# --- administrators -> coordinator -------------------------------------------------------------------------------


class Command(Message, frozen=True):
    """One of PAUSE, UNPAUSE, STOP (…). Repeating (owner, command_id) repeats the answer.

    Answered at once by `CommandAccepted` or a `Fault`; then `CommandProgress` until `done`.
    """

    command: str
    owner: Name
    command_id: str
    mode: str = "keep"
    timeout_s: float = 60.0
    hold_seconds: float | None = None
    allow_unknown: bool = False
    break_hold_of: str | None = None
    version: str | None = None
    """UPDATE, START: what the weights are called from then on."""
    weights: Annotated[str, msgspec.Meta(max_length=FACT_CHARS_MAX)] = ""
    """UPDATE, START: the checkpoint directory, as the engines see it."""
    kv: str = "recompute"
    """UPDATE: what becomes of the KV of frozen requests: "recompute" or "keep"."""
    composite: bool = False
    """STOP from RUNNING: pause first, then stop, though the client may be gone by then."""


class CommandAccepted(Message, frozen=True):
    """The command was judged legal, and is on disk: what it asks for is the fleet's target from `epoch` on."""

    epoch: Epoch


class MemberProgress(msgspec.Struct, frozen=True):
    """`outcome`: "waiting", "standing", "gone", "unknown" or "failed"."""

    name: Name
    incarnation: int
    state: str
    outcome: str
    memory: Memory | None = None


class CommandProgress(Message, frozen=True):
    """How far a command is; said at every change, the last time with `done`. `message` is a sentence."""

    epoch: Epoch
    members: Annotated[list[MemberProgress], msgspec.Meta(max_length=MEMBERS_MAX)]
    done: bool
    ok: bool
    message: str


class GetStatus(Message, frozen=True):
    """Answered by `Membership`."""


class GetCommand(Message, frozen=True):
    """What became of the command of this id? Answered by `CommandReport`, or a `Fault` ("unknown_command")."""

    command_id: Name
    owner: str = ""
    """Empty: whoever gave it."""


class CommandReport(Message, frozen=True):
    """One command, under way or ended. The members of one that ended are known to the coordinator that ended it only."""

    owner: Name
    command_id: Name
    command: str
    wanted: str
    """The fleet's state that it waits for, or waited for."""
    left_seconds: float
    """Until its deadline; 0 once it is over."""
    progress: CommandProgress


# --- what has happened: coordinator -> whoever looks ---------------------------------------------------------------


class Happened(msgspec.Struct, frozen=True):
    """One event. `number` counts within one ring, from 1, without a gap."""

    number: int
    wall_ns: int
    name: str
    fields: dict[str, str | int | float | bool | None]


class GetEvents(Message, frozen=True):
    """What has happened after number `after` of the ring `ring`? Waits up to `wait_seconds` where nothing has."""

    after: int = 0
    ring: str = ""
    """Whose numbers these are; empty: whatever ring there is."""
    wait_seconds: float = 0.0


class Events(Message, frozen=True):
    """Oldest first, EVENTS_PER_CALL_MAX at most: ask again after the last one."""

    ring: str
    events: Annotated[list[Happened], msgspec.Meta(max_length=EVENTS_PER_CALL_MAX)]
    last: int
    """The newest number there is."""
    missed: int = 0
    """Events after the one asked for that are not kept any more."""
    gap: str = ""
    """Why what was asked for is not what follows: in words, empty where nothing is missing."""


class GetMetrics(Message, frozen=True):
    """The coordinator has no port of its own: fronts pass its metrics on."""


class MetricsText(Message, frozen=True):
    """Answers `GetMetrics`."""

    text: str
    """Prometheus' exposition."""


# --- transfer engines <-> coordinator: who is where -----------------------------------------------------------------


class Announce(Message, frozen=True):
    """I, the sender, am reached at `address` for transfers. Repeated within DIRECTORY_LEASE_SECONDS; moves of others are told
    as `PeerAddress` on the same channel."""

    address: Annotated[str, msgspec.Meta(min_length=1, max_length=FACT_CHARS_MAX)]


class FindPeer(Message, frozen=True):
    """Where is `name`? Answered by `PeerAddress`, or a `Fault` ("unknown_peer")."""

    name: Name


class PeerAddress(Message, frozen=True):
    """Where a transfer engine listens, in which of its lives."""

    name: Name
    incarnation: int
    address: Annotated[str, msgspec.Meta(max_length=FACT_CHARS_MAX)]


Question = GetStatus | GetCommand | GetEvents | GetMetrics
ToCoordinator = MemberReport | WatchMembership | MemberGone | Command | Question | Announce | FindPeer
ToAdmin = CommandAccepted | CommandProgress | CommandReport | Membership | Events | MetricsText

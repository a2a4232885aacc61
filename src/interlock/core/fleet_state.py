"""What a coordinator has decided for its fleet: the state, and the words of its protocol (`core/commands`)."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from interlock.core.identity import Epoch
from interlock.core.targets import Command, Hold, KeptCache, Mode, State, Target, strictest


class Phase(StrEnum):
    """Of a coordinator's life."""

    RECOVERING = "RECOVERING"
    LEADING = "LEADING"
    DEPOSED = "DEPOSED"


class Launch(msgspec.Struct, frozen=True):
    """A START whose members are not all there: what it awaits of each name is a life newer than the one known before."""

    epoch: Epoch
    """The one that START was allotted."""
    before: frozenset[tuple[str, int]] = frozenset()
    """(name, incarnation) of lives that were known then. Each is over, or about to be: its end excuses nobody, and neither
    do its last words, unless they say that START overtook its STOP and that it goes on."""

    def is_old(self, member: str, incarnation: int) -> bool:
        """Whether that life was there before. 0, *every life so far*, is none of them."""
        return any(name == member and 0 < incarnation <= known for name, known in self.before)

    def has_reached(self, target: Target | None) -> bool:
        """Whether who remembers this target has heard of the START."""
        return target is not None and target.epoch >= self.epoch


class FleetState(msgspec.Struct, frozen=True):
    """What one coordinator has decided. All of it is persisted."""

    phase: Phase
    epoch: Epoch
    state: State
    version: str
    """The weights asked for last."""
    version_known: bool = True
    """False from UPDATE until every member stands at it; it stays False when the update fails."""
    weights: str = ""
    """Where the checkpoint of `version` lies; empty: what engines are started with."""
    version_at: Epoch = Epoch()
    """When a command named these weights; zero: they are those that members remembered, or the configured ones."""
    kv: KeptCache = KeptCache.RECOMPUTE
    holds: tuple[Hold, ...] = ()
    basis: Epoch = Epoch()
    since_term: int = 0
    """What the state rests on: it was gathered from reports up to the epoch `basis`, and has been kept since this term.
    An epoch above the one and of a term below the other is one that nobody told us of."""
    stop_for: str | None = None
    """The composite *stop from RUNNING*: once the pause stands, STOP follows for the owner of this hold, whether its
    client is still there or not. Releasing the hold calls it off."""
    awaited: frozenset[str] = frozenset()
    """Members that a coordinator without state expects and has not heard. Where one stays silent beyond the deadline,
    nobody can say what it does: it counts as unknown until it reports or is excused."""
    launch: Launch | None = None
    """Why they are awaited, where it was START that launched them."""
    deadline_s: float = 0.0
    """RECOVERING: when it ends without them."""
    versions: frozenset[str | None] = frozenset()
    """RECOVERING: weights versions that were asked for or reported."""

    @property
    def mode(self) -> Mode:
        """The strictest of all holds; KEEP without any."""
        return strictest(*(hold.mode for hold in self.holds)) if self.holds else Mode.KEEP

    @property
    def target(self) -> Target:
        """What members are told, for as long as their reports do not repeat the epoch."""
        return Target(self.epoch, self.state, self.mode, self.version, self.holds, self.weights, self.kv)


# --- events ------------------------------------------------------------------------------------------------------


class Commanded(msgspec.Struct, frozen=True):
    """Somebody asks for a command.

    `mode`, `deadline_s` (monotonic): of the hold that PAUSE adds. `version`, `weights` (where its checkpoint lies) and
    `kv`: for UPDATE, and START (None: as before).
    `break_hold_of`: UNPAUSE by an administrator, who names the owner whose hold is broken. `composite`: STOP from
    RUNNING, by way of a pause that `owner` holds.
    """

    command: Command
    owner: str
    mode: Mode = Mode.KEEP
    deadline_s: float | None = None
    version: str | None = None
    weights: str = ""
    kv: KeptCache = KeptCache.RECOMPUTE
    break_hold_of: str | None = None
    composite: bool = False
    expected: frozenset[str] = frozenset()
    """START: the members that are launched by it, and awaited."""
    before: frozenset[tuple[str, int]] = frozenset()
    """START: by name, the newest life of each of them so far."""


class Heard(msgspec.Struct, frozen=True):
    """A member reported: `target` is the one of the highest epoch it has heard, `version` that of its weights."""

    member: str
    incarnation: int
    state: State
    target: Target | None
    version: str | None


class Remembered(msgspec.Struct, frozen=True):
    """A front says which target it was told last: a witness like a member, but nobody waits for its word."""

    target: Target


class Excused(msgspec.Struct, frozen=True):
    """The launcher's word: this life is over, and of its name nothing is running. 0: every life of that name so far."""

    member: str
    incarnation: int


class Settled(msgspec.Struct, frozen=True):
    """The members were judged (`roster.condition`) and the fleet is (`ok`) or cannot be at this epoch's target."""

    epoch: Epoch
    ok: bool


class Tick(msgspec.Struct, frozen=True):
    """Time goes on. Monotonic clock, seconds."""

    now_s: float


FleetEvent = Commanded | Heard | Remembered | Excused | Settled | Tick


# --- effects -----------------------------------------------------------------------------------------------------


class Persist(msgspec.Struct, frozen=True):
    """Store the new state durably before any effect after this one is carried out."""


class TellMembers(msgspec.Struct, frozen=True):
    """Tell `target` to every member until its report repeats the epoch."""

    target: Target


class Accept(msgspec.Struct, frozen=True):
    """Answer the command: it is done when the members stand at this epoch."""

    command: Command
    epoch: Epoch


class StepDown(msgspec.Struct, frozen=True):
    """A higher epoch exists: carry out no effect any more, close, and leave."""

    epoch: Epoch


FleetEffect = Persist | TellMembers | Accept | StepDown
FleetOutcome = tuple[FleetState, tuple[FleetEffect, ...]]


def allot(fleet: FleetState, *answer: FleetEffect) -> FleetOutcome:
    """Give a changed target its epoch: stored first, then answered, then told."""
    fleet = msgspec.structs.replace(fleet, epoch=Epoch(fleet.epoch.term, fleet.epoch.number + 1))
    return fleet, (Persist(), *answer, TellMembers(fleet.target))

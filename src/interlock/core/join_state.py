"""What a join knows, what it is told, and what follows: the words of core/joins."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from interlock.core.layouts import Shard

Outcome = tuple[bool, ...]
"""What became of each block of the join on one rank, in the order of the grant; empty from a rank that writes none."""
Checksums = tuple[bytes, ...]
"""For each block of the join one checksum per (layer group, KV head), group by group, packed (core/packed_sums); empty where
checksums do not matter (loads, aborted work)."""


class JoinName(msgspec.Struct, frozen=True, array_like=True):
    """Which try of which session: never a block's key, for a key is saved again and again."""

    session: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.session}#{self.attempt}"


class Phase(StrEnum):
    """EARLY: reports before its open. COMPLETED and FAILED are final, and kept as a tombstone."""

    EARLY = "EARLY"
    OPEN = "OPEN"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"


class Kind(StrEnum):
    """What is joined: saves combine by AND for each block, loads by the union of failed blocks."""

    SAVE = "save"
    LOAD = "load"


# --- events ------------------------------------------------------------------------------------------------------


class Open(msgspec.Struct, frozen=True):
    """Join what the ranks report of `blocks` blocks. `shards[r]` is what rank r writes (save) or fills (load).

    `layers` and `heads` are those of the whole block. Repeating an `Open` word for word changes
    nothing; another `Open` of the same name is refused.
    """

    join: JoinName
    blocks: int
    shards: tuple[Shard, ...]
    layers: int
    heads: int
    deadline_s: float
    kind: Kind = Kind.SAVE
    cuts: tuple[int, ...] = ()
    """Layers at which checksums begin anew, besides where a shard does."""


class Report(msgspec.Struct, frozen=True):
    """Rank `rank` will not touch these blocks again; this is what became of them there."""

    join: JoinName
    rank: int
    good: Outcome
    checksums: Checksums = ()


class RankLost(msgspec.Struct, frozen=True):
    """The exit of this rank is proven. What it reported before stands."""

    join: JoinName
    rank: int


class Abort(msgspec.Struct, frozen=True):
    """Nobody wants the outcome any more."""

    join: JoinName


class Tick(msgspec.Struct, frozen=True):
    """It is `now_s` on the monotonic clock."""

    now_s: float


Event = Open | Report | RankLost | Abort | Tick


# --- effects -----------------------------------------------------------------------------------------------------


class Completed(msgspec.Struct, frozen=True):
    """`good[i]`: every rank that had to do with block i did it. `checksums[i]`: those of its layer groups, each in head
    order."""

    join: JoinName
    good: Outcome
    checksums: Checksums


class Failed(msgspec.Struct, frozen=True):
    """No block of this join is good. `missing`: the ranks that had to report and did not."""

    join: JoinName
    reason: str
    missing: tuple[int, ...]

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.missing)) or "none"
        return f"join {self.join} failed: {self.reason}; no report from ranks: {ranks}"


class Contradicted(msgspec.Struct, frozen=True):
    """A rank reported twice and differently. The first report stands; count it, for the rank is defective."""

    join: JoinName
    rank: int


class Refused(msgspec.Struct, frozen=True):
    """An early report turned out to be impossible once the join was opened. It was dropped, the join goes on."""

    join: JoinName
    rank: int
    reason: str


class Forget(msgspec.Struct, frozen=True):
    """This join will not be heard of again: drop it."""

    join: JoinName


Effect = Completed | Failed | Contradicted | Refused | Forget


# --- state -------------------------------------------------------------------------------------------------------


class Join(msgspec.Struct, frozen=True):
    """One join. Begins EARLY, knowing only its name."""

    name: JoinName
    phase: Phase = Phase.EARLY
    opened: Open | None = None
    reports: tuple[Report, ...] = ()
    """First report per rank, in rank order, so that equal knowledge is an equal state. Kept after the end too: a repeat
    is told from a contradiction by them."""
    lost: tuple[int, ...] = ()
    missing: int = 0
    """OPEN: how many ranks still have to report."""
    expires_s: float | None = None
    """EARLY and finished: when to forget it; None until the first tick."""

    def report_of(self, rank: int) -> Report | None:
        """The first that this rank reported, which wins; None: nothing yet."""
        for report in self.reports:
            if report.rank == rank:
                return report
        return None

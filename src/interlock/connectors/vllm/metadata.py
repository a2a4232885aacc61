"""What the scheduler's half tells each rank at every step, and what ranks tell it back. Travels by vLLM's own pipes.

Plain data: `connector` wraps it in vLLM's classes, so that neither half needs vLLM.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from interlock.store.client import MatchResult, WriteGrant


@dataclass(frozen=True)
class LoadTask:
    """Copy stored blocks into KV blocks that vLLM holds for this request until every rank has reported the load.

    `keys`, `source.locations` and `block_ids` run in parallel. `attempt` numbers the loads of one engine's life.
    """

    request: str
    attempt: int
    keys: list[bytes]
    source: MatchResult
    block_ids: list[int]


@dataclass(frozen=True)
class SaveTask:
    """Copy KV blocks that this step completes into granted slots; `keys` and `block_ids` run along `grant.grants`."""

    grant: WriteGrant
    keys: list[bytes]
    block_ids: list[int]


@dataclass
class StepTasks:
    """One step's work. `idle`: the step computes nothing, so the engine would only poll for what it waits for."""

    loads: list[LoadTask] = field(default_factory=list)
    saves: list[SaveTask] = field(default_factory=list)
    idle: bool = False


@dataclass
class RankNews:
    """What one rank (or, aggregated, all) has to say besides vLLM's own fields.

    `mismatched`: (load attempt, index) of blocks whose bytes were not what the look-up promised: to be withdrawn.
    `counts`: what happened since the last news, by name, added up over ranks.
    """

    mismatched: set[tuple[int, int]] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)

    def merged(self, other: RankNews) -> RankNews:
        return RankNews(self.mismatched | other.mismatched, self.counts + other.counts)

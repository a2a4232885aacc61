"""The joins one node owns: where an event finds its join, and how many unfinished stories a node will keep.

A mutable collection under the bans of core (no clock, no I/O). The rules of one join are core/joins; here stand only the
bounds between joins: so many open, so many early reports, so many tombstones (oldest forgotten first).
"""

from __future__ import annotations

from collections.abc import Iterator

from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.joins import (
    Abort,
    Effect,
    Forget,
    Join,
    JoinName,
    Open,
    Phase,
    RankLost,
    Report,
    Tick,
    transition,
)
from interlock.core.limits import EARLY_REPORTS_MAX, JOINS_PER_NODE_MAX, TOMBSTONES_MAX


class JoinBook:
    """All joins of a node by name. Every method returns the effects of what it was told."""

    def __init__(
        self,
        *,
        joins_max: int = JOINS_PER_NODE_MAX,
        early_reports_max: int = EARLY_REPORTS_MAX,
        tombstones_max: int = TOMBSTONES_MAX,
    ) -> None:
        self._joins_max = joins_max
        self._early_reports_max = early_reports_max
        self._tombstones_max = tombstones_max
        self._early: dict[JoinName, Join] = {}
        self._open: dict[JoinName, Join] = {}
        self._finished: dict[JoinName, Join] = {}
        self._early_reports = 0
        self._unclocked: dict[JoinName, None] = {}
        """Early and finished joins whose clock the next tick starts."""

    def __len__(self) -> int:
        return len(self._early) + len(self._open) + len(self._finished)

    def __iter__(self) -> Iterator[Join]:
        yield from self._early.values()
        yield from self._open.values()
        yield from self._finished.values()

    def get(self, name: JoinName) -> Join | None:
        return self._open.get(name) or self._early.get(name) or self._finished.get(name)

    @property
    def open_count(self) -> int:
        """Joins that wait for reports."""
        return len(self._open)

    @property
    def early_reports(self) -> int:
        """Reports that are kept for joins which nobody has opened yet; bounded."""
        return self._early_reports

    def handle(self, event: Open | Report | RankLost | Abort) -> tuple[Effect, ...]:
        """Tells the join that `event` names. Raises as `joins.transition` does, or when a bound is met; changes nothing then.

        The loss of a rank concerns only joins that are known: one opened later is opened with ranks that live.
        """
        known = self.get(event.join)
        if known is None:
            if isinstance(event, RankLost):
                return ()
            known = Join(event.join)
        self._check_bounds(known, event)
        after, effects = transition(known, event)
        if after is not known:
            self._put(after)
        return effects

    def tick(self, now_s: float) -> tuple[Effect, ...]:
        """Lets time pass for every join: deadlines, early reports nobody claimed, tombstones.

        Costs a transition for each open join and for each that is early or finished since the last tick; of the others only
        the oldest are looked at, for they expire in their order.
        """
        event = Tick(now_s)
        heard: list[Effect] = []
        for join in list(self._open.values()):
            heard += self._pass(join, event)
        for name in list(self._unclocked):
            heard += self._pass(self._early.get(name) or self._finished[name], event)
        self._unclocked.clear()
        for joins in (self._early, self._finished):
            while joins:
                effects = self._pass(next(iter(joins.values())), event)
                if not effects:
                    break
                heard += effects
        return tuple(heard)

    def _pass(self, join: Join, event: Tick) -> tuple[Effect, ...]:
        after, effects = transition(join, event)
        if any(isinstance(effect, Forget) for effect in effects):
            self._drop(join)
        elif after is not join:
            self._put(after)
        return effects

    def check_integrity(self) -> None:
        """Raises `AssertionError` when a bound or a count is broken."""
        assert len(self._open) <= self._joins_max
        assert len(self._finished) <= self._tombstones_max
        assert self._early_reports == sum(len(join.reports) for join in self._early.values())
        assert len(self._early) <= self._early_reports <= self._early_reports_max
        assert self._unclocked.keys() <= self._early.keys() | self._finished.keys()
        assert all(join.phase is Phase.EARLY for join in self._early.values())
        assert all(join.phase is Phase.OPEN for join in self._open.values())

    def _check_bounds(self, join: Join, event: Open | Report | RankLost | Abort) -> None:
        if isinstance(event, Open) and join.phase is Phase.EARLY and len(self._open) >= self._joins_max:
            raise LocalProtocolError(
                f"join {event.join} is not opened: {len(self._open)} joins are open, which is the limit",
                retryable=True,
                hint="wait for some of them to end",
                join=str(event.join),
            )
        if (
            isinstance(event, Report)
            and join.phase is Phase.EARLY
            and self._early_reports >= self._early_reports_max
            and join.report_of(event.rank) is None
        ):
            raise RemoteProtocolError(
                f"rank {event.rank} reports to join {event.join}, which is not open, and {self._early_reports} such "
                "reports are kept already, which is the limit",
                retryable=True,
                hint="report again once the join is open",
                join=str(event.join),
                rank=event.rank,
            )

    def _put(self, join: Join) -> None:
        """Files a join under its phase; what changes within its phase keeps its place in the order of age."""
        joins = (
            self._early
            if join.phase is Phase.EARLY
            else self._open
            if join.phase is Phase.OPEN
            else self._finished
        )
        if join.name not in joins:
            self._drop(join)
            if joins is not self._open:
                self._unclocked[join.name] = None
        if joins is self._early:
            known = joins.get(join.name)
            self._early_reports += len(join.reports) - (len(known.reports) if known else 0)
        joins[join.name] = join
        if len(self._finished) > self._tombstones_max:
            self._drop(next(iter(self._finished.values())))

    def _drop(self, join: Join) -> None:
        early = self._early.pop(join.name, None)
        if early is not None:
            self._early_reports -= len(early.reports)
        self._open.pop(join.name, None)
        self._finished.pop(join.name, None)
        self._unclocked.pop(join.name, None)

"""A repeated report that comes after the save completed is taken for an early one and kept for ever."""

from __future__ import annotations

import msgspec

from interlock.checking.gallery import Exhibit
from interlock.checking.worlds.joins import Joins
from interlock.core.joins import Completed, Effect, Event, Forget, Join, Open, Phase, Report


def as_it_was(join: Join, event: Event) -> tuple[Join, tuple[Effect, ...]]:
    """Finishes before their start wait in a dictionary without bound or time; a completed save leaves no trace."""
    match event:
        case Open() if join.phase is Phase.EARLY:
            return _ended_if_all(msgspec.structs.replace(join, phase=Phase.OPEN, opened=event))
        case Report() if join.report_of(event.rank) is None:
            return _ended_if_all(msgspec.structs.replace(join, reports=(*join.reports, event)))
    return join, ()


def _ended_if_all(join: Join) -> tuple[Join, tuple[Effect, ...]]:
    if join.opened is None or len(join.reports) < len(join.opened.shards):
        return join, ()
    good = tuple(map(all, zip(*(report.good for report in join.reports), strict=True)))
    return join, (Completed(join.name, good, ()), Forget(join.name))


EXHIBIT = Exhibit(
    title="The repeat that is early for ever",
    protocol="joins",
    public="alibaba/tair-kvcache #208 (as merged)",
    rule="a finish without a start is kept until the start comes; nothing remembers that the save is over",
    broken=lambda: Joins(ranks=2, attempts=1, timers=1, transition=as_it_was, symmetric=False),
    mended=lambda: Joins(ranks=2, attempts=1, timers=1),
    story_steps=7,
    kind="stuck",
)

"""Of several ranks that loaded, only the one that reports last is asked whether it failed."""

from __future__ import annotations

import msgspec

from interlock.checking.gallery import Exhibit
from interlock.checking.worlds.joins import Joins
from interlock.core.joins import Completed, Effect, Event, Join, Kind, Open, Phase, Report


def as_it_was(join: Join, event: Event) -> tuple[Join, tuple[Effect, ...]]:
    """Ranks are collected in a set; when the set is full, the failed blocks of the event that filled it are published."""
    match event:
        case Open():
            return msgspec.structs.replace(join, phase=Phase.OPEN, opened=event), ()
        case Report() if join.opened is not None and join.report_of(event.rank) is None:
            reports = (*join.reports, event)
            if len(reports) < len(join.opened.shards):
                return msgspec.structs.replace(join, reports=reports), ()
            ended = msgspec.structs.replace(join, phase=Phase.COMPLETED, reports=reports)
            return ended, (Completed(join.name, event.good, ()),)
    return join, ()


EXHIBIT = Exhibit(
    title="Only the last rank's failures count",
    protocol="joins",
    public="alibaba/tair-kvcache #208 (load flow, unchanged by it)",
    rule="the load's failed blocks are those of the rank that reported last; the engine decodes from what the others lack",
    broken=lambda: Joins(ranks=2, attempts=1, kind=Kind.LOAD, transition=as_it_was, symmetric=False),
    mended=lambda: Joins(ranks=2, attempts=1, kind=Kind.LOAD),
    story_steps=6,
)

"""Reports are counted and not the ranks they come from: one rank that speaks twice speaks for its silent neighbour."""

from __future__ import annotations

import msgspec

from interlock.checking.gallery import Exhibit
from interlock.checking.worlds.joins import Joins
from interlock.core.joins import Completed, Effect, Event, Join, Kind, Open, Phase, Report


def as_it_was(join: Join, event: Event) -> tuple[Join, tuple[Effect, ...]]:
    """Each report takes one from the number that is waited for; failed blocks are the union of what was said."""
    match event:
        case Open():
            return msgspec.structs.replace(
                join, phase=Phase.OPEN, opened=event, missing=len(event.shards)
            ), ()
        case Report() if join.phase is Phase.OPEN:
            reports = join.reports if event in join.reports else (*join.reports, event)
            counted = msgspec.structs.replace(join, reports=reports, missing=join.missing - 1)
            if counted.missing:
                return counted, ()
            good = tuple(map(all, zip(*(report.good for report in reports), strict=True)))
            return msgspec.structs.replace(counted, phase=Phase.COMPLETED), (Completed(join.name, good, ()),)
    return join, ()


EXHIBIT = Exhibit(
    title="One rank that speaks for two",
    protocol="joins",
    public="vllm-project/vllm #49689 (KV events; KVOutputAggregator of 0.32 counts finished loads in the same way)",
    rule="a load is finished when as many reports came as there are ranks, whoever sent them",
    broken=lambda: Joins(ranks=2, attempts=1, kind=Kind.LOAD, transition=as_it_was, symmetric=False),
    mended=lambda: Joins(ranks=2, attempts=1, kind=Kind.LOAD),
    story_steps=5,
)

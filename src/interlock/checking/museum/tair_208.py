"""A rank's *finished* overtakes the scheduler's *start*, and an assertion kills the thread that joins everything."""

from __future__ import annotations

import msgspec

from interlock.checking.gallery import Exhibit
from interlock.checking.worlds.joins import Joins
from interlock.core.joins import Completed, Effect, Event, Join, Open, Phase, Report


def as_it_was(join: Join, event: Event) -> tuple[Join, tuple[Effect, ...]]:
    """A finish is looked up among the running saves; its scheduler's start came on another socket."""
    match event:
        case Open():
            return msgspec.structs.replace(join, phase=Phase.OPEN, opened=event), ()
        case Report():
            assert join.phase is not Phase.EARLY, "save_id in running_save"
            if join.opened is None or join.report_of(event.rank) is not None:
                return join, ()
            reports = (*join.reports, event)
            if len(reports) < len(join.opened.shards):
                return msgspec.structs.replace(join, reports=reports), ()
            good = tuple(map(all, zip(*(report.good for report in reports), strict=True)))
            ended = msgspec.structs.replace(join, phase=Phase.COMPLETED, reports=reports)
            return ended, (Completed(join.name, good, ()),)
    return join, ()


EXHIBIT = Exhibit(
    title="The finish that overtakes its start",
    protocol="joins",
    public="alibaba/tair-kvcache #208",
    rule="a finished save is looked up among the started ones with an assertion; start and finish travel on two sockets",
    broken=lambda: Joins(ranks=2, attempts=1, transition=as_it_was, symmetric=False),
    mended=lambda: Joins(ranks=2, attempts=1),
    story_steps=3,
)

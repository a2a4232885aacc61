"""A rank dies before it reports, and its save is waited for without end."""

from __future__ import annotations

from interlock.checking.gallery import Exhibit
from interlock.checking.worlds.joins import Joins
from interlock.core.joins import Effect, Event, Join, Open, Report, transition


def as_it_was(join: Join, event: Event) -> tuple[Join, tuple[Effect, ...]]:
    """Only starts and finishes are heard: no exit, no deadline."""
    return transition(join, event) if isinstance(event, Open | Report) else (join, ())


EXHIBIT = Exhibit(
    title="The save that waits for the dead",
    protocol="joins",
    public="alibaba/tair-kvcache #208 (its stated limit: no time-out)",
    rule="a save ends when every rank has reported, and by nothing else",
    broken=lambda: Joins(ranks=2, attempts=1, losses=1, timers=1, transition=as_it_was),
    mended=lambda: Joins(ranks=2, attempts=1, losses=1, timers=1),
    story_steps=1,
    kind="stuck",
)

"""A write is given up at its deadline and its memory handed out again, while somebody still writes there."""

from __future__ import annotations

import msgspec

from interlock.checking.gallery import Exhibit
from interlock.checking.worlds.sessions import Sessions
from interlock.core.sessions import Effect, Event, FreeSlot, Phase, Session, transition


def as_it_was(session: Session, event: Event) -> tuple[Session, tuple[Effect, ...]]:
    """The end of a session is the end of its slots' use."""
    after, effects = transition(session, event)
    if after.phase is Phase.QUARANTINED and session.phase is not Phase.QUARANTINED:
        return msgspec.structs.replace(after, phase=Phase.FREED, holders=()), (
            *effects,
            *map(FreeSlot, session.slots),
        )
    return after, effects


EXHIBIT = Exhibit(
    title="Bytes that land after the deadline",
    protocol="sessions",
    public="kvcache-ai/Mooncake #3793; alibaba/tair-kvcache's write lease has the same rule",
    rule="a write that timed out is not ended, and its buffer is free; the late writer overwrites another's block",
    broken=lambda: Sessions(asks=[[(0,)], [(1,)]], slots=1, faults=(0, 1, 0, 0, 0, 0), transition=as_it_was),
    mended=lambda: Sessions(asks=[[(0,)], [(1,)]], slots=1, faults=(0, 1, 0, 0, 0, 0)),
    story_steps=7,
)

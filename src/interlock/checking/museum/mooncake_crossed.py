"""The reply tells other queue pairs than a request that came meanwhile: the endpoint is rebuilt, and the peer has the old ones."""

from __future__ import annotations

from interlock.checking.gallery import Exhibit
from interlock.checking.museum.mooncake_rules import (
    Calls,
    Outcome,
    heard,
    is_awaited,
    other,
    replied,
    set_up,
)
from interlock.checking.worlds.endpoints import Endpoints
from interlock.core.endpoint_events import Accept, Event, Open
from interlock.core.endpoint_state import Endpoint, Phase


def as_it_was(endpoint: Endpoint, event: Event) -> Outcome:
    """A request is given to the endpoint that is there; one with another list than before means a restart."""
    match event:
        case Open():
            if endpoint.phase is Phase.CONNECTED and endpoint.theirs == event.me:
                return replied(endpoint, event)
            return replied(set_up(endpoint, event.me, afresh=endpoint.phase is Phase.CONNECTED), event)
        case Accept():
            if not is_awaited(endpoint, event):
                return endpoint, ()
            if endpoint.phase is Phase.CONNECTED and endpoint.theirs != event.me:
                return heard(set_up(endpoint, event.me, afresh=True)), ()
            return heard(set_up(endpoint, event.me)), ()
    return other(endpoint, event)


EXHIBIT = Exhibit(
    title="Crossed lists",
    protocol="endpoints",
    public="kvcache-ai/Mooncake #1733 as merged",
    rule="where the reply's list differs from the one held, the queue pairs are made anew and connected to the reply's, though "
    "the peer was told the old ones",
    broken=lambda: Calls(crashes=(0, 1), transition=as_it_was),
    mended=lambda: Endpoints(crashes=(0, 1)),
    story_steps=6,
)

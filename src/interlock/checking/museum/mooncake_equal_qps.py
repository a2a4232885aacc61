"""A peer is restarted and its new queue pairs have the old numbers: its request is taken for a repeat."""

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
    """A list equal to the one held is a duplicate. A process's first queue pairs have the same numbers in each of its lives."""
    match event:
        case Open():
            if endpoint.phase is Phase.CONNECTED and endpoint.theirs is not None:
                if endpoint.theirs.attempt == event.me.attempt:
                    return replied(endpoint, event)
                return replied(set_up(endpoint, event.me, afresh=True), event)
            return replied(set_up(endpoint, event.me), event)
        case Accept():
            if is_awaited(endpoint, event) and endpoint.phase is not Phase.CONNECTED:
                return heard(set_up(endpoint, event.me)), ()
            return endpoint, ()
    return other(endpoint, event)


EXHIBIT = Exhibit(
    title="The restart with equal queue pair numbers",
    protocol="endpoints",
    public="kvcache-ai/Mooncake #1733 (session ids were considered there, and left out)",
    rule="a restarted peer is recognised by its list of queue pair numbers being another",
    broken=lambda: Calls(crashes=(0, 1), transition=as_it_was),
    mended=lambda: Endpoints(crashes=(0, 1)),
    story_steps=6,
)

"""Both sides open at once; each deletes the endpoint that its own call works on."""

from __future__ import annotations

from interlock.checking.gallery import Exhibit
from interlock.checking.museum.mooncake_rules import Outcome, other, replied, set_up
from interlock.checking.worlds.endpoints import Endpoints
from interlock.core.endpoint_events import Accept, Event, Open
from interlock.core.endpoint_state import Endpoint, Phase


def as_it_was(endpoint: Endpoint, event: Event) -> Outcome:
    """A request deletes whatever endpoint there is and sets up a new one; a reply is for the endpoint that called."""
    match event:
        case Open():
            return replied(set_up(endpoint, event.me, afresh=endpoint.phase is not Phase.IDLE), event)
        case Accept():
            if endpoint.is_wanted and event.echo == endpoint.stamp and endpoint.phase is Phase.CONNECTING:
                return set_up(endpoint, event.me), ()
            return endpoint, ()  # For the deleted one.
    return other(endpoint, event)


EXHIBIT = Exhibit(
    title="The deleted endpoint",
    protocol="endpoints",
    public="kvcache-ai/Mooncake before #1733",
    rule="a handshake request deletes the endpoint to its sender, also while that endpoint's own request is under way",
    broken=lambda: Endpoints(transition=as_it_was),
    mended=lambda: Endpoints(),
    story_steps=4,
)

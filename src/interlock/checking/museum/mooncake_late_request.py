"""A request of an attempt long over arrives late, looks like a restart, and displaces the connection that is alive."""

from __future__ import annotations

from interlock.checking.gallery import Exhibit
from interlock.checking.museum.mooncake_rules import Calls, Outcome, heard, other, replied, set_up
from interlock.checking.worlds.endpoints import Endpoints
from interlock.core.endpoint_events import Accept, Event, Open
from interlock.core.endpoint_state import Endpoint, Phase


def as_it_was(endpoint: Endpoint, event: Event) -> Outcome:
    """With replies fenced by attempt and lives told apart, but not ordered: another list than the one held is a restart."""
    match event:
        case Open():
            if endpoint.phase is Phase.CONNECTED and endpoint.theirs == event.me:
                return replied(endpoint, event)
            return replied(set_up(endpoint, event.me, afresh=endpoint.phase is Phase.CONNECTED), event)
        case Accept():
            if event.echo == endpoint.stamp and endpoint.phase is Phase.CONNECTING:
                return heard(set_up(endpoint, event.me)), ()
            return endpoint, ()
    return other(endpoint, event)


EXHIBIT = Exhibit(
    title="The late request",
    protocol="endpoints",
    public="kvcache-ai/Mooncake after #2588 and #3584 (none of them orders requests)",
    rule="a request with another list than the one held retires the connection, whichever of the two is older",
    broken=lambda: Calls(reopens=(0, 1), transition=as_it_was),
    mended=lambda: Endpoints(reopens=(0, 1)),
    story_steps=6,
)

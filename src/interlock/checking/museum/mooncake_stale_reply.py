"""A waiter times out and rebuilds the endpoint under a call that lives on; the call's late reply sets up the new one."""

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
    torn_down,
)
from interlock.checking.worlds.endpoints import NEVER, Endpoints
from interlock.core.endpoint_events import Accept, Event, Open, Tick
from interlock.core.endpoint_state import Endpoint, Phase


def as_it_was(endpoint: Endpoint, event: Event) -> Outcome:
    """The waiter's time-out (10 s) is shorter than the call's (60 s); the reply is not asked which attempt it answers."""
    match event:
        case Open():
            if endpoint.phase is Phase.CONNECTED and endpoint.theirs == event.me:
                return replied(endpoint, event)
            return replied(set_up(endpoint, event.me, afresh=endpoint.phase is Phase.CONNECTED), event)
        case Accept():
            if is_awaited(endpoint, event) and endpoint.phase is not Phase.CONNECTED:
                return heard(set_up(endpoint, event.me)), ()
            return endpoint, ()
        case Tick(now_s):
            is_late = now_s >= NEVER and endpoint.phase is Phase.CONNECTING
            return (torn_down(endpoint) if is_late else endpoint), ()
    return other(endpoint, event)


EXHIBIT = Exhibit(
    title="The stale reply",
    protocol="endpoints",
    public="kvcache-ai/Mooncake #3584",
    rule="a waiter that timed out resets the endpoint; the reply to the attempt before is taken for its own",
    broken=lambda: Calls(timers=1, transition=as_it_was),
    mended=lambda: Endpoints(timers=1),
    story_steps=4,
)

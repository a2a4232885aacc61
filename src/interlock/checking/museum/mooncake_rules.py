"""Parts of Mooncake's RDMA handshake, for the exhibits that differ in one rule each: a request, a reply, no third message.

Our words stand for theirs: Open for the handshake request, Accept for the reply to the caller, a stamp for a list of queue
pairs. `is_wanted` says that a caller waits for its reply.
"""

from __future__ import annotations

import msgspec

from interlock.core.endpoint_events import Accept, Connect, Effects, Event, Open, Retire, Send, Tick
from interlock.core.endpoint_state import Endpoint, Lane, Phase, Stamp

Outcome = tuple[Endpoint, Effects]
UNCONNECTED, CONNECTING, CONNECTED = Phase.IDLE, Phase.CONNECTING, Phase.CONNECTED
_LANES = (Lane("tcp", "a"),)


def call(endpoint: Endpoint) -> Outcome:
    """Sends the request and waits for its reply."""
    calling = msgspec.structs.replace(endpoint, phase=CONNECTING, is_wanted=True)
    return calling, (Send(Open(endpoint.name, endpoint.stamp, endpoint.offers)),)


def set_up(endpoint: Endpoint, theirs: Stamp, *, afresh: bool = False) -> Endpoint:
    """Connects this side's queue pairs (`afresh`: new ones) to the peer's."""
    return msgspec.structs.replace(
        endpoint,
        attempt=endpoint.attempt + afresh,
        phase=CONNECTED,
        theirs=theirs,
        ready=_LANES,
        chosen=_LANES,
    )


def torn_down(endpoint: Endpoint) -> Endpoint:
    """New queue pairs, not connected."""
    return msgspec.structs.replace(
        endpoint, attempt=endpoint.attempt + 1, phase=UNCONNECTED, theirs=None, ready=(), chosen=()
    )


def replied(endpoint: Endpoint, request: Open) -> Outcome:
    """Sends the reply to this request."""
    return endpoint, (Send(Accept(endpoint.name, endpoint.stamp, request.me, endpoint.offers)),)


def is_awaited(endpoint: Endpoint, reply: Accept) -> bool:
    """Whether a caller of this life of the process waits for a reply."""
    return endpoint.is_wanted and reply.echo.incarnation == endpoint.incarnation


def heard(endpoint: Endpoint) -> Endpoint:
    """The caller has its reply."""
    return msgspec.structs.replace(endpoint, is_wanted=False)


def other(endpoint: Endpoint, event: Event) -> Outcome:
    """What is alike in all of them: to begin, and to be retired by one's own process. There are no heartbeats."""
    match event:
        case Connect():
            return call(endpoint)
        case Retire():
            return heard(torn_down(endpoint)), ()
        case Tick():
            return endpoint, ()
    return endpoint, ()

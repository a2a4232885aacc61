"""Parts of Mooncake's RDMA handshake, for the exhibits that differ in one rule each: a request, a reply, no third message.

Our words stand for theirs: Open for the handshake request, Accept for the reply to the caller, a stamp for a list of queue
pairs. `is_wanted` says that a caller waits for its reply.
"""

from __future__ import annotations

import msgspec

from interlock.checking.explorer import Broken
from interlock.checking.worlds.endpoints import Endpoints, State
from interlock.core.endpoint_events import Accept, Connect, Effects, Event, Open, Retire, Send, Tick
from interlock.core.endpoint_state import Endpoint, Lane, Phase, Stamp

Outcome = tuple[Endpoint, Effects]
UNCONNECTED, CONNECTING, CONNECTED = Phase.IDLE, Phase.CONNECTING, Phase.CONNECTED
_LANES = (Lane("tcp", "a"),)


class Calls(Endpoints):
    """Requests and replies are calls: each arrives once, in the life it was sent to. Two connected sides are judged when neither
    waits for a reply, which might yet mend it."""

    def _deliver(self, state: State, at: int, bit: int) -> State | Broken:
        cores, sent, left = state
        return super()._deliver((cores, sent & ~bit, left), at, bit)

    def _crash(self, state: State, process: int) -> State:
        cores, sent, left = super()._crash(state, process)
        for at, (owner, _) in enumerate(self.pairs):
            sent &= ~self._into[at] if owner == process else -1
        return cores, sent, left

    def _judge(self, one: Endpoint, two: Endpoint) -> str | None:
        return None if one.is_wanted or two.is_wanted else super()._judge(one, two)


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

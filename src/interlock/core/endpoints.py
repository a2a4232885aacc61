"""Endpoints: two processes that may both open at once, be restarted at any moment, and hear anything late, agree on one connection.

What can go wrong (kvcache-ai/Mooncake). Both open at once, the passive side of each deletes the endpoint its own call works on,
and one ends on a deleted endpoint (before #1733). The repair rebuilt the queue pairs when the answer told others than an
earlier request, although the peer held the old ones: both connected, crossed. An answer to an attempt that a waiter had timed
out set up its successor (#3584). A restarted peer whose queue pairs had the same numbers was a duplicate. An old request, late,
looked like a restart and displaced a live connection. A lost ready-ACK left one side half-open for ever. And in a rule
of our own, each side kept the lanes it liked: both connected, no lane in common, in five steps (hazards E1).

Why it cannot here.
* An endpoint has a stamp, (incarnation, attempt), that only grows. Every message tells its sender's stamp and, but for Open, the
  receiver's stamp that it answers. The order of a peer's endpoints is learnt from every message; what is older than
  known is not listened to, and parameters decide nothing.
* An endpoint pairs with one endpoint of the peer and moves on only by messages from that one to this one. When the peer shows
  a newer stamp, or rejects just this pair, it retires; before a lane was listed it may pair with the newer one instead.
  Neither can be untrue by being late: a stamp that was left never comes back, so no live connection is displaced.
* An Open that meets CONNECTING gives its parameters to the endpoint that is there. So simultaneous opens give one connection.
* The larger name lists the lanes, once a pairing, among those that completed a hello; the smaller echoes the list. No lane
  carries bytes before. If one direction cannot be dialled, the other is listed.
* The chooser is CONNECTED when it hears the echo; the other when it hears, in a Heartbeat, that its echo was heard. So `open`
  returns when the peer echoed our Ready. No handshake of finite length can do more (two generals), so CONNECTED lives by
  heartbeats that name both stamps: silence for a lease retires, and a heartbeat that is not current is answered Reject.
* Retired is for ever. The stamp is raised at that moment, so whatever the retired endpoint said is old to who hears us next. Until
  its lanes are destroyed (`Released`) no other endpoint begins here; an Open that comes meanwhile will be repeated.
* The deadline belongs to the attempt. A waiter has its own patience and resets nothing.

Everything said is a level, repeated at each `Tick`. Only what shows that the other lacks something is answered at once, so
that no two answers go round. Rejects are never answered. Time: the first tick that meets a deadline starts its clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from interlock.core.endpoint_events import (
    Accept,
    Close,
    Connect,
    DropLanes,
    Event,
    Heartbeat,
    LaneFailed,
    LaneReady,
    Message,
    Open,
    OpenFailed,
    Ready,
    Reject,
    Released,
    Retire,
    Send,
    Superseded,
    Tick,
)
from interlock.core.endpoint_moves import (
    NOTHING,
    Outcome,
    accept,
    answer_stale,
    answered,
    begin,
    close,
    close_later,
    hear,
    kinds,
    lane_failed,
    lane_ready,
    nothing,
    opened,
    refuse,
    refuse_open,
    refuse_remote,
    rejected,
    released,
    retire,
    retire_unwanted,
    say_again,
    stale,
    tick,
    tick_retiring,
    want,
)
from interlock.core.endpoint_state import Endpoint, Phase, Stamp
from interlock.core.limits import (
    LANE_PARAMETERS_BYTES_MAX,
    LANES_PER_ENDPOINT_MAX,
)

_replace = msgspec.structs.replace


class Move(msgspec.Struct, frozen=True):
    """A row's right-hand side: what is done, and the phases it may lead to."""

    does: Callable[[Endpoint, Any], Outcome]
    to: tuple[Phase, ...]


IDLE, CONNECTING, WAIT_READY, CONNECTED, RETIRING, CLOSED = Phase
# fmt: off
TABLE: dict[tuple[Phase, type], Move] = {
    (IDLE, Connect):          Move(begin,           (CONNECTING,)),
    (IDLE, Open):             Move(accept,          (IDLE, WAIT_READY)),
    (IDLE, Accept):           Move(answer_stale,    (IDLE,)),
    (IDLE, Ready):            Move(answer_stale,    (IDLE,)),
    (IDLE, Heartbeat):        Move(answer_stale,    (IDLE,)),
    (IDLE, Reject):           Move(nothing,         (IDLE,)),
    (IDLE, LaneReady):        Move(nothing,         (IDLE,)),
    (IDLE, LaneFailed):       Move(nothing,         (IDLE,)),
    (IDLE, Retire):           Move(nothing,         (IDLE,)),
    (IDLE, Tick):             Move(nothing,         (IDLE,)),
    (IDLE, Close):            Move(close,           (CLOSED,)),
    (CONNECTING, Connect):    Move(want,            (CONNECTING,)),
    (CONNECTING, Open):       Move(accept,          (CONNECTING, WAIT_READY)),
    (CONNECTING, Accept):     Move(answered,        (CONNECTING, WAIT_READY)),
    (CONNECTING, Ready):      Move(answered,        (CONNECTING, WAIT_READY)),
    (CONNECTING, Heartbeat):  Move(answered,        (CONNECTING,)),
    (CONNECTING, Reject):     Move(rejected,        (CONNECTING, RETIRING)),
    (CONNECTING, LaneReady):  Move(nothing,         (CONNECTING,)),
    (CONNECTING, LaneFailed): Move(nothing,         (CONNECTING,)),
    (CONNECTING, Retire):     Move(retire_unwanted, (RETIRING,)),
    (CONNECTING, Tick):       Move(tick,            (CONNECTING, RETIRING)),
    (CONNECTING, Close):      Move(close_later,     (RETIRING,)),
    (WAIT_READY, Connect):    Move(want,            (WAIT_READY,)),
    (WAIT_READY, Open):       Move(say_again,       (WAIT_READY, CONNECTING, IDLE, RETIRING)),
    (WAIT_READY, Accept):     Move(hear,            (WAIT_READY, CONNECTING, IDLE, RETIRING)),
    (WAIT_READY, Ready):      Move(hear,            (WAIT_READY, CONNECTED, CONNECTING, IDLE, RETIRING)),
    (WAIT_READY, Heartbeat):  Move(hear,            (WAIT_READY, CONNECTED, CONNECTING, IDLE, RETIRING)),
    (WAIT_READY, Reject):     Move(rejected,        (WAIT_READY, CONNECTING, IDLE, RETIRING)),
    (WAIT_READY, LaneReady):  Move(lane_ready,      (WAIT_READY,)),
    (WAIT_READY, LaneFailed): Move(lane_failed,     (WAIT_READY, RETIRING)),
    (WAIT_READY, Retire):     Move(retire_unwanted, (RETIRING,)),
    (WAIT_READY, Tick):       Move(tick,            (WAIT_READY, RETIRING)),
    (WAIT_READY, Close):      Move(close_later,     (RETIRING,)),
    (CONNECTED, Connect):     Move(opened,          (CONNECTED,)),
    (CONNECTED, Open):        Move(say_again,       (CONNECTED, RETIRING)),
    (CONNECTED, Accept):      Move(hear,            (CONNECTED, RETIRING)),
    (CONNECTED, Ready):       Move(hear,            (CONNECTED, RETIRING)),
    (CONNECTED, Heartbeat):   Move(hear,            (CONNECTED, RETIRING)),
    (CONNECTED, Reject):      Move(rejected,        (CONNECTED, RETIRING)),
    (CONNECTED, LaneReady):   Move(lane_ready,      (CONNECTED,)),
    (CONNECTED, LaneFailed):  Move(lane_failed,     (CONNECTED, RETIRING)),
    (CONNECTED, Retire):      Move(retire_unwanted, (RETIRING,)),
    (CONNECTED, Tick):        Move(tick,            (CONNECTED, RETIRING)),
    (CONNECTED, Close):       Move(close_later,     (RETIRING,)),
    (RETIRING, Connect):      Move(want,            (RETIRING,)),
    (RETIRING, Open):         Move(nothing,         (RETIRING,)),
    (RETIRING, Accept):       Move(answer_stale,    (RETIRING,)),
    (RETIRING, Ready):        Move(answer_stale,    (RETIRING,)),
    (RETIRING, Heartbeat):    Move(answer_stale,    (RETIRING,)),
    (RETIRING, Reject):       Move(nothing,         (RETIRING,)),
    (RETIRING, LaneReady):    Move(nothing,         (RETIRING,)),
    (RETIRING, LaneFailed):   Move(nothing,         (RETIRING,)),
    (RETIRING, Retire):       Move(nothing,         (RETIRING,)),
    (RETIRING, Tick):         Move(tick_retiring,   (RETIRING,)),
    (RETIRING, Released):     Move(released,        (IDLE, CONNECTING, CLOSED)),
    (RETIRING, Close):        Move(close_later,     (RETIRING,)),
    (CLOSED, Open):           Move(refuse_open,     (CLOSED,)),
    (CLOSED, Accept):         Move(answer_stale,    (CLOSED,)),
    (CLOSED, Ready):          Move(answer_stale,    (CLOSED,)),
    (CLOSED, Heartbeat):      Move(answer_stale,    (CLOSED,)),
    (CLOSED, Reject):         Move(nothing,         (CLOSED,)),
    (CLOSED, LaneReady):      Move(nothing,         (CLOSED,)),
    (CLOSED, LaneFailed):     Move(nothing,         (CLOSED,)),
    (CLOSED, Retire):         Move(nothing,         (CLOSED,)),
    (CLOSED, Tick):           Move(nothing,         (CLOSED,)),
    (CLOSED, Close):          Move(nothing,         (CLOSED,)),
}
# fmt: on
MESSAGES = (Open, Accept, Ready, Heartbeat, Reject)


def transition(state: Endpoint, event: Event) -> Outcome:
    """The endpoint after `event`, and what follows from it.

    Raises `LocalProtocolError` for what no table row allows, `RemoteProtocolError` for what no peer of ours can have said; the
    state is unchanged then.
    """
    effects = NOTHING
    after = state
    if isinstance(event, MESSAGES):
        _check(state, event)
        if event.me < state.known:
            return _too_old(state, event)
        if isinstance(event, Reject) and event.highest.incarnation > state.incarnation:
            return _superseded(state, event.highest)
        after, effects = _learn(state, event)
    move = TABLE.get((after.phase, type(event)))
    if move is None:
        refuse(state, event)
    after, more = move.does(after, event)
    return after, effects + more


def _check(endpoint: Endpoint, event: Message) -> None:
    if event.sender != endpoint.peer:
        refuse_remote(endpoint, event, f"this endpoint is that to {endpoint.peer}")
    if event.me.incarnation < 1 or event.me.attempt < 1:
        refuse_remote(endpoint, event, f"its stamp {event.me} cannot be")
    if not isinstance(event, Reject):
        if len(event.lanes) > LANES_PER_ENDPOINT_MAX or len(kinds(event.lanes)) != len(event.lanes):
            refuse_remote(endpoint, event, f"it offers {len(event.lanes)} lanes, too many or one kind twice")
        if any(len(offer.parameters) > LANE_PARAMETERS_BYTES_MAX for offer in event.lanes):
            refuse_remote(endpoint, event, f"a lane's parameters exceed {LANE_PARAMETERS_BYTES_MAX} bytes")
    if isinstance(event, Open) or endpoint.incarnation != event.echo.incarnation:
        return
    if event.echo.attempt > endpoint.attempt:
        refuse_remote(endpoint, event, f"it answers attempt {event.echo.attempt}, which was not made yet")


def _too_old(endpoint: Endpoint, event: Message) -> Outcome:
    """Of an endpoint that the peer left: nothing in it counts. A life that is over may not know it and is told; an older
    attempt of the same life was left by that life itself, and an answer would find nobody."""
    if isinstance(event, Reject) or event.me.incarnation == endpoint.known.incarnation:
        return endpoint, NOTHING
    return endpoint, (stale(endpoint, event),)


def _learn(endpoint: Endpoint, event: Message) -> Outcome:
    """Whatever it says, it says how far its sender is."""
    is_for_later = endpoint.phase is Phase.RETIRING and isinstance(event, Open)  # It will be repeated.
    if event.me == endpoint.known or is_for_later:
        return endpoint, NOTHING
    learnt = _replace(endpoint, known=event.me)
    if endpoint.chosen:
        return retire(learnt, f"the peer began anew: it is at {event.me}")
    if endpoint.theirs is not None:
        return _unpair(learnt, endpoint.theirs)
    return learnt, NOTHING


def _unpair(endpoint: Endpoint, theirs: Stamp) -> Outcome:
    """The peer left before any lane was listed, so this endpoint may yet pair with its successor. Without this rule two sides
    could make each other begin anew without end, by late Opens."""
    alone = _replace(
        endpoint,
        phase=Phase.CONNECTING if endpoint.is_wanted else Phase.IDLE,
        theirs=None,
        their_offers=(),
        ready=(),
        failed=(),
        expires_s=endpoint.expires_s if endpoint.is_wanted else None,
        choose_s=None,
    )
    said = (Send(Open(alone.name, alone.stamp, alone.offers)),) if endpoint.is_wanted else NOTHING
    return alone, (DropLanes(endpoint.stamp, theirs), *said)


def _superseded(endpoint: Endpoint, highest: Stamp) -> Outcome:
    """The peer knows a newer life of ours. This one is over, here and anywhere."""
    if endpoint.phase is Phase.CLOSED:
        return endpoint, NOTHING
    closed = _replace(endpoint, is_closing=True)
    if endpoint.phase is Phase.IDLE:
        return _replace(endpoint, phase=Phase.CLOSED), (Superseded(highest),)
    if endpoint.phase is Phase.RETIRING:
        failed = (OpenFailed("a newer life of this process is known"),) if endpoint.is_wanted else NOTHING
        return _replace(closed, is_wanted=False, expires_s=None), (Superseded(highest), *failed)
    retiring, effects = retire(closed, "a newer life of this process is known", is_wanted=False)
    return retiring, (Superseded(highest), *effects)

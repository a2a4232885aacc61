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
from typing import Any, NoReturn

import msgspec

from interlock.core.endpoint_events import (
    Accept,
    Close,
    Connect,
    Dial,
    DropLanes,
    Effects,
    Event,
    Heartbeat,
    LaneFailed,
    LaneReady,
    Message,
    Open,
    Opened,
    OpenFailed,
    Ready,
    Reject,
    Released,
    Retire,
    Retired,
    Send,
    Statement,
    Superseded,
    Tick,
)
from interlock.core.endpoint_state import Endpoint, Lane, Offer, Phase, Stamp
from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.limits import (
    ENDPOINT_SILENCE_SECONDS_MAX,
    HANDSHAKE_SECONDS_MAX,
    LANE_PARAMETERS_BYTES_MAX,
    LANE_PATIENCE_SECONDS,
    LANES_PER_ENDPOINT_MAX,
)

Outcome = tuple[Endpoint, Effects]
_NOTHING: Effects = ()
_replace = msgspec.structs.replace

# --- what is said ------------------------------------------------------------------------------------------------


def _statement(endpoint: Endpoint) -> Send:
    """What a paired endpoint has to say, as far as it is."""
    name, me, echo = endpoint.name, endpoint.stamp, endpoint.theirs
    assert echo is not None
    if not endpoint.chosen:
        return Send(Accept(name, me, echo, endpoint.offers))
    if endpoint.phase is Phase.CONNECTED:
        return Send(Heartbeat(name, me, echo, endpoint.offers, endpoint.chosen))
    return Send(Ready(name, me, echo, endpoint.offers, endpoint.chosen))


def _stale(endpoint: Endpoint, event: Message, refusal: str = "") -> Send:
    regarding = None if isinstance(event, Open | Reject) else event.echo
    return Send(Reject(endpoint.name, endpoint.stamp, event.me, regarding, endpoint.known, refusal))


# --- beginning ---------------------------------------------------------------------------------------------------


def _begin(endpoint: Endpoint, _: object = None) -> Outcome:
    begun = _replace(endpoint, phase=Phase.CONNECTING, is_wanted=True, expires_s=None)
    return begun, (Send(Open(endpoint.name, endpoint.stamp, endpoint.offers)),)


def _want(endpoint: Endpoint, _: Connect) -> Outcome:
    return _replace(endpoint, is_wanted=True), _NOTHING


def _opened(endpoint: Endpoint, _: Connect) -> Outcome:
    return endpoint, (_opened_now(endpoint),)


def _opened_now(endpoint: Endpoint) -> Opened:
    assert endpoint.theirs is not None
    return Opened(endpoint.stamp, endpoint.theirs, endpoint.chosen)


def _accept(endpoint: Endpoint, event: Open) -> Outcome:
    """An Open meets an endpoint that is not paired: it is given to the one that is there."""
    if not _kinds(endpoint.offers) & _kinds(event.lanes):
        kinds = ", ".join(sorted(_kinds(endpoint.offers))) or "none"
        return endpoint, (_stale(endpoint, event, f"no kind of lane in common: {endpoint.name} has {kinds}"),)
    paired, effects = _pair(endpoint, event.me, event.lanes)
    return paired, (_statement(paired), *effects)


def _pair(endpoint: Endpoint, theirs: Stamp, offers: tuple[Offer, ...]) -> Outcome:
    expires_s = endpoint.expires_s if endpoint.phase is Phase.CONNECTING else None
    paired = _replace(
        endpoint, phase=Phase.WAIT_READY, theirs=theirs, their_offers=offers, expires_s=expires_s
    )
    parameters = {offer.kind: offer.parameters for offer in offers}
    dials = tuple(
        Dial(lane, parameters[lane.kind], endpoint.stamp, theirs)
        for lane in paired.candidates
        if lane.dialler == endpoint.name
    )
    return paired, dials


def _kinds(offers: tuple[Offer, ...]) -> set[str]:
    return {offer.kind for offer in offers}


def _answered(endpoint: Endpoint, event: Statement) -> Outcome:
    """CONNECTING: somebody answers our Open."""
    if event.echo != endpoint.stamp:
        return endpoint, (_stale(endpoint, event),)
    if not _kinds(endpoint.offers) & _kinds(event.lanes):
        _refuse_remote(endpoint, event, "it accepts without a kind of lane in common")
    paired, dials = _pair(endpoint, event.me, event.lanes)
    heard, effects = _hear(paired, event)
    return heard, (*dials, *(effects or (_statement(heard),)))


# --- agreeing on the lanes ---------------------------------------------------------------------------------------


def _hear(endpoint: Endpoint, event: Statement) -> Outcome:
    """A statement meets a paired endpoint: current, or answered Reject."""
    if event.me != endpoint.theirs or event.echo != endpoint.stamp:
        return endpoint, (_stale(endpoint, event),)
    if endpoint.phase is Phase.CONNECTED:
        endpoint = _replace(endpoint, expires_s=None)
    if isinstance(event, Accept):  # It has no list. If we have one, ours was lost.
        return endpoint, (_statement(endpoint),) if endpoint.chosen else _NOTHING
    if not endpoint.chosen:
        return _obey(endpoint, event)
    if event.chosen != endpoint.chosen:
        _refuse_remote(
            endpoint, event, f"it tells of {_words(event.chosen)}, not of {_words(endpoint.chosen)}"
        )
    if endpoint.phase is Phase.WAIT_READY and (endpoint.is_chooser or isinstance(event, Heartbeat)):
        connected = _replace(endpoint, phase=Phase.CONNECTED, is_wanted=False, expires_s=None)
        said = (_statement(connected),) if endpoint.is_chooser else _NOTHING
        return connected, (_opened_now(connected), *said)
    return endpoint, (_statement(endpoint),) if isinstance(event, Ready) else _NOTHING


def _obey(endpoint: Endpoint, event: Ready | Heartbeat) -> Outcome:
    """The larger name listed the lanes."""
    if endpoint.is_chooser or isinstance(event, Heartbeat):
        _refuse_remote(endpoint, event, "it tells of a list that this side has neither made nor heard")
    if not event.chosen or not set(event.chosen) <= set(endpoint.candidates):
        _refuse_remote(endpoint, event, f"it lists {_words(event.chosen)}, which these two cannot have")
    if set(event.chosen) & set(endpoint.failed):
        return _retire(endpoint, f"the peer listed {_words(event.chosen)}, of which one failed here")
    obeyed = _replace(endpoint, chosen=event.chosen)
    return obeyed, (_statement(obeyed),)


def _lane_ready(endpoint: Endpoint, event: LaneReady) -> Outcome:
    """For the chooser, until it made its list; the driver destroys what was not listed, and what is of a pairing that is over."""
    is_current = event.mine == endpoint.stamp and event.theirs == endpoint.theirs
    if not endpoint.is_chooser or not is_current or endpoint.chosen or event.lane in endpoint.ready:
        return endpoint, _NOTHING
    if event.lane not in endpoint.candidates:
        _refuse(endpoint, event, f": {_words((event.lane,))} is not among what these two can have")
    ready = tuple(sorted((*endpoint.ready, event.lane)))
    failed = tuple(lane for lane in endpoint.failed if lane != event.lane)
    return _choose_if_settled(_replace(endpoint, ready=ready, failed=failed))


def _lane_failed(endpoint: Endpoint, event: LaneFailed) -> Outcome:
    if event.mine != endpoint.stamp or event.theirs != endpoint.theirs or event.lane in endpoint.failed:
        return endpoint, _NOTHING
    if event.lane in endpoint.chosen:
        return _retire(endpoint, f"{_words((event.lane,))} broke: {event.reason}")
    if endpoint.chosen and endpoint.is_chooser:
        return endpoint, _NOTHING
    if event.lane not in endpoint.candidates:
        _refuse(endpoint, event, f": {_words((event.lane,))} is not among what these two can have")
    failed = tuple(sorted((*endpoint.failed, event.lane)))
    ready = tuple(lane for lane in endpoint.ready if lane != event.lane)
    return _choose_if_settled(_replace(endpoint, ready=ready, failed=failed))


def _choose_if_settled(endpoint: Endpoint) -> Outcome:
    is_settled = len(endpoint.ready) + len(endpoint.failed) == len(endpoint.candidates)
    if not endpoint.is_chooser or not is_settled:
        return endpoint, _NOTHING
    return _choose(endpoint) if endpoint.ready else _retire(endpoint, "no lane could be opened")


def _choose(endpoint: Endpoint) -> Outcome:
    chosen = _replace(endpoint, chosen=endpoint.ready)
    return chosen, (_statement(chosen),)


# --- ending ------------------------------------------------------------------------------------------------------


def _retire(endpoint: Endpoint, reason: str, is_wanted: bool | None = None) -> Outcome:
    """Over for good; whoever waits goes on to the next endpoint unless `is_wanted` is False."""
    wanted = endpoint.is_wanted if is_wanted is None else is_wanted
    retired = _replace(
        endpoint,
        phase=Phase.RETIRING,
        attempt=endpoint.attempt + 1,
        theirs=None,
        their_offers=(),
        ready=(),
        failed=(),
        chosen=(),
        is_wanted=wanted,
        expires_s=endpoint.expires_s if wanted else None,
        choose_s=None,
    )
    effects: Effects = (Retired(endpoint.stamp, endpoint.theirs, reason),)
    if endpoint.is_wanted and not wanted:
        effects += (OpenFailed(reason),)
    return retired, effects


def _retire_unwanted(endpoint: Endpoint, event: Retire) -> Outcome:
    return _retire(endpoint, event.reason, is_wanted=False)


def _close_later(endpoint: Endpoint, _: Close) -> Outcome:
    if endpoint.phase is not Phase.RETIRING:
        endpoint, effects = _retire(endpoint, "it was closed", is_wanted=False)
        return _replace(endpoint, is_closing=True), effects
    effects = (OpenFailed("it was closed"),) if endpoint.is_wanted else _NOTHING
    return _replace(endpoint, is_closing=True, is_wanted=False, expires_s=None), effects


def _close(endpoint: Endpoint, _: Close) -> Outcome:
    return _replace(endpoint, phase=Phase.CLOSED), _NOTHING


def _released(endpoint: Endpoint, _: Released) -> Outcome:
    if endpoint.is_closing:
        return _replace(endpoint, phase=Phase.CLOSED), _NOTHING
    if endpoint.is_wanted:
        begun, effects = _begin(endpoint)
        return _replace(begun, expires_s=endpoint.expires_s), effects
    return _replace(endpoint, phase=Phase.IDLE, expires_s=None), _NOTHING


def _rejected(endpoint: Endpoint, event: Reject) -> Outcome:
    """The peer is not in this pair, and never will be; or it refuses our Open."""
    is_unpaired = endpoint.phase is Phase.CONNECTING
    if event.echo != endpoint.stamp or event.regarding != endpoint.theirs:
        return endpoint, _NOTHING
    if is_unpaired and not event.refusal:
        return endpoint, _NOTHING
    return _retire(
        endpoint, event.refusal or "the peer is not in this pair", is_wanted=False if event.refusal else None
    )


# --- time --------------------------------------------------------------------------------------------------------


def _tick(endpoint: Endpoint, event: Tick) -> Outcome:
    is_connected = endpoint.phase is Phase.CONNECTED
    if endpoint.expires_s is None:
        seconds = ENDPOINT_SILENCE_SECONDS_MAX if is_connected else HANDSHAKE_SECONDS_MAX
        endpoint = _replace(endpoint, expires_s=event.now_s + seconds)
    elif event.now_s >= endpoint.expires_s:
        return _retire(
            endpoint, "the peer fell silent" if is_connected else "it took too long", is_wanted=False
        )
    if endpoint.is_chooser and endpoint.ready and not endpoint.chosen:
        if endpoint.choose_s is None:
            endpoint = _replace(endpoint, choose_s=event.now_s + LANE_PATIENCE_SECONDS)
        elif event.now_s >= endpoint.choose_s:
            return _choose(endpoint)
    if endpoint.theirs is None:
        return endpoint, (Send(Open(endpoint.name, endpoint.stamp, endpoint.offers)),)
    return endpoint, (_statement(endpoint),)


def _tick_retiring(endpoint: Endpoint, event: Tick) -> Outcome:
    """Lanes take what they take to be destroyed; who waits for the next endpoint waits no longer than its deadline."""
    if not endpoint.is_wanted:
        return endpoint, _NOTHING
    if endpoint.expires_s is None:
        return _replace(endpoint, expires_s=event.now_s + HANDSHAKE_SECONDS_MAX), _NOTHING
    if event.now_s < endpoint.expires_s:
        return endpoint, _NOTHING
    late = OpenFailed("the lanes of the endpoint before it were not destroyed in time")
    return _replace(endpoint, is_wanted=False, expires_s=None), (late,)


# --- small ones --------------------------------------------------------------------------------------------------


def _nothing(endpoint: Endpoint, _: object) -> Outcome:
    return endpoint, _NOTHING


def _answer_stale(endpoint: Endpoint, event: Statement) -> Outcome:
    return endpoint, (_stale(endpoint, event),)


def _say_again(endpoint: Endpoint, _: Open) -> Outcome:
    """The peer's endpoint is ours already: its Open was repeated, so it may lack our answer."""
    return endpoint, (_statement(endpoint),)


def _refuse_open(endpoint: Endpoint, event: Open) -> Outcome:
    return endpoint, (_stale(endpoint, event, f"{endpoint.name} is closed"),)


def _words(lanes: tuple[Lane, ...]) -> str:
    return "lanes " + (", ".join(f"{lane.kind} dialled by {lane.dialler}" for lane in lanes) or "none")


def _refuse(endpoint: Endpoint, event: object, why: str = "") -> NoReturn:
    raise LocalProtocolError(
        f"the endpoint to {endpoint.peer} is {endpoint.phase} and {type(event).__name__} is not possible{why}",
        peer=endpoint.peer,
        attempt=endpoint.attempt,
        state=str(endpoint.phase),
        event=type(event).__name__,
    )


def _refuse_remote(endpoint: Endpoint, event: Message, why: str) -> NoReturn:
    raise RemoteProtocolError(
        f"{type(event).__name__} from {event.sender} is refused: {why}",
        peer=endpoint.peer,
        incarnation=event.me.incarnation,
        attempt=event.me.attempt,
        state=str(endpoint.phase),
    )


class Move(msgspec.Struct, frozen=True):
    """A row's right-hand side: what is done, and the phases it may lead to."""

    does: Callable[[Endpoint, Any], Outcome]
    to: tuple[Phase, ...]


IDLE, CONNECTING, WAIT_READY, CONNECTED, RETIRING, CLOSED = Phase
# fmt: off
TABLE: dict[tuple[Phase, type], Move] = {
    (IDLE, Connect):          Move(_begin,           (CONNECTING,)),
    (IDLE, Open):             Move(_accept,          (IDLE, WAIT_READY)),
    (IDLE, Accept):           Move(_answer_stale,    (IDLE,)),
    (IDLE, Ready):            Move(_answer_stale,    (IDLE,)),
    (IDLE, Heartbeat):        Move(_answer_stale,    (IDLE,)),
    (IDLE, Reject):           Move(_nothing,         (IDLE,)),
    (IDLE, LaneReady):        Move(_nothing,         (IDLE,)),
    (IDLE, LaneFailed):       Move(_nothing,         (IDLE,)),
    (IDLE, Retire):           Move(_nothing,         (IDLE,)),
    (IDLE, Tick):             Move(_nothing,         (IDLE,)),
    (IDLE, Close):            Move(_close,           (CLOSED,)),
    (CONNECTING, Connect):    Move(_want,            (CONNECTING,)),
    (CONNECTING, Open):       Move(_accept,          (CONNECTING, WAIT_READY)),
    (CONNECTING, Accept):     Move(_answered,        (CONNECTING, WAIT_READY)),
    (CONNECTING, Ready):      Move(_answered,        (CONNECTING, WAIT_READY)),
    (CONNECTING, Heartbeat):  Move(_answered,        (CONNECTING,)),
    (CONNECTING, Reject):     Move(_rejected,        (CONNECTING, RETIRING)),
    (CONNECTING, LaneReady):  Move(_nothing,         (CONNECTING,)),
    (CONNECTING, LaneFailed): Move(_nothing,         (CONNECTING,)),
    (CONNECTING, Retire):     Move(_retire_unwanted, (RETIRING,)),
    (CONNECTING, Tick):       Move(_tick,            (CONNECTING, RETIRING)),
    (CONNECTING, Close):      Move(_close_later,     (RETIRING,)),
    (WAIT_READY, Connect):    Move(_want,            (WAIT_READY,)),
    (WAIT_READY, Open):       Move(_say_again,       (WAIT_READY, CONNECTING, IDLE, RETIRING)),
    (WAIT_READY, Accept):     Move(_hear,            (WAIT_READY, CONNECTING, IDLE, RETIRING)),
    (WAIT_READY, Ready):      Move(_hear,            (WAIT_READY, CONNECTED, CONNECTING, IDLE, RETIRING)),
    (WAIT_READY, Heartbeat):  Move(_hear,            (WAIT_READY, CONNECTED, CONNECTING, IDLE, RETIRING)),
    (WAIT_READY, Reject):     Move(_rejected,        (WAIT_READY, CONNECTING, IDLE, RETIRING)),
    (WAIT_READY, LaneReady):  Move(_lane_ready,      (WAIT_READY,)),
    (WAIT_READY, LaneFailed): Move(_lane_failed,     (WAIT_READY, RETIRING)),
    (WAIT_READY, Retire):     Move(_retire_unwanted, (RETIRING,)),
    (WAIT_READY, Tick):       Move(_tick,            (WAIT_READY, RETIRING)),
    (WAIT_READY, Close):      Move(_close_later,     (RETIRING,)),
    (CONNECTED, Connect):     Move(_opened,          (CONNECTED,)),
    (CONNECTED, Open):        Move(_say_again,       (CONNECTED, RETIRING)),
    (CONNECTED, Accept):      Move(_hear,            (CONNECTED, RETIRING)),
    (CONNECTED, Ready):       Move(_hear,            (CONNECTED, RETIRING)),
    (CONNECTED, Heartbeat):   Move(_hear,            (CONNECTED, RETIRING)),
    (CONNECTED, Reject):      Move(_rejected,        (CONNECTED, RETIRING)),
    (CONNECTED, LaneReady):   Move(_lane_ready,      (CONNECTED,)),
    (CONNECTED, LaneFailed):  Move(_lane_failed,     (CONNECTED, RETIRING)),
    (CONNECTED, Retire):      Move(_retire_unwanted, (RETIRING,)),
    (CONNECTED, Tick):        Move(_tick,            (CONNECTED, RETIRING)),
    (CONNECTED, Close):       Move(_close_later,     (RETIRING,)),
    (RETIRING, Connect):      Move(_want,            (RETIRING,)),
    (RETIRING, Open):         Move(_nothing,         (RETIRING,)),
    (RETIRING, Accept):       Move(_answer_stale,    (RETIRING,)),
    (RETIRING, Ready):        Move(_answer_stale,    (RETIRING,)),
    (RETIRING, Heartbeat):    Move(_answer_stale,    (RETIRING,)),
    (RETIRING, Reject):       Move(_nothing,         (RETIRING,)),
    (RETIRING, LaneReady):    Move(_nothing,         (RETIRING,)),
    (RETIRING, LaneFailed):   Move(_nothing,         (RETIRING,)),
    (RETIRING, Retire):       Move(_nothing,         (RETIRING,)),
    (RETIRING, Tick):         Move(_tick_retiring,   (RETIRING,)),
    (RETIRING, Released):     Move(_released,        (IDLE, CONNECTING, CLOSED)),
    (RETIRING, Close):        Move(_close_later,     (RETIRING,)),
    (CLOSED, Open):           Move(_refuse_open,     (CLOSED,)),
    (CLOSED, Accept):         Move(_answer_stale,    (CLOSED,)),
    (CLOSED, Ready):          Move(_answer_stale,    (CLOSED,)),
    (CLOSED, Heartbeat):      Move(_answer_stale,    (CLOSED,)),
    (CLOSED, Reject):         Move(_nothing,         (CLOSED,)),
    (CLOSED, LaneReady):      Move(_nothing,         (CLOSED,)),
    (CLOSED, LaneFailed):     Move(_nothing,         (CLOSED,)),
    (CLOSED, Retire):         Move(_nothing,         (CLOSED,)),
    (CLOSED, Tick):           Move(_nothing,         (CLOSED,)),
    (CLOSED, Close):          Move(_nothing,         (CLOSED,)),
}
# fmt: on
MESSAGES = (Open, Accept, Ready, Heartbeat, Reject)


def transition(state: Endpoint, event: Event) -> Outcome:
    """The endpoint after `event`, and what follows from it.

    Raises `LocalProtocolError` for what no table row allows, `RemoteProtocolError` for what no peer of ours can have said; the
    state is unchanged then.
    """
    effects = _NOTHING
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
        _refuse(state, event)
    after, more = move.does(after, event)
    return after, effects + more


def _check(endpoint: Endpoint, event: Message) -> None:
    if event.sender != endpoint.peer:
        _refuse_remote(endpoint, event, f"this endpoint is that to {endpoint.peer}")
    if event.me.incarnation < 1 or event.me.attempt < 1:
        _refuse_remote(endpoint, event, f"its stamp {event.me} cannot be")
    if not isinstance(event, Reject):
        if len(event.lanes) > LANES_PER_ENDPOINT_MAX or len(_kinds(event.lanes)) != len(event.lanes):
            _refuse_remote(endpoint, event, f"it offers {len(event.lanes)} lanes, too many or one kind twice")
        if any(len(offer.parameters) > LANE_PARAMETERS_BYTES_MAX for offer in event.lanes):
            _refuse_remote(endpoint, event, f"a lane's parameters exceed {LANE_PARAMETERS_BYTES_MAX} bytes")
    if isinstance(event, Open) or endpoint.incarnation != event.echo.incarnation:
        return
    if event.echo.attempt > endpoint.attempt:
        _refuse_remote(endpoint, event, f"it answers attempt {event.echo.attempt}, which was not made yet")


def _too_old(endpoint: Endpoint, event: Message) -> Outcome:
    """Of an endpoint that the peer left: nothing in it counts. A life that is over may not know it and is told; an older
    attempt of the same life was left by that life itself, and an answer would find nobody."""
    if isinstance(event, Reject) or event.me.incarnation == endpoint.known.incarnation:
        return endpoint, _NOTHING
    return endpoint, (_stale(endpoint, event),)


def _learn(endpoint: Endpoint, event: Message) -> Outcome:
    """Whatever it says, it says how far its sender is."""
    is_for_later = endpoint.phase is Phase.RETIRING and isinstance(event, Open)  # It will be repeated.
    if event.me == endpoint.known or is_for_later:
        return endpoint, _NOTHING
    learnt = _replace(endpoint, known=event.me)
    if endpoint.chosen:
        return _retire(learnt, f"the peer began anew: it is at {event.me}")
    if endpoint.theirs is not None:
        return _unpair(learnt, endpoint.theirs)
    return learnt, _NOTHING


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
    said = (Send(Open(alone.name, alone.stamp, alone.offers)),) if endpoint.is_wanted else _NOTHING
    return alone, (DropLanes(endpoint.stamp, theirs), *said)


def _superseded(endpoint: Endpoint, highest: Stamp) -> Outcome:
    """The peer knows a newer life of ours. This one is over, here and anywhere."""
    if endpoint.phase is Phase.CLOSED:
        return endpoint, _NOTHING
    closed = _replace(endpoint, is_closing=True)
    if endpoint.phase is Phase.IDLE:
        return _replace(endpoint, phase=Phase.CLOSED), (Superseded(highest),)
    if endpoint.phase is Phase.RETIRING:
        failed = (OpenFailed("a newer life of this process is known"),) if endpoint.is_wanted else _NOTHING
        return _replace(closed, is_wanted=False, expires_s=None), (Superseded(highest), *failed)
    retiring, effects = _retire(closed, "a newer life of this process is known", is_wanted=False)
    return retiring, (Superseded(highest), *effects)

"""What each row of the table in core/endpoints does: pairing, agreeing on the lanes, ending, time.

Each takes an endpoint and an event that its phase allows, and returns the endpoint after it and what follows.
"""

from __future__ import annotations

from typing import NoReturn

import msgspec

from interlock.core.endpoint_events import (
    Accept,
    Close,
    Connect,
    Dial,
    Effects,
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
    Tick,
)
from interlock.core.endpoint_state import Endpoint, Lane, Offer, Phase, Stamp
from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.limits import (
    ENDPOINT_SILENCE_SECONDS_MAX,
    HANDSHAKE_SECONDS_MAX,
    LANE_PATIENCE_SECONDS,
)

Outcome = tuple[Endpoint, Effects]
TOOK_TOO_LONG = "it took too long"
"""Why an attempt ends that nobody refused: whoever is still waiting may begin another."""
NOTHING: Effects = ()
_replace = msgspec.structs.replace

# --- what is said ------------------------------------------------------------------------------------------------


def statement(endpoint: Endpoint) -> Send:
    """What a paired endpoint has to say, as far as it is."""
    name, me, echo = endpoint.name, endpoint.stamp, endpoint.theirs
    assert echo is not None
    if not endpoint.chosen:
        return Send(Accept(name, me, echo, endpoint.offers))
    if endpoint.phase is Phase.CONNECTED:
        return Send(Heartbeat(name, me, echo, endpoint.offers, endpoint.chosen))
    return Send(Ready(name, me, echo, endpoint.offers, endpoint.chosen))


def stale(endpoint: Endpoint, event: Message, refusal: str = "") -> Send:
    """The answer to what belongs to no pair of ours: how far this side is and knows the peer to be."""
    regarding = None if isinstance(event, Open | Reject) else event.echo
    return Send(Reject(endpoint.name, endpoint.stamp, event.me, regarding, endpoint.known, refusal))


# --- beginning ---------------------------------------------------------------------------------------------------


def begin(endpoint: Endpoint, _: object = None) -> Outcome:
    """Somebody wants a connection: say Open, until it is answered."""
    begun = _replace(endpoint, phase=Phase.CONNECTING, is_wanted=True, expires_s=None)
    return begun, (Send(Open(endpoint.name, endpoint.stamp, endpoint.offers)),)


def want(endpoint: Endpoint, _: Connect) -> Outcome:
    """One more who wants it; it is under way."""
    return _replace(endpoint, is_wanted=True), NOTHING


def opened(endpoint: Endpoint, _: Connect) -> Outcome:
    """It is there already."""
    return endpoint, (opened_now(endpoint),)


def opened_now(endpoint: Endpoint) -> Opened:
    """What whoever asked for a connection is told."""
    assert endpoint.theirs is not None
    return Opened(endpoint.stamp, endpoint.theirs, endpoint.chosen)


def accept(endpoint: Endpoint, event: Open) -> Outcome:
    """An Open meets an endpoint that is not paired: it is given to the one that is there."""
    if not kinds(endpoint.offers) & kinds(event.lanes):
        ours = ", ".join(sorted(kinds(endpoint.offers))) or "none"
        return endpoint, (stale(endpoint, event, f"no kind of lane in common: {endpoint.name} has {ours}"),)
    paired, effects = pair(endpoint, event.me, event.lanes)
    return paired, (statement(paired), *effects)


def pair(endpoint: Endpoint, theirs: Stamp, offers: tuple[Offer, ...]) -> Outcome:
    """From here on this endpoint means one endpoint of the peer; the lanes that are ours to dial are dialled."""
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


def kinds(offers: tuple[Offer, ...]) -> set[str]:
    """The kinds of lane among `offers`."""
    return {offer.kind for offer in offers}


def answered(endpoint: Endpoint, event: Statement) -> Outcome:
    """CONNECTING: somebody answers our Open."""
    if event.echo != endpoint.stamp:
        return endpoint, (stale(endpoint, event),)
    if not kinds(endpoint.offers) & kinds(event.lanes):
        refuse_remote(endpoint, event, "it accepts without a kind of lane in common")
    paired, dials = pair(endpoint, event.me, event.lanes)
    heard, effects = hear(paired, event)
    return heard, (*dials, *(effects or (statement(heard),)))


# --- agreeing on the lanes ---------------------------------------------------------------------------------------


def hear(endpoint: Endpoint, event: Statement) -> Outcome:
    """A statement meets a paired endpoint: current, or answered Reject."""
    if event.me != endpoint.theirs or event.echo != endpoint.stamp:
        return endpoint, (stale(endpoint, event),)
    if endpoint.phase is Phase.CONNECTED:
        endpoint = _replace(endpoint, expires_s=None)
    if isinstance(event, Accept):  # It has no list. If we have one, ours was lost.
        return endpoint, (statement(endpoint),) if endpoint.chosen else NOTHING
    if not endpoint.chosen:
        return obey(endpoint, event)
    if event.chosen != endpoint.chosen:
        refuse_remote(endpoint, event, f"it tells of {words(event.chosen)}, not of {words(endpoint.chosen)}")
    if endpoint.phase is Phase.WAIT_READY and (endpoint.is_chooser or isinstance(event, Heartbeat)):
        connected = _replace(endpoint, phase=Phase.CONNECTED, is_wanted=False, expires_s=None)
        said = (statement(connected),) if endpoint.is_chooser else NOTHING
        return connected, (opened_now(connected), *said)
    return endpoint, (statement(endpoint),) if isinstance(event, Ready) else NOTHING


def obey(endpoint: Endpoint, event: Ready | Heartbeat) -> Outcome:
    """The larger name listed the lanes."""
    if endpoint.is_chooser or isinstance(event, Heartbeat):
        refuse_remote(endpoint, event, "it tells of a list that this side has neither made nor heard")
    if not event.chosen or not set(event.chosen) <= set(endpoint.candidates):
        refuse_remote(endpoint, event, f"it lists {words(event.chosen)}, which these two cannot have")
    if set(event.chosen) & set(endpoint.failed):
        return retire(endpoint, f"the peer listed {words(event.chosen)}, of which one failed here")
    obeyed = _replace(endpoint, chosen=event.chosen)
    return obeyed, (statement(obeyed),)


def lane_ready(endpoint: Endpoint, event: LaneReady) -> Outcome:
    """For the chooser, until it made its list; the driver destroys what was not listed, and what is of a pairing that is over."""
    is_current = event.mine == endpoint.stamp and event.theirs == endpoint.theirs
    if not endpoint.is_chooser or not is_current or endpoint.chosen or event.lane in endpoint.ready:
        return endpoint, NOTHING
    if event.lane not in endpoint.candidates:
        refuse(endpoint, event, f": {words((event.lane,))} is not among what these two can have")
    ready = tuple(sorted((*endpoint.ready, event.lane)))
    failed = tuple(lane for lane in endpoint.failed if lane != event.lane)
    return choose_if_settled(_replace(endpoint, ready=ready, failed=failed))


def lane_failed(endpoint: Endpoint, event: LaneFailed) -> Outcome:
    """A listed lane retires the endpoint; one not listed yet is not going to be."""
    if event.mine != endpoint.stamp or event.theirs != endpoint.theirs or event.lane in endpoint.failed:
        return endpoint, NOTHING
    if event.lane in endpoint.chosen:
        return retire(endpoint, f"{words((event.lane,))} broke: {event.reason}")
    if endpoint.chosen and endpoint.is_chooser:
        return endpoint, NOTHING
    if event.lane not in endpoint.candidates:
        refuse(endpoint, event, f": {words((event.lane,))} is not among what these two can have")
    failed = tuple(sorted((*endpoint.failed, event.lane)))
    ready = tuple(lane for lane in endpoint.ready if lane != event.lane)
    return choose_if_settled(_replace(endpoint, ready=ready, failed=failed))


def choose_if_settled(endpoint: Endpoint) -> Outcome:
    """The list is made once every lane that can be has come or failed."""
    is_settled = len(endpoint.ready) + len(endpoint.failed) == len(endpoint.candidates)
    if not endpoint.is_chooser or not is_settled:
        return endpoint, NOTHING
    return choose(endpoint) if endpoint.ready else retire(endpoint, "no lane could be opened")


def choose(endpoint: Endpoint) -> Outcome:
    """The list: what is ready now."""
    chosen = _replace(endpoint, chosen=endpoint.ready)
    return chosen, (statement(chosen),)


# --- ending ------------------------------------------------------------------------------------------------------


def retire(endpoint: Endpoint, reason: str, is_wanted: bool | None = None) -> Outcome:
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


def retire_unwanted(endpoint: Endpoint, event: Retire) -> Outcome:
    """Its owner no longer needs it."""
    return retire(endpoint, event.reason, is_wanted=False)


def close_later(endpoint: Endpoint, _: Close) -> Outcome:
    """Closed when its lanes are destroyed."""
    if endpoint.phase is not Phase.RETIRING:
        endpoint, effects = retire(endpoint, "it was closed", is_wanted=False)
        return _replace(endpoint, is_closing=True), effects
    effects = (OpenFailed("it was closed"),) if endpoint.is_wanted else NOTHING
    return _replace(endpoint, is_closing=True, is_wanted=False, expires_s=None), effects


def close(endpoint: Endpoint, _: Close) -> Outcome:
    """Nothing to destroy: closed now."""
    return _replace(endpoint, phase=Phase.CLOSED), NOTHING


def released(endpoint: Endpoint, _: Released) -> Outcome:
    """The lanes are destroyed: closed, begun again for whoever still waits, or idle."""
    if endpoint.is_closing:
        return _replace(endpoint, phase=Phase.CLOSED), NOTHING
    if endpoint.is_wanted:
        begun, effects = begin(endpoint)
        return _replace(begun, expires_s=endpoint.expires_s), effects
    return _replace(endpoint, phase=Phase.IDLE, expires_s=None), NOTHING


def rejected(endpoint: Endpoint, event: Reject) -> Outcome:
    """The peer is not in this pair, and never will be; or it refuses our Open."""
    is_unpaired = endpoint.phase is Phase.CONNECTING
    if event.echo != endpoint.stamp or event.regarding != endpoint.theirs:
        return endpoint, NOTHING
    if is_unpaired and not event.refusal:
        return endpoint, NOTHING
    return retire(
        endpoint, event.refusal or "the peer is not in this pair", is_wanted=False if event.refusal else None
    )


# --- time --------------------------------------------------------------------------------------------------------


def tick(endpoint: Endpoint, event: Tick) -> Outcome:
    """Deadlines, and what this side has to say, said again."""
    is_connected = endpoint.phase is Phase.CONNECTED
    if endpoint.expires_s is None:
        seconds = ENDPOINT_SILENCE_SECONDS_MAX if is_connected else HANDSHAKE_SECONDS_MAX
        endpoint = _replace(endpoint, expires_s=event.now_s + seconds)
    elif event.now_s >= endpoint.expires_s:
        return retire(endpoint, "the peer fell silent" if is_connected else TOOK_TOO_LONG, is_wanted=False)
    if endpoint.is_chooser and endpoint.ready and not endpoint.chosen:
        if endpoint.choose_s is None:
            endpoint = _replace(endpoint, choose_s=event.now_s + LANE_PATIENCE_SECONDS)
        elif event.now_s >= endpoint.choose_s:
            return choose(endpoint)
    if endpoint.theirs is None:
        return endpoint, (Send(Open(endpoint.name, endpoint.stamp, endpoint.offers)),)
    return endpoint, (statement(endpoint),)


def tick_retiring(endpoint: Endpoint, event: Tick) -> Outcome:
    """Lanes take what they take to be destroyed; who waits for the next endpoint waits no longer than its deadline."""
    if not endpoint.is_wanted:
        return endpoint, NOTHING
    if endpoint.expires_s is None:
        return _replace(endpoint, expires_s=event.now_s + HANDSHAKE_SECONDS_MAX), NOTHING
    if event.now_s < endpoint.expires_s:
        return endpoint, NOTHING
    late = OpenFailed("the lanes of the endpoint before it were not destroyed in time")
    return _replace(endpoint, is_wanted=False, expires_s=None), (late,)


# --- small ones --------------------------------------------------------------------------------------------------


def nothing(endpoint: Endpoint, _: object) -> Outcome:
    """It changes nothing here."""
    return endpoint, NOTHING


def answer_stale(endpoint: Endpoint, event: Statement) -> Outcome:
    """A statement about a pair that is over."""
    return endpoint, (stale(endpoint, event),)


def say_again(endpoint: Endpoint, _: Open) -> Outcome:
    """The peer's endpoint is ours already: its Open was repeated, so it may lack our answer."""
    return endpoint, (statement(endpoint),)


def refuse_open(endpoint: Endpoint, event: Open) -> Outcome:
    """Closed: nobody is connected here any more."""
    return endpoint, (stale(endpoint, event, f"{endpoint.name} is closed"),)


def words(lanes: tuple[Lane, ...]) -> str:
    """Lanes, for an operator."""
    return "lanes " + (", ".join(f"{lane.kind} dialled by {lane.dialler}" for lane in lanes) or "none")


def refuse(endpoint: Endpoint, event: object, why: str = "") -> NoReturn:
    """Our own driver did what its phase does not allow."""
    raise LocalProtocolError(
        f"the endpoint to {endpoint.peer} is {endpoint.phase} and {type(event).__name__} is not possible{why}",
        peer=endpoint.peer,
        attempt=endpoint.attempt,
        state=str(endpoint.phase),
        event=type(event).__name__,
    )


def refuse_remote(endpoint: Endpoint, event: Message, why: str) -> NoReturn:
    """The peer said what no peer of ours can have said."""
    raise RemoteProtocolError(
        f"{type(event).__name__} from {event.sender} is refused: {why}",
        peer=endpoint.peer,
        incarnation=event.me.incarnation,
        attempt=event.me.attempt,
        state=str(endpoint.phase),
    )

"""One endpoint: whatever comes late, it is connected to the peer's endpoint of now over the list both have, or to nobody."""

import itertools
import timeit
from collections.abc import Callable, Sequence

import msgspec
import pytest

from interlock.core.endpoint_events import (
    Accept,
    Close,
    Connect,
    Dial,
    DropLanes,
    Effect,
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
    Superseded,
    Tick,
)
from interlock.core.endpoint_state import NOBODY, Endpoint, Lane, Offer, Phase, Stamp
from interlock.core.endpoints import MESSAGES, TABLE, transition
from interlock.core.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from interlock.core.limits import (
    ENDPOINT_SILENCE_SECONDS_MAX,
    HANDSHAKE_SECONDS_MAX,
    LANE_PARAMETERS_BYTES_MAX,
    LANE_PATIENCE_SECONDS,
    LANES_PER_ENDPOINT_MAX,
)

TCP = (Offer("tcp", b"address"),)
A_DIALS, B_DIALS = Lane("tcp", "a"), Lane("tcp", "b")
MINE, THEIRS, NEXT, NEWER = Stamp(5, 1), Stamp(8, 1), Stamp(5, 2), Stamp(8, 2)
BOTH = (A_DIALS, B_DIALS)


def small() -> Endpoint:
    """Endpoint of a, the smaller name."""
    return Endpoint("a", "b", 5, TCP)


def large() -> Endpoint:
    """Endpoint of b, seen as ours: the chooser. Its peer a has THEIRS, it has MINE, so that stamps read alike in both."""
    return Endpoint("b", "a", 5, TCP)


def told(*events: Event, at: Endpoint) -> tuple[Endpoint, list[Effect]]:
    """The endpoint after all events, and what followed from the last."""
    effects: tuple[Effect, ...] = ()
    for event in events:
        at, effects = transition(at, event)
    return at, list(effects)


def opening(endpoint: Endpoint, me: Stamp = THEIRS, lanes: tuple[Offer, ...] = TCP) -> Open:
    return Open(endpoint.peer, me, lanes)


def accept(endpoint: Endpoint, echo: Stamp = MINE, me: Stamp = THEIRS) -> Accept:
    return Accept(endpoint.peer, me, echo, TCP)


def ready(
    endpoint: Endpoint, chosen: tuple[Lane, ...] = BOTH, me: Stamp = THEIRS, echo: Stamp = MINE
) -> Ready:
    return Ready(endpoint.peer, me, echo, TCP, chosen)


def beat(
    endpoint: Endpoint, chosen: tuple[Lane, ...] = BOTH, me: Stamp = THEIRS, echo: Stamp = MINE
) -> Heartbeat:
    return Heartbeat(endpoint.peer, me, echo, TCP, chosen)


def reject(
    endpoint: Endpoint, regarding: Stamp | None = THEIRS, me: Stamp = THEIRS, refusal: str = ""
) -> Reject:
    return Reject(endpoint.peer, me, MINE, regarding, MINE, refusal)


def up(lane: Lane, mine: Stamp = MINE, theirs: Stamp = THEIRS) -> LaneReady:
    return LaneReady(lane, mine, theirs)


def down(lane: Lane, mine: Stamp = MINE, theirs: Stamp = THEIRS) -> LaneFailed:
    return LaneFailed(lane, mine, theirs, "reset")


def in_phase(phase: Phase, endpoint: Endpoint) -> Endpoint:
    connected: Sequence[Event] = (
        [up(A_DIALS), up(B_DIALS), ready(endpoint)]
        if endpoint.is_chooser
        else [ready(endpoint), beat(endpoint)]
    )
    ways: dict[Phase, Sequence[Event]] = {
        Phase.IDLE: [],
        Phase.CONNECTING: [Connect()],
        Phase.WAIT_READY: [opening(endpoint)],
        Phase.CONNECTED: [opening(endpoint), *connected],
        Phase.RETIRING: [opening(endpoint), Retire("idle")],
        Phase.CLOSED: [Close()],
    }
    reached, _ = told(*ways[phase], at=endpoint)
    assert reached.phase is phase
    return reached


def run(
    one: Endpoint, two: Endpoint, effects: list[tuple[Endpoint, Effect]]
) -> tuple[Endpoint, Endpoint, list[Effect]]:
    """Delivers everything once, dials every lane; returns both and what was opened."""
    ends = {one.name: one, two.name: two}
    opened: list[Effect] = []
    while effects:
        teller, effect = effects.pop(0)
        events: list[tuple[str, Event]] = []
        if isinstance(effect, Send):
            events = [(teller.peer, effect.message)]
        elif isinstance(effect, Dial):
            events = [
                (teller.name, LaneReady(effect.lane, effect.mine, effect.theirs)),
                (teller.peer, LaneReady(effect.lane, effect.theirs, effect.mine)),
            ]
        elif isinstance(effect, Opened):
            opened.append(effect)
        for name, event in events:
            ends[name], more = transition(ends[name], event)
            effects += [(ends[name], each) for each in more]
    return ends[one.name], ends[two.name], opened


# --- becoming connected ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("openers", ["a", "b", "ab"])
def test_whoever_opens_both_end_in_one_connection_over_one_list(openers: str) -> None:
    ends = {"a": Endpoint("a", "b", 5, TCP), "b": Endpoint("b", "a", 8, TCP)}
    effects: list[tuple[Endpoint, Effect]] = []
    for name in openers:
        ends[name], said = transition(ends[name], Connect())
        effects += [(ends[name], effect) for effect in said]
    one, two, opened = run(ends["a"], ends["b"], effects)
    assert one.phase is two.phase is Phase.CONNECTED
    assert (one.theirs, two.theirs) == (two.stamp, one.stamp)
    assert one.chosen == two.chosen == BOTH
    assert opened == [Opened(two.stamp, one.stamp, BOTH), Opened(one.stamp, two.stamp, BOTH)]


def test_an_open_that_meets_connecting_is_given_to_the_endpoint_that_is_there() -> None:
    waiting, effects = told(Connect(), opening(small()), at=small())
    assert waiting.stamp == MINE
    assert effects == [
        Send(Accept("a", MINE, THEIRS, TCP)),
        Dial(A_DIALS, b"address", MINE, THEIRS),
    ]


def test_an_answer_to_our_open_pairs_and_is_answered() -> None:
    waiting, effects = told(Connect(), accept(small()), at=small())
    assert waiting.theirs == THEIRS
    assert effects == [Dial(A_DIALS, b"address", MINE, THEIRS), Send(Accept("a", MINE, THEIRS, TCP))]


def test_a_list_may_be_the_first_that_is_heard_of_the_peer() -> None:
    waiting, effects = told(Connect(), ready(small()), at=small())
    assert waiting.chosen == BOTH
    assert effects[-1] == Send(Ready("a", MINE, THEIRS, TCP, BOTH))


def test_the_chooser_is_connected_by_the_echo_and_the_other_by_hearing_that_its_echo_was_heard() -> None:
    chooser, effects = told(opening(large()), up(A_DIALS), up(B_DIALS), at=large())
    assert effects == [Send(Ready("b", MINE, THEIRS, TCP, BOTH))]
    assert chooser.phase is Phase.WAIT_READY
    connected, effects = told(ready(large()), at=chooser)
    assert effects == [Opened(MINE, THEIRS, BOTH), Send(Heartbeat("b", MINE, THEIRS, TCP, BOTH))]
    assert connected.phase is Phase.CONNECTED
    obeying, effects = told(opening(small()), ready(small()), at=small())
    assert effects == [Send(Ready("a", MINE, THEIRS, TCP, BOTH))]
    assert told(ready(small()), at=obeying) == (obeying, effects)
    connected, effects = told(beat(small()), at=obeying)
    assert effects == [Opened(MINE, THEIRS, BOTH)]
    assert connected.phase is Phase.CONNECTED


def test_many_may_wait_for_one_handshake_and_who_comes_later_finds_it_open() -> None:
    connecting = in_phase(Phase.CONNECTING, small())
    assert told(Connect(), at=connecting) == (connecting, [])
    passive, effects = told(Connect(), at=in_phase(Phase.WAIT_READY, small()))
    assert (passive.is_wanted, effects) == (True, [])
    connected = in_phase(Phase.CONNECTED, small())
    assert told(Connect(), at=connected) == (connected, [Opened(MINE, THEIRS, BOTH)])


def test_what_shows_that_the_peer_lacks_something_is_answered_and_nothing_else() -> None:
    for endpoint in (small(), large()):
        connected = in_phase(Phase.CONNECTED, endpoint)
        answer = [Send(Heartbeat(endpoint.name, MINE, THEIRS, TCP, BOTH))]
        assert told(ready(endpoint), at=connected) == (connected, answer)
        assert told(accept(endpoint), at=connected) == (connected, answer)
        assert told(opening(endpoint), at=connected) == (connected, answer)
        assert told(beat(endpoint), at=connected) == (connected, [])
        waiting = in_phase(Phase.WAIT_READY, endpoint)
        assert told(accept(endpoint), at=waiting) == (waiting, [])
        assert told(opening(endpoint), at=waiting)[1] == [Send(Accept(endpoint.name, MINE, THEIRS, TCP))]


# --- the list ----------------------------------------------------------------------------------------------------


def test_no_lane_is_listed_before_its_hello_and_if_one_direction_fails_the_other_is_listed() -> None:
    waiting, effects = told(opening(large()), up(A_DIALS), at=large())
    assert effects == []
    assert told(down(B_DIALS), at=waiting)[1] == [Send(Ready("b", MINE, THEIRS, TCP, (A_DIALS,)))]


def test_patience_with_other_lanes_ends() -> None:
    waiting, _ = told(opening(large()), up(A_DIALS), Tick(0.0), Tick(LANE_PATIENCE_SECONDS / 2), at=large())
    assert waiting.chosen == ()
    _, effects = told(Tick(LANE_PATIENCE_SECONDS), at=waiting)
    assert effects == [Send(Ready("b", MINE, THEIRS, TCP, (A_DIALS,)))]


def test_without_any_lane_the_chooser_gives_up_naming_it() -> None:
    retired, effects = told(Connect(), accept(large()), down(A_DIALS), down(B_DIALS), at=large())
    assert effects == [Retired(MINE, THEIRS, "no lane could be opened")]
    assert retired.is_wanted  # Whoever waits goes on to the next endpoint.


def test_a_lane_that_failed_may_come_up_and_one_that_was_up_may_fail_before_the_list() -> None:
    waiting, _ = told(opening(large()), down(A_DIALS), down(A_DIALS), up(A_DIALS), up(A_DIALS), at=large())
    assert (waiting.ready, waiting.failed) == ((A_DIALS,), ())
    waiting, _ = told(down(A_DIALS), at=waiting)
    assert (waiting.ready, waiting.failed) == ((), (A_DIALS,))


def test_the_smaller_name_does_not_choose_and_obeys_no_list_with_a_lane_that_failed_here() -> None:
    waiting, _ = told(opening(small()), up(A_DIALS), at=small())
    assert waiting.ready == ()
    failed, effects = told(down(B_DIALS), at=waiting)
    assert (failed.phase, effects) == (Phase.WAIT_READY, [])
    retired, effects = told(ready(small()), at=failed)
    assert retired.phase is Phase.RETIRING
    assert isinstance(effects[0], Retired)


@pytest.mark.parametrize("phase", [Phase.WAIT_READY, Phase.CONNECTED])
def test_a_listed_lane_that_breaks_retires_and_one_that_was_not_listed_does_not(phase: Phase) -> None:
    waiting, _ = told(opening(large()), up(A_DIALS), down(B_DIALS), at=large())
    if phase is Phase.CONNECTED:
        waiting, _ = told(ready(large(), (A_DIALS,)), at=waiting)
    waiting = msgspec.structs.replace(waiting, failed=())
    assert told(down(B_DIALS), at=waiting) == (waiting, [])
    assert told(up(B_DIALS), at=waiting) == (waiting, [])
    retired, effects = told(down(A_DIALS), at=waiting)
    assert (retired.phase, retired.stamp) == (Phase.RETIRING, NEXT)
    assert effects == [Retired(MINE, THEIRS, "lanes tcp dialled by a broke: reset")]


def test_lanes_of_another_pairing_say_nothing() -> None:
    waiting = in_phase(Phase.WAIT_READY, large())
    for event in (
        up(A_DIALS, theirs=NEWER),
        up(A_DIALS, mine=NEXT),
        down(A_DIALS, theirs=NEWER),
        down(A_DIALS, mine=NEXT),
    ):
        assert told(event, at=waiting) == (waiting, [])


@pytest.mark.parametrize("event", [up(Lane("nixl", "a")), down(Lane("nixl", "a"))])
def test_a_lane_that_these_two_cannot_have_is_refused(event: Event) -> None:
    with pytest.raises(LocalProtocolError, match="is not among what these two can have"):
        transition(in_phase(Phase.WAIT_READY, large()), event)


def test_only_kinds_that_both_know_are_dialled() -> None:
    both = msgspec.structs.replace(small(), offers=(*TCP, Offer("shm")))
    waiting, effects = told(opening(both, lanes=(Offer("nixl"), *TCP)), at=both)
    assert waiting.candidates == (A_DIALS, B_DIALS)
    assert [effect.lane for effect in effects if isinstance(effect, Dial)] == [A_DIALS]


# --- what is late ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", Phase)
def test_what_an_older_endpoint_of_the_peer_said_displaces_nothing(phase: Phase) -> None:
    for endpoint in (small(), large()):
        now = msgspec.structs.replace(in_phase(phase, endpoint), known=THEIRS)
        for old in (Stamp(7, 9), Stamp(8, 0)) if THEIRS.attempt > 1 else (Stamp(7, 9),):
            for late in (
                opening(endpoint, old),
                accept(endpoint, me=old),
                ready(endpoint, me=old),
                beat(endpoint, me=old),
            ):
                regarding = None if isinstance(late, Open) else MINE
                told_so = [Send(Reject(endpoint.name, now.stamp, old, regarding, THEIRS))]
                assert told(late, at=now) == (now, told_so)
            assert told(reject(endpoint, me=old), at=now) == (now, [])


def test_an_older_attempt_of_the_same_life_is_not_even_answered() -> None:
    now, _ = told(opening(small(), NEWER), at=small())
    assert told(opening(small(), THEIRS), at=now) == (now, [])


def test_the_order_of_a_peers_endpoints_is_learnt_from_every_message() -> None:
    connected = in_phase(Phase.CONNECTED, small())
    for event in (
        opening(small(), NEWER), accept(small(), me=NEWER), ready(small(), me=NEWER), beat(small(), me=NEWER),
        reject(small(), me=NEWER), Reject("b", NEWER, Stamp(4, 1), None, MINE),
    ):  # fmt: skip
        retired, effects = told(event, at=connected)
        assert (retired.phase, retired.known, retired.stamp) == (Phase.RETIRING, NEWER, NEXT)
        assert effects[0] == Retired(MINE, THEIRS, "the peer began anew: it is at 8/2")


def test_a_peer_that_was_restarted_with_the_very_same_parameters_is_recognised() -> None:
    connected = in_phase(Phase.CONNECTED, large())
    again = opening(large(), Stamp(9, 1))
    retired, _ = told(again, at=connected)
    idle, _ = told(Released(), at=retired)
    waiting, effects = told(again, at=idle)
    assert (waiting.theirs, waiting.stamp) == (Stamp(9, 1), NEXT)
    assert effects[0] == Send(Accept("b", NEXT, Stamp(9, 1), TCP))


def test_before_a_list_an_endpoint_goes_over_to_the_peers_newer_one() -> None:
    waiting = in_phase(Phase.WAIT_READY, small())
    over, effects = told(opening(small(), NEWER), at=waiting)
    assert (over.theirs, over.stamp) == (NEWER, MINE)
    assert effects == [
        DropLanes(MINE, THEIRS),
        Send(Accept("a", MINE, NEWER, TCP)),
        Dial(A_DIALS, b"address", MINE, NEWER),
    ]


def test_if_the_newer_one_is_known_by_another_message_it_waits_for_its_open() -> None:
    waiting = in_phase(Phase.WAIT_READY, small())
    idle, effects = told(reject(small(), me=NEWER), at=waiting)
    assert (idle.phase, effects) == (Phase.IDLE, [DropLanes(MINE, THEIRS)])
    connecting, effects = told(Connect(), reject(small(), me=NEWER), at=waiting)
    assert connecting.phase is Phase.CONNECTING
    assert effects == [DropLanes(MINE, THEIRS), Send(Open("a", MINE, TCP))]


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.CONNECTING, Phase.RETIRING, Phase.CLOSED])
def test_a_statement_to_an_endpoint_that_is_over_is_answered_reject(phase: Phase) -> None:
    now = msgspec.structs.replace(in_phase(phase, small()), known=THEIRS)
    old = Stamp(5, 1) if phase is Phase.RETIRING else Stamp(4, 3)
    for event in (accept(small(), old), ready(small(), echo=old), beat(small(), echo=old)):
        assert told(event, at=now) == (now, [Send(Reject("a", now.stamp, THEIRS, old, THEIRS))])


@pytest.mark.parametrize("phase", [Phase.WAIT_READY, Phase.CONNECTED])
def test_a_statement_of_the_peers_endpoint_to_an_older_one_of_ours_is_answered_reject(phase: Phase) -> None:
    now = in_phase(phase, small())
    assert told(beat(small(), echo=Stamp(4, 1)), at=now)[1] == [
        Send(Reject("a", MINE, THEIRS, Stamp(4, 1), THEIRS))
    ]


@pytest.mark.parametrize("phase", [Phase.WAIT_READY, Phase.CONNECTED])
def test_a_reject_of_just_this_pair_retires_and_any_other_does_not(phase: Phase) -> None:
    now = in_phase(phase, small())
    for other in (
        reject(small(), None),
        reject(small(), Stamp(8, 0)),
        Reject("b", THEIRS, Stamp(4, 1), THEIRS, MINE),
    ):
        assert told(other, at=now) == (now, [])
    retired, effects = told(reject(small()), at=now)
    assert retired.phase is Phase.RETIRING
    assert effects == [Retired(MINE, THEIRS, "the peer is not in this pair")]


def test_a_refused_open_fails_with_the_peers_words_and_a_stale_one_is_repeated() -> None:
    connecting = in_phase(Phase.CONNECTING, small())
    assert told(reject(small(), None, Stamp(8, 1)), at=connecting)[0].phase is Phase.CONNECTING
    retired, effects = told(reject(small(), None, refusal="b is closed"), at=connecting)
    assert effects == [Retired(MINE, None, "b is closed"), OpenFailed("b is closed")]
    assert not retired.is_wanted


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.CONNECTING])
def test_an_open_without_a_kind_in_common_is_refused_naming_ours(phase: Phase) -> None:
    now, effects = told(opening(small(), lanes=(Offer("nixl"),)), at=in_phase(phase, small()))
    refusal = "no kind of lane in common: a has tcp"
    assert effects == [Send(Reject("a", MINE, THEIRS, None, THEIRS, refusal))]
    assert now.phase is phase


def test_a_newer_life_of_ours_that_the_peer_knows_ends_this_one() -> None:
    news = Reject("b", THEIRS, MINE, None, Stamp(6, 3))
    for phase in Phase:
        now = in_phase(phase, small())
        after, effects = told(news, at=now)
        if phase is Phase.CLOSED:
            assert (after, effects) == (now, [])
            continue
        assert effects[0] == Superseded(Stamp(6, 3))
        assert after.phase is (Phase.CLOSED if phase is Phase.IDLE else Phase.RETIRING)
        if after.phase is Phase.RETIRING:
            assert told(Released(), at=after)[0].phase is Phase.CLOSED
    wanted, _ = told(Connect(), at=in_phase(Phase.RETIRING, small()))
    assert OpenFailed("a newer life of this process is known") in told(news, at=wanted)[1]


# --- ending, and time --------------------------------------------------------------------------------------------


def test_a_retired_endpoint_is_never_revived_and_its_successor_waits_for_its_lanes() -> None:
    retiring = in_phase(Phase.RETIRING, small())
    assert retiring.stamp == NEXT
    assert told(opening(small(), NEWER), at=retiring) == (retiring, [])
    idle, effects = told(Released(), at=retiring)
    assert (idle.phase, idle.stamp, effects) == (Phase.IDLE, NEXT, [])
    wanted, effects = told(Connect(), at=retiring)
    assert effects == []
    _, effects = told(Released(), at=wanted)
    assert effects == [Send(Open("a", NEXT, TCP))]


def test_silence_for_a_lease_retires_and_every_current_statement_renews_it() -> None:
    connected, effects = told(Tick(0.0), at=in_phase(Phase.CONNECTED, small()))
    assert effects == [Send(Heartbeat("a", MINE, THEIRS, TCP, BOTH))]
    late = Tick(ENDPOINT_SILENCE_SECONDS_MAX)
    renewed, _ = told(beat(small()), late, at=connected)
    assert renewed.phase is Phase.CONNECTED
    assert told(Tick(ENDPOINT_SILENCE_SECONDS_MAX - 0.1), at=connected)[0].phase is Phase.CONNECTED
    _, effects = told(late, at=connected)
    assert effects == [Retired(MINE, THEIRS, "the peer fell silent")]


@pytest.mark.parametrize("phase", [Phase.CONNECTING, Phase.WAIT_READY])
def test_a_handshake_has_a_deadline_of_its_own_and_says_its_part_again_until_then(phase: Phase) -> None:
    now = in_phase(phase, small())
    now, effects = told(Tick(0.0), at=now)
    assert len(effects) == 1
    assert isinstance(effects[0], Send)
    retired, effects = told(Tick(HANDSHAKE_SECONDS_MAX), at=now)
    assert retired.phase is Phase.RETIRING
    assert (OpenFailed("it took too long") in effects) == (phase is Phase.CONNECTING)


def test_the_deadline_runs_on_from_connecting_through_pairing_and_through_the_next_endpoint() -> None:
    paired, _ = told(Tick(0.0), accept(small()), at=in_phase(Phase.CONNECTING, small()))
    assert paired.expires_s == HANDSHAKE_SECONDS_MAX
    retiring, _ = told(reject(small()), at=paired)
    again, _ = told(Released(), at=retiring)
    assert (again.phase, again.expires_s) == (Phase.CONNECTING, HANDSHAKE_SECONDS_MAX)


def test_who_waits_for_lanes_to_be_destroyed_waits_no_longer_than_a_handshake() -> None:
    retiring = in_phase(Phase.RETIRING, small())
    assert told(Tick(0.0), at=retiring) == (retiring, [])
    wanted, _ = told(Connect(), Tick(0.0), Tick(1.0), at=retiring)
    assert wanted.is_wanted
    after, effects = told(Tick(HANDSHAKE_SECONDS_MAX), at=wanted)
    assert effects == [OpenFailed("the lanes of the endpoint before it were not destroyed in time")]
    assert told(Released(), at=after)[0].phase is Phase.IDLE


@pytest.mark.parametrize("phase", [Phase.CONNECTING, Phase.WAIT_READY, Phase.CONNECTED, Phase.RETIRING])
def test_closing_ends_in_closed_when_the_lanes_are_destroyed(phase: Phase) -> None:
    closing, _ = told(Close(), at=in_phase(phase, small()))
    closed, _ = told(Released(), at=closing)
    assert closed.phase is Phase.CLOSED
    refused = told(opening(small()), at=closed)[1][0]
    assert isinstance(refused, Send)
    assert isinstance(refused.message, Reject)
    assert refused.message.refusal == "a is closed"
    assert told(Close(), at=closed) == (closed, [])


def test_closing_fails_whoever_waits() -> None:
    assert OpenFailed("it was closed") in told(Close(), at=in_phase(Phase.CONNECTING, small()))[1]
    wanted, _ = told(Connect(), at=in_phase(Phase.RETIRING, small()))
    assert told(Close(), at=wanted)[1] == [OpenFailed("it was closed")]


# --- what must not be --------------------------------------------------------------------------------------------


def changed(message: Message, **fields: object) -> Message:
    return msgspec.structs.replace(message, **fields)


TOO_MANY = tuple(Offer(str(kind)) for kind in range(LANES_PER_ENDPOINT_MAX + 1))
IMPOSSIBLE: list[tuple[Phase, Message, str]] = [
    (Phase.IDLE, changed(opening(large()), sender="c"), "this endpoint is that to a"),
    (Phase.IDLE, opening(large(), Stamp(0, 1)), "its stamp 0/1 cannot be"),
    (Phase.IDLE, opening(large(), Stamp(1, 0)), "its stamp 1/0 cannot be"),
    (Phase.IDLE, opening(large(), lanes=TOO_MANY), "it offers 17 lanes"),
    (Phase.IDLE, opening(large(), lanes=TCP + TCP), "one kind twice"),
    (
        Phase.IDLE,
        opening(large(), lanes=(Offer("tcp", b"x" * (LANE_PARAMETERS_BYTES_MAX + 1)),)),
        "exceed 4096 bytes",
    ),
    (Phase.CONNECTING, accept(large(), NEXT), "it answers attempt 2, which was not made yet"),
    (Phase.CONNECTING, changed(accept(large()), lanes=(Offer("nixl"),)), "without a kind of lane in common"),
    (Phase.WAIT_READY, ready(large()), "a list that this side has neither made nor heard"),
    (Phase.CONNECTED, ready(large(), (A_DIALS,)), "it tells of lanes tcp dialled by a, not of lanes"),
]


@pytest.mark.parametrize(("phase", "message", "match"), IMPOSSIBLE, ids=[match for _, _, match in IMPOSSIBLE])
def test_what_no_peer_of_ours_says_is_blamed_on_the_peer_and_changes_nothing(
    phase: Phase, message: Message, match: str
) -> None:
    now = in_phase(phase, large())
    before = msgspec.json.encode(now)
    with pytest.raises(RemoteProtocolError, match=match):
        transition(now, message)
    assert msgspec.json.encode(now) == before


@pytest.mark.parametrize("chosen", [(), (Lane("nixl", "a"),)])
def test_an_impossible_list_is_refused(chosen: tuple[Lane, ...]) -> None:
    with pytest.raises(RemoteProtocolError, match="which these two cannot have"):
        transition(in_phase(Phase.WAIT_READY, small()), ready(small(), chosen))


def test_a_heartbeat_about_a_list_that_was_never_heard_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="neither made nor heard"):
        transition(in_phase(Phase.WAIT_READY, small()), beat(small()))


def test_what_lies_exactly_at_the_limits_is_accepted() -> None:
    offers = (Offer("tcp", b"x" * LANE_PARAMETERS_BYTES_MAX), *TOO_MANY[: LANES_PER_ENDPOINT_MAX - 1])
    assert told(opening(small(), lanes=offers), at=small())[0].phase is Phase.WAIT_READY


EVENTS: list[Event] = [
    opening(small()), accept(small()), ready(small()), beat(small()), reject(small()), Connect(), up(A_DIALS), down(A_DIALS),
    Released(), Retire("idle"), Tick(0.0), Close(),
]  # fmt: skip


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_what_is_in_no_row_is_refused_naming_state_and_event_and_changes_nothing(
    phase: Phase, event: Event
) -> None:
    now = in_phase(phase, small())
    if (phase, type(event)) in TABLE:
        return
    before = msgspec.json.encode(now)
    with pytest.raises(LocalProtocolError, match=f"is {phase} and {type(event).__name__} is not possible"):
        transition(now, event)
    assert msgspec.json.encode(now) == before


def test_every_message_has_a_row_in_every_state() -> None:
    assert set(itertools.product(Phase, MESSAGES)) <= set(TABLE)


@pytest.mark.parametrize("phase", Phase)
def test_every_row_leads_where_it_says(phase: Phase) -> None:
    stamps = (Stamp(7, 1), THEIRS, NEWER)
    for endpoint in (small(), large()):
        now = in_phase(phase, endpoint)
        messages: list[Event] = [opening(endpoint, me) for me in stamps]
        for me, echo in itertools.product(stamps, (MINE, Stamp(4, 1))):
            messages += [
                accept(endpoint, echo, me),
                ready(endpoint, me=me, echo=echo),
                beat(endpoint, me=me, echo=echo),
            ]
            messages += [Reject(endpoint.peer, me, echo, regarding, NOBODY) for regarding in (None, THEIRS)]
        for event in [*messages, *EVENTS[5:], Tick(HANDSHAKE_SECONDS_MAX)]:
            try:
                after, _ = transition(now, event)
            except ProtocolError:
                continue
            assert after.phase in TABLE[phase, type(event)].to, (event, after.phase)


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.WAIT_READY, Phase.CONNECTED])
def test_a_transition_costs_microseconds(phase: Phase) -> None:
    """Ten on an idle machine (docs/protocols/endpoints.md); ten times that is a defect on any."""
    now, event = in_phase(phase, small()), opening(small()) if phase is Phase.IDLE else ready(small())
    step: Callable[[], object] = lambda: transition(now, event)  # noqa: E731
    cost = min(timeit.repeat(step, number=500, repeat=5)) / 500
    assert cost < 100e-6


def test_closing_what_nobody_waits_for_tells_nobody() -> None:
    waited_for, effects = told(Connect(), Close(), at=in_phase(Phase.RETIRING, small()))
    assert [type(effect) for effect in effects] == [OpenFailed]
    unwanted, _ = told(Connect(), Retire("idle"), at=small())
    assert unwanted.phase is Phase.RETIRING
    assert not unwanted.is_wanted
    closing, effects = told(Close(), at=unwanted)
    assert closing.is_closing
    assert effects == []
    assert waited_for.is_closing


def test_only_a_chooser_with_lanes_and_no_list_yet_grows_impatient() -> None:
    for phase in (Phase.CONNECTING, Phase.WAIT_READY, Phase.CONNECTED):
        for endpoint in (small(), large()):
            at = in_phase(phase, endpoint)
            if at.is_chooser and at.ready and not at.chosen:
                continue
            after, _ = told(Tick(0.0), Tick(LANE_PATIENCE_SECONDS), at=at)
            assert (after.choose_s, after.chosen) == (at.choose_s, at.chosen)

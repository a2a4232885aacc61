"""One write session: a slot is given away only when nobody can touch it, however the session ended."""

import timeit

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core import sessions
from interlock.core.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from interlock.core.joins import JoinName
from interlock.core.limits import BLOCKS_PER_CALL_MAX, RANKS_MAX
from interlock.core.sessions import (
    Abort,
    Event,
    FreeSlot,
    JoinCompleted,
    JoinFailed,
    Phase,
    ProcessGone,
    ProcessReported,
    Publish,
    ReleaseKey,
    Session,
    SlabName,
    Tick,
    WriterGone,
    start,
    transition,
)

NAME = JoinName("engine-0/7", 1)
SLAB = SlabName(1, 0)
A, B = b"a" * 32, b"b" * 32
STARTED = start(NAME, slab=SLAB, keys=(A, B), slots=(4, 5), given=("p", "q"), deadline_s=10.0)
RELEASED = [ReleaseKey(A), ReleaseKey(B)]
FREED = [FreeSlot(4), FreeSlot(5)]
ENDS = [JoinFailed(), Abort(), WriterGone(), Tick(10.0)]


def told(*events: Event, session: Session = STARTED) -> tuple[Session, list[sessions.Effect]]:
    heard: list[sessions.Effect] = []
    for event in events:
        session, effects = transition(session, event)
        heard += effects
    return session, heard


def report(process: str) -> ProcessReported:
    return ProcessReported(process, SLAB)


def in_phase(phase: Phase) -> Session:
    return {
        Phase.WRITING: STARTED,
        Phase.SETTLING: told(JoinCompleted((True, True)))[0],
        Phase.QUARANTINED: told(Abort())[0],
        Phase.PUBLISHED: told(report("p"), report("q"), JoinCompleted((True, True)))[0],
        Phase.FREED: told(report("p"), report("q"), Abort())[0],
    }[phase]


def test_good_blocks_are_published_with_their_checksums_and_bad_ones_free_their_slots() -> None:
    session, heard = told(report("p"), report("q"), JoinCompleted((True, False), (b"sums of A", b"")))
    assert heard == [Publish(A, 4, b"sums of A"), ReleaseKey(A), FreeSlot(5), ReleaseKey(B)]
    assert session.phase is Phase.PUBLISHED


def test_nothing_is_published_while_a_process_that_got_the_slots_may_still_write() -> None:
    session, heard = told(JoinCompleted((True, True)), report("p"))
    assert (session.phase, heard) == (Phase.SETTLING, [])
    session, heard = told(report("q"), session=session)
    assert heard == [Publish(A, 4), ReleaseKey(A), Publish(B, 5), ReleaseKey(B)]


def test_proof_of_exit_counts_as_a_promise() -> None:
    session, heard = told(JoinCompleted((True, False)), ProcessGone("p"), ProcessGone("q"))
    assert heard == [Publish(A, 4), ReleaseKey(A), FreeSlot(5), ReleaseKey(B)]
    assert session.phase is Phase.PUBLISHED


@pytest.mark.parametrize("end", ENDS)
def test_however_it_ends_keys_are_released_at_once_and_slots_by_the_last_promise_or_proof(end: Event) -> None:
    session, heard = told(end)
    assert (session.phase, heard) == (Phase.QUARANTINED, RELEASED)
    session, heard = told(report("p"), session=session)
    assert (session.phase, heard) == (Phase.QUARANTINED, [])
    session, heard = told(ProcessGone("q"), session=session)
    assert (session.phase, heard) == (Phase.FREED, FREED)


@pytest.mark.parametrize("end", ENDS)
def test_where_everybody_promised_before_the_end_the_slots_are_free_at_once(end: Event) -> None:
    session, heard = told(report("p"), report("q"), end)
    assert (session.phase, heard) == (Phase.FREED, RELEASED + FREED)


@pytest.mark.parametrize("end", ENDS[1:])
def test_a_session_that_ends_before_it_settled_publishes_nothing(end: Event) -> None:
    session, heard = told(JoinCompleted((True, True)), end, report("p"), report("q"))
    assert (session.phase, heard) == (Phase.FREED, RELEASED + FREED)


def test_before_its_deadline_a_tick_changes_nothing() -> None:
    assert told(Tick(9.99)) == (STARTED, [])
    settling = in_phase(Phase.SETTLING)
    assert told(Tick(9.99), session=settling) == (settling, [])


@pytest.mark.parametrize("phase", [Phase.QUARANTINED, Phase.FREED])
def test_a_join_that_ends_after_its_session_publishes_nothing(phase: Phase) -> None:
    session = in_phase(phase)
    for event in (JoinCompleted((True, True)), JoinFailed(), Abort(), WriterGone(), Tick(1e9)):
        assert told(event, session=session) == (session, [])


@pytest.mark.parametrize("phase", list(Phase))
def test_a_repeated_promise_and_the_exit_of_a_stranger_change_nothing(phase: Phase) -> None:
    session, _ = told(report("p"), session=in_phase(phase))
    assert told(report("p"), ProcessGone("p"), ProcessGone("stranger"), session=session) == (session, [])


# --- what is refused ---------------------------------------------------------------------------------------------


def check_refused(session: Session, event: Event, error: type[ProtocolError], match: str) -> None:
    """Raises `error` with these words, and changes nothing."""
    before = msgspec.structs.astuple(session)
    with pytest.raises(error, match=match):
        transition(session, event)
    assert msgspec.structs.astuple(session) == before


@pytest.mark.parametrize("phase", list(Phase))
def test_a_report_for_another_slab_or_of_a_stranger_promises_nothing(phase: Phase) -> None:
    session = in_phase(phase)
    other = ProcessReported("p", SlabName(2, 0))
    check_refused(
        session,
        other,
        RemoteProtocolError,
        "it wrote to slab 0 of node incarnation 2, and the session's slots are in",
    )
    check_refused(session, report("stranger"), RemoteProtocolError, "never given to 'stranger'")


@pytest.mark.parametrize("phase", [Phase.SETTLING, Phase.PUBLISHED])
@pytest.mark.parametrize("event", [JoinCompleted((True, True)), JoinFailed()])
def test_a_join_that_ends_twice_is_refused(phase: Phase, event: Event) -> None:
    check_refused(
        in_phase(phase), event, LocalProtocolError, f"is {phase} and {type(event).__name__} is not possible"
    )


@pytest.mark.parametrize(
    "event", [JoinCompleted((True,)), JoinCompleted((True,) * 3), JoinCompleted((True, True), ((1,),))]
)
def test_an_outcome_of_the_wrong_length_is_refused_and_the_session_goes_on(event: JoinCompleted) -> None:
    check_refused(STARTED, event, LocalProtocolError, "and the session has 2")


def test_an_event_of_another_protocol_is_refused() -> None:
    check_refused(STARTED, "Abort", LocalProtocolError, "str is not possible")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"keys": (A,)}, "1 keys and 2 slots"),
        ({"keys": (), "slots": ()}, "0 keys"),
        (
            {"keys": (A,) * (BLOCKS_PER_CALL_MAX + 1), "slots": tuple(range(BLOCKS_PER_CALL_MAX + 1))},
            "keys and",
        ),
        ({"keys": (A, A)}, "a key or a slot twice"),
        ({"slots": (4, 4)}, "a key or a slot twice"),
        ({"given": ()}, "to 0 processes"),
        ({"given": ("p", "p")}, "to one of them twice"),
        ({"given": tuple(map(str, range(2000)))}, "to 2000 processes"),
    ],
)
def test_a_session_that_makes_no_sense_is_not_started(changes: dict[str, object], match: str) -> None:
    sound = {"slab": SLAB, "keys": (A, B), "slots": (4, 5), "given": ("p", "q"), "deadline_s": 10.0}
    with pytest.raises(LocalProtocolError, match=match):
        start(NAME, **(sound | changes))  # type: ignore[arg-type]


def test_a_session_of_exactly_the_limits_is_started() -> None:
    keys = tuple(number.to_bytes(32) for number in range(BLOCKS_PER_CALL_MAX))
    given = tuple(map(str, range(RANKS_MAX)))
    most = start(NAME, slab=SLAB, keys=keys, slots=tuple(range(len(keys))), given=given, deadline_s=10.0)
    assert most.holders == given


# --- over all histories ------------------------------------------------------------------------------------------

EVENTS: list[Event] = [
    JoinCompleted((True, False)),
    *ENDS,
    Tick(0.0),
    report("p"),
    report("q"),
    ProcessGone("p"),
    ProcessGone("q"),
]


def test_every_row_of_the_table_leads_where_it_says() -> None:
    seen: set[tuple[Phase, type, Phase]] = set()
    states, waiting = {STARTED}, [STARTED]
    while waiting:
        state = waiting.pop()
        for event in EVENTS:
            try:
                after, _ = transition(state, event)
            except ProtocolError:
                continue
            seen.add((state.phase, type(event), after.phase))
            if after not in states:
                states.add(after)
                waiting.append(after)
    assert seen == {(*row, to) for row, move in sessions.TABLE.items() for to in move.to}


@given(st.lists(st.sampled_from(EVENTS), max_size=20))
def test_each_slot_leaves_once_after_the_last_holder_and_each_key_is_released_once(
    events: list[Event],
) -> None:
    session = STARTED
    let_go: set[str] = set()
    left: list[int] = []
    released: list[bytes] = []
    for event in events:
        try:
            session, effects = transition(session, event)
        except ProtocolError:
            continue
        if isinstance(event, ProcessReported | ProcessGone):
            let_go.add(event.process)
        for effect in effects:
            if isinstance(effect, ReleaseKey):
                released.append(effect.key)
            else:
                assert let_go == {"p", "q"}
                left.append(effect.slot)
    assert len(set(left)) == len(left)
    assert len(set(released)) == len(released)
    ended = session.phase in (Phase.PUBLISHED, Phase.FREED)
    assert ended == (set(left) == {4, 5})
    assert (session.phase in (Phase.WRITING, Phase.SETTLING)) == (released == [])


def test_a_transition_costs_microseconds() -> None:
    """The bound is ten times the aim, for busy machines; docs/protocols/sessions.md says what was measured."""
    cost = min(timeit.repeat(lambda: transition(STARTED, report("p")), number=1000, repeat=5)) / 1000
    assert cost < 100e-6

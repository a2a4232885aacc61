"""No token changes, is lost or repeated, in whatever order and however often frames arrive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.errors import LocalProtocolError
from interlock.core.sampling import Sampling
from interlock.fleet.ledger import GenerationRequest, Ledger, Life, Verdict
from interlock.wire.engine_messages import Delta, TokenLogprobs

A, B = Life("a", 1), Life("b", 1)


def request(name: str = "r", max_tokens: int = 100) -> GenerationRequest:
    return GenerationRequest(id=name, prompt=[1], sampling=Sampling(max_tokens=max_tokens))


def delta(start: int, tokens: list[int], finish: str = "", attempt: int = 1, name: str = "r") -> Delta:
    return Delta(name, attempt, start, tokens, [], finish, 0)


def begun() -> Ledger:
    ledger = Ledger()
    ledger.add(request())
    ledger.assign("r", A)
    return ledger


def test_new_tokens_are_appended_and_a_repeat_changes_nothing() -> None:
    ledger = begun()
    assert ledger.accept(delta(0, [5, 6]), A).tokens == [5, 6]
    assert ledger.accept(delta(0, [5, 6]), A).verdict is Verdict.REPEAT
    assert ledger.accept(delta(1, [6]), A).verdict is Verdict.REPEAT
    assert ledger.get("r").delivered == [5, 6]


def test_of_a_frame_that_overlaps_only_the_new_is_taken_with_its_own_logprobs() -> None:
    ledger = begun()
    ledger.accept(delta(0, [5, 6]), A)
    chances = [TokenLogprobs(-float(n), 1, []) for n in range(3)]
    heard = ledger.accept(Delta("r", 1, 1, [6, 7, 8], chances, "", 0), A)
    assert (heard.verdict, heard.tokens, heard.logprobs) == (Verdict.NEW, [7, 8], chances[1:])


def test_a_gap_delivers_nothing() -> None:
    ledger = begun()
    assert ledger.accept(delta(1, [6]), A).verdict is Verdict.GAP
    assert ledger.get("r").delivered == []


def test_an_end_is_heard_once_and_nothing_after_it() -> None:
    ledger = begun()
    assert ledger.accept(delta(0, [5], "stop"), A).finish == "stop"
    assert ledger.accept(delta(0, [5], "stop"), A).verdict is Verdict.STALE
    assert ledger.accept(delta(1, [6]), A).verdict is Verdict.STALE


def test_an_end_that_comes_with_known_tokens_is_still_heard() -> None:
    ledger = begun()
    ledger.accept(delta(0, [5]), A)
    heard = ledger.accept(delta(0, [5], "stop"), A)
    assert (heard.verdict, heard.tokens, heard.finish) == (Verdict.NEW, [], "stop")


def test_an_attempt_given_up_is_not_heard_from_anybody() -> None:
    ledger = begun()
    ledger.accept(delta(0, [5]), A)
    ledger.release("r")
    assert ledger.accept(delta(1, [6]), A).verdict is Verdict.STALE
    ledger.assign("r", B)
    assert ledger.accept(delta(1, [6]), A).verdict is Verdict.STALE
    assert ledger.accept(delta(0, [7], attempt=2), A).verdict is Verdict.FOREIGN
    assert ledger.accept(delta(0, [6], attempt=2), B).tokens == [6]
    assert ledger.get("r").delivered == [5, 6]


@pytest.mark.parametrize(
    ("start", "tokens", "finish"),
    [(0, [9, 6], ""), (0, [5], "stop"), (-1, [5, 6], ""), (2, list(range(200)), "")],
    ids=["other tokens", "an end before tokens it sent", "negative", "more than was asked for"],
)
def test_a_contradiction_is_named_and_changes_nothing(start: int, tokens: list[int], finish: str) -> None:
    ledger = begun()
    ledger.accept(delta(0, [5, 6]), A)
    assert ledger.accept(delta(start, tokens, finish), A).verdict is Verdict.CONFLICT
    assert ledger.get("r").delivered == [5, 6]
    ledger.check_integrity()


def test_logprobs_that_do_not_match_their_tokens_are_a_contradiction() -> None:
    heard = begun().accept(Delta("r", 1, 0, [5, 6], [TokenLogprobs(-1.0, 1, [])], "", 0), A)
    assert heard.verdict is Verdict.CONFLICT


def test_what_nobody_asked_for_is_unknown() -> None:
    assert Ledger().accept(delta(0, [5]), A).verdict is Verdict.UNKNOWN


def test_the_ledger_is_bounded_and_ids_are_used_once() -> None:
    ledger = Ledger(capacity=2)
    ledger.add(request("r"))
    with pytest.raises(LocalProtocolError, match="already"):
        ledger.add(request("r"))
    ledger.add(request("s"))
    assert ledger.full
    with pytest.raises(LocalProtocolError, match="holds 2"):
        ledger.add(request("t"))
    ledger.remove("r")
    ledger.add(request("t"))
    ledger.check_integrity()


def test_a_running_attempt_must_be_released_before_the_next() -> None:
    ledger = begun()
    with pytest.raises(LocalProtocolError, match="attempt 1"):
        ledger.assign("r", B)
    assert ledger.get("r").life == A


@given(
    cuts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=30),
    moves=st.sets(st.integers(0, 29), max_size=3),
)
def test_any_frames_of_honest_engines_make_a_prefix_of_the_truth(
    cuts: list[tuple[int, int]], moves: set[int]
) -> None:
    """Frames are arbitrary windows of each attempt's tokens: late, doubled, out of order; attempts move now and then."""
    truth = list(range(100, 140))
    ledger, lives = begun(), {1: (A, 0)}
    for turn, (start, length) in enumerate(cuts):
        entry = ledger.get("r")
        if turn in moves:
            ledger.release("r")
            ledger.assign("r", B if entry.attempt % 2 else A)
            lives[entry.attempt] = (entry.life, entry.base)
        for attempt, (life, base) in lives.items():
            ledger.accept(delta(start, truth[base + start : base + start + length], attempt=attempt), life)
        assert entry.delivered == truth[: len(entry.delivered)]
        ledger.check_integrity()
    ledger.accept(
        delta(0, truth[ledger.get("r").base :], attempt=ledger.get("r").attempt), ledger.get("r").life
    )
    assert ledger.get("r").delivered == truth

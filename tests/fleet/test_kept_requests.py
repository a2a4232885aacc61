"""What an engine tells a front's new life is believed only where note and prompt fit; SUSPENDED waits for fronts, not for ever."""

from __future__ import annotations

import msgspec
import pytest

from interlock.core.fleet_state import FleetState, Phase
from interlock.core.identity import Epoch
from interlock.core.limits import NOTE_BYTES_MAX, SILENCE_SECONDS_MAX
from interlock.core.roster import Condition
from interlock.core.sampling import Sampling
from interlock.core.targets import State
from interlock.fleet.kept_fronts import KeptFronts
from interlock.fleet.kept_requests import from_held, note_of
from interlock.fleet.ledger import Entry, GenerationRequest
from interlock.fleet.made import Made
from interlock.wire.engine_messages import Held, TokenLogprobs
from interlock.wire.fleet_messages import WatchMembership
from interlock.wire.token_ids import pack_ids

E7, E8 = Epoch(1, 7), Epoch(1, 8)
THERE = Condition((), done=True, ok=True, message="every member is SUSPENDED")


def entry(logprobs: int | None = None, entries: int = 2) -> Entry:
    request = GenerationRequest(id="r", prompt=[1, 2, 3], sampling=Sampling(max_tokens=9, logprobs=logprobs))
    made = [Made("v1", 2)]
    told = [TokenLogprobs(-1.0, 1, [])] * entries if logprobs is not None else []
    return Entry(request, delivered=[7, 8], attempt=2, base=2, logprobs=told, made=made, cached_tokens=1)


def held(note: bytes, prompt: list[int] | None = None) -> Held:
    return Held("r", 2, pack_ids(prompt or [1, 2, 3, 7, 8]), 4, note)


@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_request_comes_back_from_note_and_prompt_as_it_was(logprobs: int | None) -> None:
    was = entry(logprobs)
    kept = from_held(held(note_of(was, 30.0)), "engine-0")
    assert kept.request == msgspec.structs.replace(was.request, deadline_s=30.0)
    assert (kept.delivered, kept.logprobs, kept.made) == (was.delivered, was.logprobs, was.made)
    assert (kept.attempt, kept.base, kept.engine) == (2, 2, "engine-0")


@pytest.mark.parametrize(
    "wrong",
    [
        held(b""),
        held(b"\xc1"),
        held(note_of(entry(), 1.0), [1, 2]),
        held(note_of(entry(), 1.0), [1, 2, 3, 7]),
        held(note_of(entry(0, entries=1), 1.0)),
        msgspec.structs.replace(held(note_of(entry(), 1.0)), request="another"),
    ],
)
def test_a_note_that_does_not_fit_is_refused_in_words(wrong: Held) -> None:
    with pytest.raises(ValueError, match="its note"):
        from_held(wrong, "engine-0")


def test_a_note_too_long_to_travel_is_left_out() -> None:
    was = entry()
    was.request = msgspec.structs.replace(was.request, note=bytes(NOTE_BYTES_MAX))
    assert note_of(was, 1.0) == b""


def fleet(state: State = State.SUSPENDED) -> FleetState:
    return FleetState(Phase.LEADING, E8, state, "0")


def word(kept: Epoch | None = None, trouble: str = "", at: Epoch | None = None) -> WatchMembership:
    return WatchMembership(keeps=True, kept=kept, trouble=trouble, trouble_at=at)


def test_suspended_is_reported_when_every_front_has_kept_its_requests_at_that_epoch() -> None:
    fronts, line = KeptFronts(), object()
    assert fronts.judge(THERE, fleet(), 0.0) == THERE
    fronts.hear("front", word(E7), line)
    waiting = fronts.judge(THERE, fleet(), 0.0)
    assert (waiting.done, "waiting for front" in waiting.message) == (False, True)
    late = fronts.judge(THERE, fleet(), 0.0, expired=True)
    assert (late.done, late.ok) == (True, False)
    assert fronts.judge(THERE, fleet(State.PAUSED), 0.0) == THERE
    fronts.hear("front", word(E8), line)
    assert fronts.judge(THERE, fleet(), 0.0) == THERE


def test_trouble_of_this_epoch_fails_the_command_and_that_of_an_earlier_one_does_not() -> None:
    fronts = KeptFronts()
    fronts.hear("front", word(trouble="no space", at=E7), object())
    assert not fronts.judge(THERE, fleet(), 0.0).done
    fronts.hear("front", word(trouble="no space", at=E8), object())
    failed = fronts.judge(THERE, fleet(), 0.0)
    assert (failed.done, failed.ok, "no space" in failed.message) == (True, False, True)


def test_a_front_that_is_gone_is_waited_for_only_as_long_as_its_connection_may_come_back() -> None:
    fronts, old, new = KeptFronts(), object(), object()
    fronts.hear("front", word(), old)
    fronts.leave(old, 10.0)
    assert not fronts.judge(THERE, fleet(), 10.0).ok
    assert fronts.judge(THERE, fleet(), 10.1 + SILENCE_SECONDS_MAX).ok
    fronts.hear("front", word(), new)
    fronts.leave(old, 20.0)
    assert not fronts.judge(THERE, fleet(), 99.0).ok, "the end of an old connection does not excuse a new one"


def test_a_front_that_keeps_nothing_is_not_waited_for() -> None:
    fronts = KeptFronts()
    fronts.hear("watcher", WatchMembership(), object())
    assert fronts.judge(THERE, fleet(), 0.0).ok

"""Silence is no death, a death is final, and the fleet stands only when everybody is accounted for."""

import timeit

import pytest

from interlock.core.errors import LocalProtocolError
from interlock.core.identity import Epoch
from interlock.core.roster import (
    AnswerStale,
    Changed,
    Gone,
    MemberRecord,
    Outcome,
    Reported,
    Sight,
    Silent,
    condition,
    needs_telling,
    register,
    register_lost,
    transition,
)
from interlock.core.targets import State

NOW = Epoch(1, 5)


def said(
    *,
    life: int = 3,
    state: State = State.PAUSED,
    epoch: Epoch = NOW,
    standing: Epoch | None = NOW,
    failed: str | None = None,
) -> Reported:
    return Reported(life, state, epoch, standing, "v1", failed)


MEMBER = register("e0", said())
WAITING = register("e1", said(state=State.PAUSING, standing=None))
FAILED = register("e2", said(standing=None, failed="no memory"))
SUSPECT = transition(WAITING, Silent(3))[0]
LOST = transition(WAITING, Gone(3))[0]


# --- one member ----------------------------------------------------------------------------------------------------------


def test_silence_makes_suspect_and_a_word_makes_heard_again() -> None:
    """LMCache #4715: a live, idle rank was reaped."""
    suspect, effects = transition(MEMBER, Silent(3))
    assert (suspect.sight, suspect.word) == (Sight.SUSPECT, "SUSPECT")
    assert effects == (Changed(),)
    assert transition(suspect, Silent(3)) == (suspect, ())
    assert transition(suspect, said()) == (MEMBER, (Changed(),))
    assert MEMBER.word == "PAUSED"


def test_a_repeated_report_changes_nothing() -> None:
    assert transition(MEMBER, said()) == (MEMBER, ())


@pytest.mark.parametrize("gone", [Gone(3), Gone(0)])
def test_a_life_that_ended_is_lost_for_good(gone: Gone) -> None:
    lost, effects = transition(MEMBER, gone)
    assert lost.word == "LOST"
    assert effects == (Changed(),)
    assert transition(lost, said()) == (lost, (AnswerStale(3),))
    assert transition(lost, Silent(3)) == (lost, ())
    assert transition(lost, gone) == (lost, ())


def test_a_new_life_takes_the_name_and_owes_nothing_to_the_old() -> None:
    """LMCache #4642: a restart between two heartbeats was invisible."""
    newer, effects = transition(LOST, said(life=4, state=State.STARTING, epoch=Epoch(), standing=None))
    assert (newer.incarnation, newer.standing, newer.sight) == (4, None, Sight.HEARD)
    assert effects == (Changed(),)
    assert transition(newer, said(life=3)) == (newer, (AnswerStale(4),))
    assert transition(newer, Gone(3)) == (newer, ())
    assert transition(newer, Silent(3)) == (newer, ())


def test_an_exit_that_is_seen_before_the_lifes_first_word_outlives_that_word() -> None:
    lost, effects = transition(MEMBER, Gone(4))
    assert (lost, effects) == (register_lost("e0", 4), (Changed(),))
    assert transition(lost, said(life=4)) == (lost, (AnswerStale(4),))


def test_an_earlier_word_that_comes_late_does_not_take_back_what_was_heard() -> None:
    assert transition(MEMBER, said(epoch=Epoch(1, 4), standing=Epoch(1, 4))) == (MEMBER, ())


def test_a_target_is_told_until_the_report_repeats_it_and_never_to_the_lost() -> None:
    assert needs_telling(MEMBER, Epoch(1, 6))
    assert not needs_telling(MEMBER, NOW)
    assert not needs_telling(LOST, Epoch(1, 6))


# --- the fleet -----------------------------------------------------------------------------------------------------------


def judge(*records: MemberRecord, target: State = State.PAUSED, **more: object) -> tuple[bool, bool, str]:
    found = condition(records, NOW, target, **more)  # type: ignore[arg-type]
    return found.done, found.ok, found.message


def test_the_fleet_stands_when_every_member_stands_or_is_gone() -> None:
    done, ok, message = judge(MEMBER, LOST)
    assert (done, ok) == (True, True)
    assert "PAUSED" in message
    assert dict(condition([MEMBER, LOST], NOW, State.PAUSED).members) == {
        MEMBER: Outcome.STANDING,
        LOST: Outcome.GONE,
    }


def test_it_waits_for_who_is_on_the_way_until_the_deadline() -> None:
    assert judge(MEMBER, WAITING) == (False, False, "waiting for e1 to be PAUSED")
    done, ok, message = judge(MEMBER, WAITING, expired=True)
    assert (done, ok) == (True, False)
    assert "e1 did not get there by the deadline" in message


def test_standing_at_another_epoch_is_not_standing() -> None:
    assert judge(register("e0", said(epoch=Epoch(1, 4), standing=Epoch(1, 4))))[:2] == (False, False)


def test_who_cannot_be_seen_fails_the_call_unless_the_caller_allows_it() -> None:
    """Hazard F5: a frozen engine was reported lost, the pause returned, and it thawed and wrote."""
    assert judge(MEMBER, SUSPECT)[:2] == (False, False)
    done, ok, message = judge(MEMBER, SUSPECT, expired=True)
    assert (done, ok) == (True, False)
    assert "e1 cannot be seen" in message
    assert judge(MEMBER, SUSPECT, expired=True, allow_unknown=True)[:2] == (True, True)


def test_who_stood_and_fell_silent_still_stands_for_it_leaves_only_for_a_higher_epoch() -> None:
    assert judge(transition(MEMBER, Silent(3))[0])[:2] == (True, True)


def test_a_failed_step_fails_the_call_and_names_the_member() -> None:
    done, ok, message = judge(MEMBER, FAILED)
    assert (done, ok) == (True, False)
    assert message.startswith("e2 failed on the way: ")


def test_who_is_expected_and_was_never_heard_counts_as_unknown() -> None:
    assert judge(MEMBER, unseen=["e7"])[2] == "waiting for e7 to be PAUSED"
    assert judge(MEMBER, unseen=["e7"], expired=True)[2] == "e7 cannot be seen"
    assert judge(MEMBER, unseen=["e0"])[:2] == (True, True)
    assert judge(unseen=["e7"])[:2] == (False, False)


def test_no_members_is_an_error_but_an_empty_fleet_is_stopped() -> None:
    assert judge() == (True, False, "there is no member to command")
    assert judge(LOST)[:2] == (True, False)
    assert judge(LOST, target=State.STOPPED)[:2] == (True, True)
    assert judge(target=State.STOPPED) == (True, True, "nothing runs")


def test_a_report_is_cheap() -> None:
    """10 µs asked for; the machine that tests run on is busy, so the test allows ten times as much."""
    report = said(standing=None)
    seconds = min(timeit.repeat(lambda: transition(MEMBER, report), number=1000, repeat=5)) / 1000
    assert seconds < 100e-6


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="'tea' is no event of the record of e0"):
        transition(MEMBER, "tea")  # type: ignore[arg-type]

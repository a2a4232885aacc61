"""A rank's place in its group: what it runs, and when its leader has to hear of it at once."""

from __future__ import annotations

import pytest

from interlock.core.errors import RemoteProtocolError
from interlock.core.lockstep import Fence, Grant
from interlock.engines.lockstep.seat import Seat


def seated() -> tuple[Seat, list[int | None]]:
    runs: list[int | None] = []
    seat = Seat(1, lambda: runs.append(seat.step))
    return seat, runs


def test_granted_steps_are_run_one_after_the_other_and_no_further() -> None:
    seat, runs = seated()
    assert seat.hear(Fence(1)), "a fence is answered at once"
    assert not seat.hear(Grant(1, 2, 64)), "a new grant is answered by the end of its step"
    assert (seat.step, seat.tokens, runs) == (1, 64, [1])
    seat.ended(1)
    assert (seat.step, runs) == (2, [1, 2])
    seat.ended(2)
    assert (seat.step, runs) == (None, [1, 2])
    assert (seat.report.granted, seat.report.reached) == (2, 2)


def test_a_rank_inside_a_step_answers_a_new_leader_with_its_grant() -> None:
    seat, runs = seated()
    seat.hear(Fence(1))
    seat.hear(Grant(1, 1))
    assert seat.step == 1
    assert seat.hear(Fence(2))
    assert (seat.report.leader_epoch, seat.report.granted, seat.report.reached) == (2, 1, 0)
    assert seat.hear(Grant(1, 2)), "the old leader is answered with the new epoch"
    assert (seat.report.granted, seat.step, runs) == (1, 1, [1])


def test_a_grant_said_again_is_answered_and_changes_nothing() -> None:
    seat, runs = seated()
    seat.hear(Fence(1))
    seat.hear(Grant(1, 1))
    seat.ended(1)
    before = seat.report
    assert seat.hear(Grant(1, 1))
    assert (seat.report, runs) == (before, [1])


@pytest.mark.parametrize("grant", [Grant(2, 1), Grant(1, 3)], ids=["unfenced", "too far ahead"])
def test_a_grant_that_no_leader_may_give_is_refused_and_changes_nothing(grant: Grant) -> None:
    seat, runs = seated()
    seat.hear(Fence(1))
    before = seat.report
    with pytest.raises(RemoteProtocolError):
        seat.hear(grant)
    assert (seat.report, seat.step, runs) == (before, None, [])

"""Errors read as sentences and carry their facts."""

from __future__ import annotations

from interlock.core.errors import ChannelClosed, ChannelFault, InterlockError, StaleError


def test_an_error_says_whom_it_concerns_in_which_phase_and_what_to_do() -> None:
    error = InterlockError(
        "the load of 3 blocks failed",
        peer="store-0",
        incarnation=7,
        attempt=2,
        phase="copying",
        hint="recompute",
        blocks=3,
    )
    assert str(error) == (
        "the load of 3 blocks failed (peer store-0, incarnation 7, attempt 2, while copying); recompute"
    )
    assert error.fields == {"peer": "store-0", "incarnation": 7, "attempt": 2, "blocks": 3}
    assert (error.peer, error.incarnation, error.attempt, error.retryable) == ("store-0", 7, 2, False)


def test_a_fact_that_the_message_says_is_not_said_twice() -> None:
    assert str(InterlockError("store-0 is full", peer="store-0")) == "store-0 is full"


def test_what_broke_a_connection_is_caught_as_one() -> None:
    closed = ChannelClosed("store-0 closed the channel")
    assert isinstance(closed, ConnectionError)
    assert str(closed) == "store-0 closed the channel"


def test_faults_and_stale_lives_carry_what_programs_need() -> None:
    fault = ChannelFault("busy", "come back later", True)
    assert (fault.code, fault.message, fault.retryable, fault.fields["code"]) == (
        "busy",
        "come back later",
        True,
        "busy",
    )
    assert StaleError("over", highest=9, peer="a").highest == 9

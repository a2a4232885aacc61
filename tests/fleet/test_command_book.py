"""What listeners of a command are told before it has ended."""

from __future__ import annotations

from interlock.core.identity import Epoch
from interlock.core.roster import Condition
from interlock.core.targets import State
from interlock.fleet.command_book import progress_of
from interlock.fleet.coordinator_state import CommandRecord


def test_half_of_a_composite_is_not_told_as_the_end() -> None:
    """Whoever hears *done* stops listening: a stop by way of a pause is done when it has stopped, not when it stands."""
    stop = CommandRecord(
        owner="me", command_id="1", command="STOP", epoch=Epoch(1, 2), wanted=State.STOPPED, deadline_s=60.0
    )
    progress = progress_of(stop, Condition((), True, True, "every member is PAUSED"))
    assert (progress.done, progress.ok) == (False, False)
    assert progress.message == "every member is PAUSED"

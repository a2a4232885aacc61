"""What a coordinator takes from the wire is judged before any rule looks at it."""

from __future__ import annotations

import pytest

from interlock.core.identity import Epoch
from interlock.core.targets import TARGETS, State
from interlock.fleet.words import target_in_types
from interlock.wire.fleet_messages import Target


@pytest.mark.parametrize("state", sorted(set(State) - set(TARGETS)))
def test_nobody_was_told_to_be_on_the_way(state: State) -> None:
    """Believed, such a word of one engine ended the connection by an error of ours: no rank of restriction has it."""
    with pytest.raises(ValueError, match=f"to be {state}: targets are RUNNING"):
        target_in_types(Target(Epoch(1, 2), state, "keep", "0"))


@pytest.mark.parametrize("state", TARGETS)
def test_what_a_coordinator_tells_is_understood(state: State) -> None:
    assert target_in_types(Target(Epoch(1, 2), state, "keep", "0")).state is state

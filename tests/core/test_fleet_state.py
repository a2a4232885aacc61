"""What members are told follows from the holds."""

import msgspec

from interlock.core.fleet_state import FleetState, Phase
from interlock.core.identity import Epoch
from interlock.core.targets import Hold, Mode, State


def test_the_mode_is_that_of_the_strictest_hold_and_keep_without_any() -> None:
    state = FleetState(Phase.LEADING, Epoch(1, 1), State.PAUSED, "v1")
    assert state.mode is Mode.KEEP
    holds = (Hold("a", Mode.WAIT), Hold("b", Mode.ABORT))
    for each in (holds, holds[::-1]):
        assert msgspec.structs.replace(state, holds=each).target.mode is Mode.ABORT
    assert msgspec.structs.replace(state, holds=holds[:1]).mode is Mode.WAIT

"""What makes the endpoints' world small leaves nothing out, and each fault of its budget shows it something more."""

from typing import Any

import pytest

from interlock.checking.explorer import explore
from interlock.checking.museum.mooncake_stale_reply import as_it_was
from interlock.checking.worlds.endpoints import Endpoints
from interlock.core.endpoint_state import Endpoint

pytestmark = pytest.mark.explorer


class Seen(Endpoints):
    """Remembers what its endpoints and budgets were, whatever the mail held."""

    def __init__(self, **budget: Any) -> None:
        super().__init__(**budget)
        self.seen: set[tuple[tuple[Endpoint, ...], tuple[int, ...]]] = set()

    def good(self, state: tuple[Any, ...]) -> bool:
        self.seen.add((tuple(self.machine[number] for number in state[0]), state[2]))
        return super().good(state)


@pytest.mark.parametrize("budget", [{}, {"reopens": (1, 0)}, {"timers": 1}], ids=str)
def test_the_reduced_world_sees_every_state_of_the_endpoints_that_the_whole_world_has(
    budget: dict[str, Any],
) -> None:
    reduced, whole = Seen(**budget), Seen(**budget, is_reduced=False)
    fewer, all_ = explore(reduced), explore(whole)
    assert fewer.exhausted
    assert all_.exhausted
    assert fewer.violation is all_.violation is None
    assert fewer.states < all_.states
    assert reduced.seen == whole.seen


def test_the_reduced_world_finds_what_the_whole_world_finds_in_as_many_steps() -> None:
    found = [
        explore(Endpoints(timers=1, transition=as_it_was, is_reduced=reduced)).violation
        for reduced in (True, False)
    ]
    assert all(violation is not None and len(violation.story) == 4 for violation in found)


@pytest.mark.parametrize(
    "budget", [{"crashes": (1, 0)}, {"reopens": (0, 1)}, {"timers": 1}, {"lane_failures": 1}], ids=str
)
def test_every_fault_of_the_budget_adds_states(budget: dict[str, Any]) -> None:
    result = explore(Endpoints(**budget))
    assert result.violation is None
    assert result.exhausted
    assert result.states > explore(Endpoints()).states

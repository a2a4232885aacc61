"""What was told of lives that are over is remembered, also where there is room for no further name."""

from __future__ import annotations

import pytest

from interlock.fleet.coordinator_state import KnownMember
from interlock.fleet.members import Members
from interlock.host.real import RealHost
from interlock.wire.fleet_messages import EngineFacts


def test_a_later_end_of_a_known_name_counts_though_no_further_name_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("interlock.fleet.members.MEMBERS_MAX", 1)
    members = Members(RealHost(), exit_is_proof=False, on_change=lambda _: None)
    members.gone("a", 5)
    members.gone("b", 5)
    members.gone("a", 7)
    assert members.lives() == {"a": 7}


def test_a_front_may_know_of_a_newer_life_than_the_one_that_has_the_seat() -> None:
    """START awaits a life newer than all of these: the end of that one, told late, was taken for the new one's."""
    members = Members(RealHost(), exit_is_proof=False, on_change=lambda _: None)
    members.restore([KnownMember("a", 5, EngineFacts("unix:/a", "m", 9, "vllm"))])
    members.forbid("a", 7)
    members.forbid("b", 3)
    assert members.lives() == {"a": 7, "b": 3}

"""Work goes to the least loaded of those that may take it, and to nobody else."""

import msgspec
import pytest

from interlock.core.identity import Epoch
from interlock.fleet.ledger import Life
from interlock.fleet.router import Openings, life_of
from interlock.wire.fleet_messages import EngineFacts, Load, Member, Membership

FACTS = EngineFacts("unix:/x", "m", 100, "scripted")


def member(name: str, *, running: int = 0, waiting: int = 0, **more: object) -> Member:
    usual = {"state": "RUNNING", "standing": True, "version": "7"} | more
    return Member(name, 1, FACTS, load=Load(running, waiting), **usual)  # type: ignore[arg-type]


def view(*members: Member, target: str = "RUNNING") -> Membership:
    return Membership(Epoch(1, 1), target, "7", [], list(members))


def openings(fleet: Membership, own: dict[str, int] | None = None) -> Openings:
    return Openings(fleet, lambda life: (own or {}).get(life.name, 0), lambda _: True)


def chosen(fleet: Membership, own: dict[str, int] | None = None, **more: object) -> str | None:
    found = openings(fleet, own).choose(**more)  # type: ignore[arg-type]
    return found.name if found else None


def test_the_least_loaded_is_chosen_by_what_it_reported() -> None:
    assert chosen(view(member("a", running=3), member("b", running=1, waiting=1))) == "b"


def test_what_we_sent_counts_before_it_is_reported() -> None:
    assert chosen(view(member("a"), member("b", running=2)), {"a": 3, "b": 1}) == "b"


def test_ties_go_to_the_one_with_less_of_ours_then_by_name() -> None:
    fleet = view(member("b", running=2), member("a", running=2))
    assert chosen(fleet, {"a": 2, "b": 1}) == "b"
    assert chosen(fleet) == "a"


@pytest.mark.parametrize(
    "change",
    [{"state": "SUSPECT"}, {"state": "LOST"}, {"state": "PAUSED"}, {"standing": False}, {"version": "6"}, {"version": None}],
    ids=str,
)  # fmt: skip
def test_nobody_works_who_may_not(change: dict[str, object]) -> None:
    idle = msgspec.structs.replace(member("idle"), **change)
    assert chosen(view(idle, member("busy", running=50))) == "busy"
    assert chosen(view(idle)) is None


def test_nothing_is_dispatched_unless_the_fleet_shall_run() -> None:
    assert chosen(view(member("a"), target="PAUSED")) is None


def test_a_preference_is_followed_only_where_it_can_work() -> None:
    assert chosen(view(member("a"), member("b", running=9)), prefer="b") == "b"
    assert chosen(view(member("a"), member("b", state="SUSPECT")), prefer="b") == "a"
    assert chosen(view(member("a")), prefer="nobody") == "a"


def test_who_just_failed_is_taken_only_where_nobody_else_is_left() -> None:
    fleet = view(member("a"), member("b", running=9))
    assert chosen(fleet, avoid=Life("a", 1), prefer="a") == "b"
    assert chosen(view(member("a")), avoid=Life("a", 1)) == "a"


def test_who_cannot_be_reached_is_not_chosen() -> None:
    fleet = view(member("a"), member("b", running=9))
    assert Openings(fleet, lambda _: 0, lambda life: life.name == "b").choose() == member("b", running=9)
    assert life_of(fleet.members[0]) == Life("a", 1)


def test_what_goes_out_in_one_turn_counts_at_once() -> None:
    turn = openings(view(member("a"), member("b", running=2)), {"a": 1})
    assert [found.name for _ in range(6) if (found := turn.choose())] == ["a", "b", "b", "a", "b", "a"]

"""Which engine a request goes to: the least loaded of those that may take work now.

May take work: RUNNING by its own word at the fleet's epoch, with the fleet's weights, and neither SUSPECT nor LOST. An
engine that is behind in weights would answer with another model; one behind in epoch would refuse.

Load is what the engine reported (running and waiting, from all fronts) or what this front knows to be there, whichever is
more: reports are late, and a burst between two of them would all go to one engine (vLLM #36748, #40279). Ties go to the one
with less of ours, then by name, so that a choice can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from interlock.core.targets import State
from interlock.fleet.ledger import Life
from interlock.wire.fleet_messages import Member, Membership


def life_of(member: Member) -> Life:
    """Which life of which engine `member` is."""
    return Life(member.name, member.incarnation)


def may_take_work(member: Member, view: Membership) -> bool:
    """Whether `member` stands RUNNING at this epoch with these weights."""
    return (
        view.target == State.RUNNING
        and member.state == State.RUNNING
        and member.standing
        and member.version == view.version
    )


class Openings:
    """Who may take work in this turn. Between two answers of `choose` nothing changes but what went out, which is counted here."""

    def __init__(
        self, view: Membership, in_flight: Callable[[Life], int], usable: Callable[[Life], bool]
    ) -> None:
        """`usable` says of a life whether this front reaches it and was not just refused by it."""
        self._open = [
            _Opening(member, life, in_flight(life), member.load.running + member.load.waiting)
            for member, life in _standing(view)
            if usable(life)
        ]

    def choose(self, prefer: str | None = None, avoid: Life | None = None) -> Member | None:
        """The engine for the next request, None when none may take it now.

        `prefer` is a name that is taken whatever its load; `avoid` is taken only where nothing else is left.
        """
        best: _Opening | None = None
        least: tuple[bool, bool, int, int, str] | None = None
        for each in self._open:
            own, reported = each.own, each.reported
            rank = (
                avoid is not None and each.life == avoid,
                prefer is not None and each.member.name != prefer,
                own if own > reported else reported,
                own,
                each.member.name,
            )
            if least is None or rank < least:
                best, least = each, rank
        if best is None:
            return None
        best.own += 1
        return best.member


class _Opening(msgspec.Struct):
    member: Member
    life: Life
    own: int
    reported: int


_judged: tuple[Membership, list[tuple[Member, Life]]] | None = None


def _standing(view: Membership) -> list[tuple[Member, Life]]:
    """Who may take work. One membership is asked about for every request until the next comes, so its answer is kept."""
    global _judged
    judged = _judged
    if judged is None or judged[0] is not view:
        judged = _judged = (view, [(m, life_of(m)) for m in view.members if may_take_work(m, view)])
    return judged[1]

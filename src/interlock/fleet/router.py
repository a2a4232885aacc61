"""Which engine a request goes to: the least loaded of those that may take work now.

May take work: RUNNING by its own word at the fleet's epoch, with the fleet's weights, and neither SUSPECT nor LOST. An
engine that is behind in weights would answer with another model; one behind in epoch would refuse.

Load is what the engine reported (running and waiting, from all fronts) or what this front knows to be there, whichever is
more: reports are late, and a burst between two of them would all go to one engine (vLLM #36748, #40279). Ties go to the one
with less of ours, then by name, so that a choice can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from interlock.core.targets import State
from interlock.fleet.ledger import Life
from interlock.wire.fleet_messages import Member, Membership


def life_of(member: Member) -> Life:
    return Life(member.name, member.incarnation)


def may_take_work(member: Member, view: Membership) -> bool:
    """Whether `member` stands RUNNING at this epoch with these weights."""
    return (
        view.target == State.RUNNING
        and member.state == State.RUNNING
        and member.standing
        and member.version == view.version
    )


def choose(
    view: Membership,
    in_flight: Callable[[Life], int],
    usable: Callable[[Life], bool],
    prefer: str | None = None,
    avoid: Collection[Life] = (),
) -> Member | None:
    """The engine for the next request, None when none may take it now.

    `usable` says of a life whether this front reaches it and was not just refused by it; `prefer` is a name that is taken
    whatever its load; `avoid` are lives taken only where nothing else is left.
    """
    candidates = [m for m in view.members if may_take_work(m, view) and usable(life_of(m))]
    candidates = [m for m in candidates if life_of(m) not in avoid] or candidates
    candidates = [m for m in candidates if m.name == prefer] or candidates

    def burden(member: Member) -> tuple[int, int, str]:
        own = in_flight(life_of(member))
        return max(own, member.load.running + member.load.waiting), own, member.name

    return min(candidates, key=burden, default=None)

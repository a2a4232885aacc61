"""The worlds of core/lockstep: how many ranks and steps, under which faults (`checking/lockstep_world`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from interlock.checking.diagrams import Change, Diagram
from interlock.checking.explorer import World
from interlock.checking.lockstep_world import Lockstep
from interlock.core import lockstep_leader
from interlock.core.lockstep_leader import Phase


def worlds(budget: Literal["small", "full"]) -> Sequence[World[Any]]:
    """Full: three ranks, three steps, a change of leader, a death, a deadline."""
    if budget == "small":
        return [
            Lockstep(ranks=2, steps=2),
            Lockstep(ranks=2, steps=2, changes=1, deaths=1, timers=1),
        ]
    return [
        Lockstep(ranks=2, steps=3),
        Lockstep(ranks=3, steps=3, changes=1, deaths=1, timers=1),
    ]


def diagrams() -> dict[str, Diagram]:
    """The phases of a leader."""
    changes = [
        Change(phase, event.__name__, target)
        for (phase, event), targets in lockstep_leader.TABLE.items()
        for target in targets
    ]
    return {"lockstep": Diagram("One leader's term", tuple(Phase), changes, Phase.FENCING, (Phase.ENDED,))}

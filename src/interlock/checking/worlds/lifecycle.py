"""The worlds of core/lifecycle: which commands cross, from where, under which faults (`checking/lifecycle_world`).

The cores in them: targets and member; commands, recovery, fleet_state and roster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from interlock.checking.diagrams import Change, Diagram
from interlock.checking.explorer import World
from interlock.checking.lifecycle_world import Lifecycle, Restarts
from interlock.core import commands
from interlock.core.fleet_state import Commanded
from interlock.core.targets import BEGUN, FINISHED, PATH, TARGETS, Command, Mode, State, Step

A_PAUSES = Commanded(Command.PAUSE, "a")
B_ABORTS = Commanded(Command.PAUSE, "b", mode=Mode.ABORT)
B_PAUSES = Commanded(Command.PAUSE, "b", deadline_s=1.0)
A_UNPAUSES = Commanded(Command.UNPAUSE, "a")
B_BREAKS = Commanded(Command.UNPAUSE, "b", break_hold_of="a")
A_UPDATES = Commanded(Command.UPDATE, "a", version="v2")
A_SUSPENDS = Commanded(Command.SUSPEND, "a")
B_RESUMES = Commanded(Command.RESUME, "b")
B_STOPS = Commanded(Command.STOP, "b")
B_PAUSES_TO_STOP = Commanded(Command.STOP, "b", composite=True)


def worlds(budget: Literal["small", "full"]) -> Sequence[World[Any]]:
    """Full: two engines, a joiner, two crossing commands, a death, a freeze, a restart with and without state."""
    paused = (A_PAUSES,)
    if budget == "small":
        return [
            Lifecycle(A_PAUSES, B_ABORTS),
            Lifecycle(A_PAUSES, B_STOPS, joiners=1, engines=1),
            Lifecycle(A_PAUSES, B_PAUSES_TO_STOP, deaths=1, freezes=1, restarts="with state"),
            Lifecycle(A_UPDATES, B_BREAKS, before=paused, deaths=1, freezes=1, restarts="without state"),
            Lifecycle(A_UPDATES, B_BREAKS, before=paused, failures=1),
            Lifecycle(A_UPDATES, B_STOPS, before=paused, failures=1, deaths=1),
            Lifecycle(
                A_PAUSES,
                engines=1,
                deaths=1,
                freezes=1,
                restarts="without state",
                front=True,
                clock_back=True,
            ),
        ]
    return [
        Lifecycle(A_PAUSES, B_ABORTS, joiners=1),
        Lifecycle(A_UPDATES, B_BREAKS, before=paused, deaths=1, freezes=1, failures=1, restarts="with state"),
        Lifecycle(A_UPDATES, B_STOPS, before=paused, deaths=1, freezes=1, failures=1, restarts="with state"),
        Lifecycle(
            A_SUSPENDS, B_RESUMES, before=paused, deaths=1, freezes=1, failures=1, restarts="with state"
        ),
        Lifecycle(A_PAUSES, B_PAUSES_TO_STOP, deaths=1, freezes=1, restarts="without state"),
        Lifecycle(
            A_PAUSES, B_ABORTS, deaths=1, freezes=1, restarts="without state", front=True, clock_back=True
        ),
        *(
            Lifecycle(*asks, before=before, joiners=1, deaths=1, freezes=1, restarts=restarts)
            for asks, before, restarts in _CROSSINGS
        ),
    ]


_CROSSINGS: tuple[tuple[tuple[Commanded, ...], tuple[Commanded, ...], Restarts], ...] = (
    ((A_PAUSES, B_ABORTS), (), "with state"),
    ((A_PAUSES, B_STOPS), (), "with state"),
    ((A_UPDATES, B_BREAKS), (A_PAUSES,), "with state"),
    ((A_UPDATES, B_BREAKS), (A_PAUSES,), "without state"),
    ((A_SUSPENDS, B_BREAKS), (A_PAUSES,), "without state"),
)


def diagrams() -> dict[str, Diagram]:
    """The walk of a member, and the commands that move the fleet's target."""
    taken = {(state, step) for (state, _), step in PATH.items() if step in BEGUN}
    taken |= {(State.RUNNING, Step.PAUSE), (State.PAUSED, Step.UPDATE)}
    walk = [
        Change(state, step, BEGUN[step])
        for state, step in sorted(taken, key=lambda pair: tuple(State).index(pair[0]))
    ]
    walk += [Change(state, "finished", end) for state, end in FINISHED.items()]
    commanded = [Change(state, command, target) for (command, state), target in commands.LEGAL.items()]
    commanded.append(Change(State.PAUSED, f"{Command.UNPAUSE} while a hold remains", State.PAUSED))
    return {
        "lifecycle": Diagram("One member", tuple(State), tuple(walk), State.STARTING, (State.STOPPED,)),
        "commands": Diagram("The fleet's target", TARGETS, tuple(commanded), State.RUNNING),
    }

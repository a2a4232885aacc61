"""A worker that is alive but was not asked for anything sends no heartbeat; the reaper takes it for dead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from interlock.checking.explorer import Broken, World
from interlock.checking.gallery import Exhibit
from interlock.core import roster
from interlock.core.identity import Epoch
from interlock.core.roster import (
    Changed,
    Gone,
    MemberRecord,
    Reported,
    RosterEvent,
    RosterOutcome,
    Sight,
    Silent,
)
from interlock.core.targets import State as Life

State = tuple[MemberRecord | None, bool, int]
"""What the server records of the worker, whether the worker lives, how often it may still seem silent."""


class Registry(World[State]):
    """One worker and the server that keeps a record of it. Silence comes when a timer fires, death when it comes."""

    protocol, name = "lifecycle", "1 worker, 1 silence, 1 death"
    budget = {"silences": 1, "deaths": 1}

    def __init__(self, transition: Callable[[MemberRecord, RosterEvent], RosterOutcome]) -> None:
        self.transition = transition

    def initial(self) -> Iterable[State]:
        yield None, True, 1

    def steps(self, state: State) -> Iterable[tuple[Any, State | Broken]]:
        record, alive, silences = state
        said = Reported(1, Life.RUNNING, Epoch(1, 1), Epoch(1, 1), "v1")
        if record is None:
            if alive:
                yield "the worker registers", (roster.register("worker", said), alive, silences)
            return
        if alive:
            yield "the worker is heard", (self.transition(record, said)[0], alive, silences)
            yield "the worker dies", (record, False, silences)
        else:
            yield "its exit is seen", (self.transition(record, Gone(1))[0], alive, silences)
        if silences:
            told = self.transition(record, Silent(1))[0]
            yield "the worker was silent for too long", (told, alive, silences - 1)

    def wrong(self, state: State) -> str | None:
        if state[1] and state[0] is not None and state[0].sight is Sight.LOST:
            return "the worker lives and is struck off; whatever is sent to it hangs"
        return None

    def good(self, state: State) -> bool:
        record, alive, _ = state
        return record is not None and record.sight is (Sight.HEARD if alive else Sight.LOST)


def as_it_was(record: MemberRecord, event: RosterEvent) -> RosterOutcome:
    """Silence ends a registration, and nothing brings it back."""
    if isinstance(event, Silent) and record.sight is Sight.HEARD:
        return msgspec.structs.replace(record, sight=Sight.LOST), (Changed(),)
    return roster.transition(record, event)


EXHIBIT = Exhibit(
    title="Idle is not dead",
    protocol="lifecycle",
    public="LMCache/LMCache #4715",
    rule="a registered worker that has not pinged within the grace time is reaped; pings begin with its first request",
    broken=lambda: Registry(as_it_was),
    mended=lambda: Registry(roster.transition),
    story_steps=2,
)

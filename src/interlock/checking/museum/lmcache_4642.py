"""The server restarts between two heartbeats: both succeed, so the worker never registers again."""

from __future__ import annotations

from collections.abc import Iterable

from interlock.checking.explorer import Broken, World
from interlock.checking.gallery import Exhibit
from interlock.checking.lifecycle_world import Lifecycle

State = tuple[bool, bool, bool, int]
"""Whether the server runs, whether it knows the worker, whether the worker thinks it healthy, restarts left."""


class Pinged(World[State]):
    """A worker that registers when its server is healthy again; a server that restarts at once."""

    protocol, name = "lifecycle", "1 worker, 1 quick restart of the server"
    budget = {"restarts": 1}

    def initial(self) -> Iterable[State]:
        yield True, False, False, 1

    def steps(self, state: State) -> Iterable[tuple[str, State | Broken]]:
        runs, knows, healthy, restarts = state
        if restarts:
            yield "the server stops", (False, False, healthy, 0)
        if not runs:
            yield "the server is back", (True, False, healthy, restarts)
            yield "a heartbeat fails", (runs, knows, False, restarts)
        elif not healthy:
            yield "a heartbeat succeeds again: the worker registers", (runs, True, True, restarts)
        else:
            yield "a heartbeat succeeds", state

    def wrong(self, state: State) -> str | None:
        runs, knows, healthy, _ = state
        if runs and healthy and not knows:
            return "every heartbeat succeeds, and the server does not know the worker: all it asks for fails, for ever"
        return None

    def good(self, state: State) -> bool:
        return state[1]


EXHIBIT = Exhibit(
    title="The restart between two heartbeats",
    protocol="lifecycle",
    public="LMCache/LMCache #4642",
    rule="a heartbeat asks whether somebody answers, not who; registration follows only a heartbeat that failed",
    broken=Pinged,
    mended=lambda: Lifecycle(engines=1, restarts="without state"),
    story_steps=3,
)

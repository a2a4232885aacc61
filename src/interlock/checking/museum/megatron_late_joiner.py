"""An engine that joins a paused fleet is told nothing: it is sent requests, runs them, and dies of the next UNPAUSE."""

from __future__ import annotations

from collections.abc import Iterable

from interlock.checking.explorer import Broken, World
from interlock.checking.gallery import Exhibit
from interlock.checking.lifecycle_world import Lifecycle
from interlock.checking.worlds.lifecycle import A_PAUSES

State = tuple[str, str, str, bool]
"""The coordinator's state, engine 0's, the newcomer's ("" before it registers), whether PAUSE is on its way."""


class Untold(World[State]):
    """One engine that runs, one that registers at any time, and a client that pauses once."""

    protocol, name = "lifecycle", "1 engine, 1 joiner, PAUSE"
    budget = {"joiners": 1}

    def initial(self) -> Iterable[State]:
        yield "RUNNING", "RUNNING", "", False

    def steps(self, state: State) -> Iterable[tuple[str, State | Broken]]:
        coordinator, engine, newcomer, sent = state
        if coordinator == "RUNNING":
            told = "RUNNING" if newcomer == "RUNNING" else newcomer
            yield "a client asks: PAUSE", ("PAUSED", engine, told, True)
        if sent:
            yield "engine 0 hears PAUSE", (coordinator, "PAUSED", newcomer, False)
        if not newcomer:
            yield "an engine registers, RUNNING, and is told nothing", (coordinator, engine, "RUNNING", sent)
        elif newcomer == "RUNNING" and coordinator == "RUNNING":
            yield "the newcomer is sent a request", state
        elif newcomer == "RUNNING":
            yield "the newcomer is sent a request and runs it", (coordinator, engine, "BUSY", sent)

    def wrong(self, state: State) -> str | None:
        if state[0] == "PAUSED" and state[1] == "PAUSED" and state[2] == "BUSY":
            return "every engine that was told is PAUSED, and the newcomer runs; at UNPAUSE it will assert and exit"
        return None

    def good(self, state: State) -> bool:
        return state[0] == state[1] == "PAUSED"


EXHIBIT = Exhibit(
    title="The late joiner that is told nothing",
    protocol="lifecycle",
    public="NVIDIA/Megatron-LM, coordinator.py after #3563",
    rule="registration appends the engine to a list; the coordinator's state is told only when it changes",
    broken=Untold,
    mended=lambda: Lifecycle(A_PAUSES, engines=1, joiners=1),
    story_steps=4,
)

"""The coordinator takes a forwarded signal for an obeyed one; STOP meets an engine that is still pausing, and an assertion."""

from __future__ import annotations

from collections.abc import Iterable

from interlock.checking.explorer import Broken, World
from interlock.checking.gallery import Exhibit
from interlock.checking.lifecycle_world import Lifecycle
from interlock.checking.worlds.lifecycle import A_PAUSES, B_STOPS

State = tuple[str, tuple[str, ...], str]
"""What the coordinator believes, the signals on their way (in order), what the engine is."""
FORWARD = {("RUNNING", "PAUSE"): "PAUSED", ("PAUSED", "STOP"): "STOPPED"}
OBEY = {("RUNNING", "PAUSE"): "PAUSING", ("PAUSED", "STOP"): "STOPPED"}


class Predicted(World[State]):
    """One busy engine, one client that says PAUSE and then STOP."""

    protocol, name = "lifecycle", "1 busy engine, PAUSE then STOP"
    budget = {"faults": 0}

    def initial(self) -> Iterable[State]:
        yield "RUNNING", (), "RUNNING"

    def steps(self, state: State) -> Iterable[tuple[str, State | Broken]]:
        believed, signals, engine = state
        for (at, signal), then in FORWARD.items():
            if believed == at:
                yield (
                    f"the coordinator forwards {signal} and believes {then}",
                    (then, (*signals, signal), engine),
                )
        if signals:
            then = OBEY.get((engine, signals[0]), "")
            action = f"the engine takes {signals[0]} in {engine}"
            if then:
                yield action, (believed, signals[1:], then)
            else:
                yield (
                    action,
                    Broken(f"AssertionError: received {signals[0]} in state {engine}; the engine exits"),
                )
        if engine == "PAUSING":
            yield "the ranks agree and are PAUSED", (believed, signals, "PAUSED")

    def good(self, state: State) -> bool:
        return state[2] == "STOPPED"


EXHIBIT = Exhibit(
    title="PAUSE, then STOP, on a busy engine",
    protocol="lifecycle",
    public="NVIDIA/Megatron-LM, dynamic_engine.py after #3563",
    rule="the coordinator's state moves when a signal is forwarded; engines assert that each signal fits their own",
    broken=Predicted,
    mended=lambda: Lifecycle(A_PAUSES, B_STOPS, engines=1),
    story_steps=4,
)

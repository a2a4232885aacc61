"""Ranks agree on pausing by an all-reduce of their own, without a deadline: when one dies, the rest wait in it for ever."""

from __future__ import annotations

from collections.abc import Iterable

from interlock.checking.explorer import Broken, World
from interlock.checking.gallery import Exhibit
from interlock.checking.lockstep_world import Lockstep

State = tuple[str, ...]
"""Each rank: "running", "waiting" (its row is sent), "paused" or "dead"."""


class Consensus(World[State]):
    """Two ranks that each send a row and wait for all rows; one may die."""

    protocol, name = "lockstep", "2 ranks, one consensus, 1 death"
    budget = {"deaths": 1}

    def initial(self) -> Iterable[State]:
        yield "running", "running"

    def steps(self, state: State) -> Iterable[tuple[str, State | Broken]]:
        for rank, where in enumerate(state):
            if where == "running":
                yield f"rank {rank} sends its row and waits", _with(state, rank, "waiting")
            if where == "waiting" and "dead" not in state and "running" not in state:
                yield f"rank {rank} has all rows", _with(state, rank, "paused")
            if where in ("running", "waiting") and "dead" not in state:
                yield f"rank {rank} dies", _with(state, rank, "dead")

    def wrong(self, state: State) -> str | None:
        if "waiting" in state and "dead" in state:
            return "the survivor waits in the consensus for a row that nobody sends, and hears nothing else"
        return None

    def good(self, state: State) -> bool:
        return state == ("paused", "paused")


def _with(state: State, at: int, where: str) -> State:
    return (*state[:at], where, *state[at + 1 :])


EXHIBIT = Exhibit(
    title="The rank that dies during consensus",
    protocol="lockstep",
    public="NVIDIA/Megatron-LM, async_zmq_communicator.py after #3563",
    rule="pausing is agreed on by an all-reduce over all ranks, without sender, round or deadline",
    broken=Consensus,
    mended=lambda: Lockstep(ranks=2, steps=2, deaths=1),
    story_steps=2,
)

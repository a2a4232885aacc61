"""PAUSE is a signal that each rank obeys when it hears it: one stops, the other waits for it inside the collective."""

from __future__ import annotations

from collections.abc import Iterable

from interlock.checking.explorer import Broken, World
from interlock.checking.gallery import Exhibit
from interlock.checking.lockstep_world import Lockstep

Rank = tuple[int, str]
"""(steps finished, "between", "inside" or "paused")."""
State = tuple[tuple[Rank, ...], bool]
"""The ranks, and whether PAUSE was sent."""


class Signalled(World[State]):
    """Two ranks that meet in each step, and a signal that reaches them one after the other."""

    protocol, name, reaches = "lockstep", "2 ranks, 2 steps, one signal", False
    budget = {"pauses": 1}
    steps_max = 2

    def initial(self) -> Iterable[State]:
        yield ((0, "between"), (0, "between")), False

    def steps(self, state: State) -> Iterable[tuple[tuple[str, int], State | Broken]]:
        ranks, sent = state
        if not sent:
            yield ("sends PAUSE", -1), (ranks, True)
        for rank, (step, where) in enumerate(ranks):
            others = [other for number, other in enumerate(ranks) if number != rank]
            if where == "between":
                if step < self.steps_max:
                    yield ("enters step", rank), (_with(ranks, rank, (step, "inside")), sent)
                if sent:
                    yield ("hears PAUSE and stops", rank), (_with(ranks, rank, (step, "paused")), sent)
            elif where == "inside" and all(s > step or (s == step and w == "inside") for s, w in others):
                yield ("finishes step", rank), (_with(ranks, rank, (step + 1, "between")), sent)

    def wrong(self, state: State) -> str | None:
        for rank, (step, where) in enumerate(state[0]):
            if where == "paused" and any(s == step and w == "inside" for s, w in state[0]):
                return (
                    f"a rank is inside step {step + 1} and waits for rank {rank}, which has stopped before it"
                )
        return None

    def good(self, state: State) -> bool:
        return all(where == "paused" for _, where in state[0])

    def tell(self, state: State, action: tuple[str, int], after: State | Broken) -> str:  # noqa: ARG002
        what, rank = action
        if rank < 0:
            return f"the client {what}"
        return f"rank {rank} {what}" + (f" {state[0][rank][0] + 1}" if what.endswith("step") else "")


def _with(ranks: tuple[Rank, ...], at: int, rank: Rank) -> tuple[Rank, ...]:
    return (*ranks[:at], rank, *ranks[at + 1 :])


EXHIBIT = Exhibit(
    title="The signal that reaches one rank first",
    protocol="lockstep",
    public="NVIDIA/Megatron-LM #3563 (and later its switch disable_ep_consensus)",
    rule="a rank that hears PAUSE stops stepping, wherever the others are",
    broken=Signalled,
    mended=lambda: Lockstep(ranks=2, steps=2),
    story_steps=3,
)

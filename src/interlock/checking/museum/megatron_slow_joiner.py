"""The result of a consensus is published once; who has not finished subscribing never hears it."""

from __future__ import annotations

from collections.abc import Iterable

from interlock.checking.explorer import Broken, World
from interlock.checking.gallery import Exhibit
from interlock.checking.lockstep_world import Lockstep

State = tuple[bool, str, str]
"""Whether the subscription has arrived; the follower: "new", "waiting" or "done"; the leader: "collecting" or "done"."""


class Published(World[State]):
    """A leader that collects rows and publishes the result, and a follower that subscribed a moment ago."""

    protocol, name = "lockstep", "2 ranks, one all-reduce over PUSH and PUB"
    budget = {"losses": 0}

    def initial(self) -> Iterable[State]:
        yield False, "new", "collecting"

    def steps(self, state: State) -> Iterable[tuple[str, State | Broken]]:
        subscribed, follower, leader = state
        if not subscribed:
            yield "the follower's subscription arrives", (True, follower, leader)
        if follower == "new":
            yield "the follower sends its row and waits", (subscribed, "waiting", leader)
        if follower == "waiting" and leader == "collecting":
            yield (
                "the leader has all rows and publishes",
                (subscribed, "done" if subscribed else follower, "done"),
            )

    def wrong(self, state: State) -> str | None:
        if state[1:] == ("waiting", "done"):
            return "the result was published before the subscription was there; the follower waits for ever"
        return None

    def good(self, state: State) -> bool:
        return state[1:] == ("done", "done")


EXHIBIT = Exhibit(
    title="The slow PUB/SUB joiner",
    protocol="lockstep",
    public="NVIDIA/Megatron-LM, async_zmq_communicator.py after #3563 (8 of 200 first all-reduces measured)",
    rule="what ranks must hear is published once, to whoever is subscribed at that moment",
    broken=Published,
    mended=lambda: Lockstep(ranks=2, steps=1),
    story_steps=2,
)

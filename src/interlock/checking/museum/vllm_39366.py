"""The engine that asks for a wake-up is left out of the broadcast, for it must be awake; but it was paused."""

from __future__ import annotations

from collections.abc import Iterable

from interlock.checking.explorer import Broken, World
from interlock.checking.gallery import Exhibit
from interlock.checking.lockstep_world import Lockstep

State = tuple[tuple[str, ...], int, bool]
"""Each engine ("ignoring" wake-ups, "idle", "inside" the collective), who asked (-1: nobody), whether the wake is under way."""


class LeftOut(World[State]):
    """Two engines after a two-phase pause. They are resumed one after the other; a request reaches engine 0 meanwhile."""

    protocol, name = "lockstep", "2 paused engines, 1 request, resumed one by one"
    budget = {"requests": 1}

    def initial(self) -> Iterable[State]:
        yield ("ignoring", "ignoring"), -1, False

    def steps(self, state: State) -> Iterable[tuple[str, State | Broken]]:
        engines, asked, waking = state
        if asked < 0:
            begins = "idle" if engines[0] == "ignoring" else "inside"
            said = "queues it" if begins == "idle" else "begins"
            first = engines if begins == "idle" else _with(engines, 0, "inside")
            yield f"a request reaches engine 0, which {said} and asks for the others", (first, 0, True)
        for number, engine in enumerate(engines):
            if engine == "ignoring":
                yield f"engine {number} is resumed", (_with(engines, number, "idle"), asked, waking)
            if waking and number != asked:
                hears = engine == "idle"
                after = _with(engines, number, "inside") if hears else engines
                said = "enters the collective" if hears else "ignores it"
                yield f"engine {number} hears the wake-up and {said}", (after, asked, False)

    def wrong(self, state: State) -> str | None:
        engines, asked, waking = state
        if engines == ("idle", "inside") and asked == 0 and not waking:
            return (
                "engine 1 waits in the collective for engine 0, which asked for it and was not woken itself"
            )
        return None

    def good(self, state: State) -> bool:
        return state[0] == ("inside", "inside")


def _with(engines: tuple[str, ...], at: int, engine: str) -> tuple[str, ...]:
    return (*engines[:at], engine, *engines[at + 1 :])


EXHIBIT = Exhibit(
    title="The sender left out of its own wake-up",
    protocol="lockstep",
    public="vllm-project/vllm #39366 (review)",
    rule="a wake-up is broadcast once, to all but the engine that asked for it; paused engines ignore it",
    broken=LeftOut,
    mended=lambda: Lockstep(ranks=2, steps=2, proceeds=2),
    story_steps=4,
)

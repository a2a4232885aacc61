"""Walks every state of a world and says what is wrong with it, as the shortest story that shows it.

A *world* is some cores of one protocol, the set of all messages ever sent, and what is left of a budget of faults. A network
that loses, repeats and reorders needs no code of its own: a message in the set may be delivered now, later, twice or never.
Time is an action like any other: a deadline *may* pass whenever one stands.

What is checked.
* Safety: `wrong(state)` of each state, and each step that ends `Broken` or raises.
* A good end stays reachable from every state (in CTL: AG EF good). Found backwards from the good states.
* In worlds with `reaches` (fault-free ones) a good end *is* reached on every path: no path ends elsewhere, and none goes
  round for ever elsewhere unless it starves an action, that is, never takes one that could be taken all the time (weak
  fairness). Symmetry is not reduced there, for renaming actors would blur whose action starves.

States are visited breadth first, so a story is as short as any. `exhausted` says whether the whole world was seen.

Writing a world: subclass `World`, give states any hashable form; tuples of ints are the fastest (interlock.checking.parts has
what turns cores and messages into ints). An example, whole: one asks, one answers once; the asker may ask twice.

>>> class Asking(World[tuple[bool, int]]):
...     protocol, name, budget = "asking", "one question", {"losses": "any"}
...
...     def initial(self):
...         yield (
...             False,
...             0,
...         )  # is it answered, and the set of all messages ever sent as bits: 1 question, 2 answer
...
...     def steps(self, state):
...         answered, sent = state
...         if not answered:
...             yield "the asker asks", (answered, sent | 1)
...         if sent & 1:
...             yield "the answerer answers", (answered, sent | 2)
...         if sent & 2:
...             yield "the answer arrives", (True, sent)
...
...     def wrong(self, state):
...         answered, sent = state
...         return "an answer to no question" if sent & 2 and not sent & 1 else None
...
...     def good(self, state):
...         return state[0]
>>> result = explore(Asking())
>>> result.states, result.edges, result.exhausted, result.violation
(4, 8, True, None)

`steps` yields pairs (action, next state); a step that changes nothing may be left out or not (it counts as an edge). An action is any hashable; it
is turned into words by `tell` only when a story is printed, so let it be cheap. A step that breaks the protocol's own rules
yields `Broken("what it says")` instead of a state; an exception that escapes `steps` is reported too, with less of its story.

Two reductions, both through `canonical(state)`: it may rename interchangeable actors (return the least of their
permutations) and drop what is dead (messages that change nothing in this and every later state). `explore(world,
reduce=False)` goes without; where both can be run they must agree.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from interlock.checking.fairness import unfair_component

S = TypeVar("S", bound=Hashable)


class Broken(msgspec.Struct, frozen=True):
    """Where a step leads that must not exist: `why` says what was broken."""

    why: str


class World(ABC, Generic[S]):
    """A finite world to explore. `S` is the form of its states: hashable, equal when nothing tells them apart."""

    protocol: str
    """The protocol it belongs to: "joins"."""
    name: str
    """What it holds, in a line: "3 ranks, 2 attempts, 1 rank lost"."""
    budget: Mapping[str, int | str]
    """What may happen, and how often: {"crashes": 1}."""
    reaches: bool = False
    """A good end is not only reachable but reached: for worlds without faults."""

    @abstractmethod
    def initial(self) -> Iterable[S]: ...

    @abstractmethod
    def steps(self, state: S) -> Iterable[tuple[Hashable, S | Broken]]:
        """Everything that may happen next."""

    @abstractmethod
    def good(self, state: S) -> bool:
        """Whether this is an end to be proud of. Other steps may follow it."""

    def wrong(self, state: S) -> str | None:  # noqa: ARG002
        """What must never be, in words; None while all is well."""
        return None

    def canonical(self, state: S) -> S:
        """The one state that stands for all that are like this one."""
        return state

    def tell(self, state: S, action: Any, after: S | Broken) -> str:  # noqa: ARG002
        """The step in the protocol's words."""
        return str(action)


class Violation(msgspec.Struct, frozen=True):
    """`kind`: "safety", "stuck" (no good end can be reached any more) or "endless" (a good end need not be reached)."""

    kind: str
    what: str
    story: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{number:3}. {line}" for number, line in enumerate(self.story, 1)]
        return "\n".join([*lines, f"  => {self.what}"])


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What one exploration saw. `depth`: the longest of the shortest stories."""

    protocol: str
    name: str
    budget: dict[str, int | str]
    states: int
    edges: int
    depth: int
    good_states: int
    seconds: float
    cpu_seconds: float
    exhausted: bool
    violation: Violation | None

    def __str__(self) -> str:
        rate = self.edges / max(self.cpu_seconds, 1e-9)
        end = "VIOLATED" if self.violation else "exhausted" if self.exhausted else "NOT exhausted"
        return (
            f"{self.protocol}: {self.name}: {self.states:,} states, {self.edges:,} edges, depth {self.depth}, "
            f"{self.seconds:.1f} s ({rate:,.0f} edges a CPU second), {end}"
        )


Progress = Callable[[int, int, int, float], None]
"""Told (states, edges, depth, seconds) about twice a second."""
_LOOK_EVERY_STATES = 4096


def explore(
    world: World[S],
    *,
    reduce: bool = True,
    states_max: int = 20_000_000,
    seconds_max: float = 3600.0,
    progress: Progress | None = None,
) -> Result:
    """Walks `world` until all of it was seen, something is wrong, or a bound is met (`exhausted` is False then)."""
    collecting = gc.isenabled()
    gc.disable()  # Millions of tuples that all stay: looking through them for cycles is half of the time.
    try:
        return _Walk(world, reduce, states_max, seconds_max, progress).run()
    finally:
        if collecting:
            gc.enable()


class _Walk(Generic[S]):
    def __init__(
        self,
        world: World[S],
        reduce: bool,
        states_max: int,
        seconds_max: float,
        progress: Progress | None,
    ) -> None:
        self.world = world
        reducible = type(world).canonical is not World.canonical
        self.canonical: Callable[[S], S] | None = (
            world.canonical if reduce and reducible and not world.reaches else None
        )
        self.states_max = states_max
        self.seconds_max = seconds_max
        self.progress = progress
        self.states: list[S] = []
        self.index: dict[S, int] = {}
        self.parents = array("l")
        self.sources = array("l")
        self.targets = array("l")
        self.good = bytearray()
        self.edges = 0
        self.depth = 0
        self.exhausted = False

    def run(self) -> Result:
        begun, cpu_begun = time.perf_counter(), time.process_time()
        violation = self._walk(begun)
        if violation is None and self.exhausted:
            violation = self._check_ends()
        return Result(
            protocol=self.world.protocol,
            name=self.world.name,
            budget=dict(self.world.budget),
            states=len(self.states),
            edges=self.edges,
            depth=self.depth,
            good_states=sum(self.good),
            seconds=time.perf_counter() - begun,
            cpu_seconds=time.process_time() - cpu_begun,
            exhausted=self.exhausted,
            violation=violation,
        )

    def _enter(self, state: S, parent: int) -> str | None:
        """Notes a new state; returns what is wrong with it."""
        self.states.append(state)
        self.parents.append(parent)
        self.good.append(bool(self.world.good(state)))
        return self.world.wrong(state)

    def _walk(self, begun: float) -> Violation | None:
        """Breadth first. The loop is the program's hot spot: locals, one hash per edge, nothing copied."""
        for first in self.world.initial():
            state = self.canonical(first) if self.canonical is not None else first
            if self.index.setdefault(state, len(self.states)) == len(self.states):
                found = self._enter(state, -1)
                if found is not None:
                    return self._violation("safety", found, len(self.states) - 1)
        steps, canonical = self.world.steps, self.canonical
        states, setdefault = self.states, self.index.setdefault
        add_source, add_target = self.sources.append, self.targets.append
        known = layer_end = len(states)
        at = 0
        looked = begun
        while at < known:
            if at == layer_end:
                self.depth += 1
                layer_end = known
            if at % _LOOK_EVERY_STATES == 0:
                now = time.perf_counter()
                if now - begun > self.seconds_max or known > self.states_max:
                    return None
                if self.progress is not None and now - looked > 0.5:
                    looked = now
                    self.progress(known, self.edges, self.depth, now - begun)
            state = states[at]
            edges = 0
            wrong: tuple[Any, ...] | None = None
            try:
                for action, after in steps(state):
                    edges += 1
                    if type(after) is Broken:
                        wrong = (after.why, at, action, after)
                        break
                    if canonical is not None:
                        after = canonical(after)  # type: ignore[arg-type]
                    target = setdefault(after, known)  # type: ignore[arg-type]
                    if target == known:
                        known += 1
                        found = self._enter(after, at)  # type: ignore[arg-type]
                        if found is not None:
                            wrong = (found, target)
                            break
                    if target != at:
                        add_source(at)
                        add_target(target)
            except Exception as error:
                wrong = (f"a step raised {type(error).__name__}: {error}", at)
            self.edges += edges
            if wrong is not None:
                return self._violation("safety", *wrong)
            at += 1
        self.exhausted = True
        return None

    def _check_ends(self) -> Violation | None:
        """From every state a good end can be reached; with `reaches`, none can be avoided."""
        sources, targets = _as_numbers(self.sources), _as_numbers(self.targets)
        saved = np.frombuffer(self.good, dtype=np.uint8).astype(bool)
        while True:
            hit = sources[saved[targets]]
            if saved[hit].all():
                break
            saved[hit] = True
        if not saved.all():
            trap = int(np.argmin(saved))  # The first in breadth-first order has the shortest story.
            return self._violation("stuck", "from here no good end can be reached any more", trap)
        if not self.world.reaches:
            return None
        circle = unfair_component(self.good, self.sources, self.targets, self._actions)
        if circle is None:
            return None
        return self._violation("endless", f"{len(circle)} states can be walked round for ever", min(circle))

    def _actions(self, at: int) -> list[tuple[Hashable, int]]:
        return [
            (action, self.index[after])
            for action, after in self.world.steps(self.states[at])
            if not isinstance(after, Broken)
        ]

    # --- stories -------------------------------------------------------------------------------------------------

    def _violation(
        self, kind: str, what: str, at: int, action: Hashable = None, after: S | Broken | None = None
    ) -> Violation:
        path = [at]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        path.reverse()
        state, story = self._retell([self.states[number] for number in path])
        if isinstance(after, Broken):
            action, after = next(
                ((act, nxt) for act, nxt in self.world.steps(state) if isinstance(nxt, Broken)),
                (action, after),
            )
            story.append(self.world.tell(state, action, after))
        return Violation(kind, what, tuple(story))

    def _retell(self, path: list[S]) -> tuple[S, list[str]]:
        """Walks the path again in real states: a canonical state may have changed the actors' names on the way."""
        story: list[str] = []
        canonical = self.canonical or (lambda same: same)
        state = next(first for first in self.world.initial() if canonical(first) == path[0])
        for wanted in path[1:]:
            for action, after in self.world.steps(state):
                if not isinstance(after, Broken) and canonical(after) == wanted:
                    story.append(self.world.tell(state, action, after))
                    state = after
                    break
            else:
                raise AssertionError(
                    f"{self.world.protocol}: canonical() is no renaming: a story cannot be told again"
                )
        return state, story


def _as_numbers(numbers: array[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.frombuffer(numbers, dtype=np.int64) if numbers else np.empty(0, dtype=np.int64)

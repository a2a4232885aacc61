"""What is explored of core/snapshots: requests whose ids are used again, on a disk that shows where each byte ends up.

The actors: an owner, who saves, loads, promotes and erases in any order, and begins the next life of an id after each erasure;
writers, who write what was queued at any time and in any order, and report later; loaders, who read at any time and ask again
later; the reaper; the three metadata calls under a scope's lock, between whose begin and end all that needs no lock may
happen; erase_all in its three steps. A write may fail, a metadata call may fail, and the process may die at any moment, its power
cut or not: all memory is gone then, and the next life adopts what the owner names.

Each scope with its directories, writers and loader is a part of its own (checking/scope_model); they share the root, the process's
life and the budget. What a part may do depends on itself and on these only, so it is worked out once for each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from interlock.checking.diagrams import Diagram, from_table
from interlock.checking.explorer import Broken, World
from interlock.checking.parts import Machine
from interlock.checking.scope_model import (
    CRASH,
    ERASE_ALL,
    FAULTS,
    LIVE,
    Common,
    Local,
    ScopeModel,
)
from interlock.core import snapshots
from interlock.core.snapshot_state import Phase

Transition = Callable[[Any, Any], tuple[Any, tuple[Any, ...]]]
State = tuple[int, ...]
"""The number of what is common, then that of each scope."""


class Snapshots(World[State]):
    """`lives[s]`: how many lives the id of scope s has; it may be erased as often. `reads`: there are loaders and promotions."""

    protocol = "snapshots"
    Model: type[ScopeModel] = ScopeModel

    def __init__(
        self,
        *,
        lives: Sequence[int] = (3, 1),
        failed_writes: int = 0,
        failed_calls: int = 0,
        crashes: int = 0,
        erase_alls: int = 0,
        reads: bool = True,
        transition: Transition = snapshots.transition,
        is_reduced: bool = True,
    ) -> None:
        self.is_reduced = is_reduced
        faults = (failed_writes, failed_calls, crashes, erase_alls)
        uses = ", ".join(f"id {name} in {count} lives" for name, count in zip("ABC", lives, strict=False))
        only = "" if reads else ", only saved and erased"
        self.name = f"{len(lives)} scope{'s' * (len(lives) > 1)}: {uses}{only}"
        self.budget = dict(zip(FAULTS, faults, strict=True))
        self.reaches = not any(faults)
        self.machine: Machine[Any, Any, Any] = Machine(transition)
        self.models = [
            self.Model(name, count, reads, self.machine) for name, count in zip("ABC", lives, strict=False)
        ]
        self._parts: list[Any] = []
        self._numbers: dict[Any, int] = {}
        self._made: dict[tuple[int, int, int], list[tuple[Any, int | Broken, int]]] = {}
        self._judged: dict[tuple[int, int, int], tuple[str | None, bool]] = {}
        self._dead: dict[tuple[int, int, int], int | Broken] = {}
        self.start: State = (
            self._number(Common(0, 1, faults)),
            *(self._number(model.start()) for model in self.models),
        )

    def initial(self) -> Iterable[State]:
        return [self.start]

    def _number(self, part: Local | Common) -> int:
        known = self._numbers.setdefault(part, len(self._parts))
        if known == len(self._parts):
            self._parts.append(part)
        return known

    # --- what may happen -----------------------------------------------------------------------------------------

    def steps(self, state: State) -> Iterable[tuple[Any, State | Broken]]:
        common = state[0]
        for scope, number in enumerate(state[1:]):
            key = (scope, number, common)
            made = self._made.get(key)
            if made is None:
                made = self._made[key] = self._steps_of(*key)
            before, behind = state[1 : scope + 1], state[scope + 2 :]
            for action, after, shared in made:
                yield action, after if isinstance(after, Broken) else (shared, *before, after, *behind)
        left = self._parts[common].left
        if left[ERASE_ALL] or self._parts[common].root:
            yield from self._erase_all(state)
        if left[CRASH]:
            yield ("crash",), self._crash(state)

    def _steps_of(self, scope: int, number: int, common: int) -> list[tuple[Any, int | Broken, int]]:
        steps = self.models[scope].steps(self._parts[number], self._parts[common])
        return [
            (action, self._settled(scope, after, shared), self._number(shared))
            for action, after, shared in steps
        ]

    def _settled(self, scope: int, local: Local | Broken, common: Common) -> int | Broken:
        """The number of what this scope has become, judged before what is dead is left out of it."""
        if isinstance(local, Broken):
            return local
        wrong = self.models[scope].wrong(local, common)
        if wrong is not None:
            return Broken(wrong)
        return self._number(self.models[scope].reduced(local) if self.is_reduced else local)

    def _erase_all(self, state: State) -> Iterable[tuple[Any, State | Broken]]:
        """Its first step, and its last; the one between them is each scope's own."""
        common: Common = self._parts[state[0]]
        locals_: list[Local] = [self._parts[number] for number in state[1:]]
        if common.left[ERASE_ALL]:
            switched = common.spent(ERASE_ALL)._replace(root=common.root + 1)
            yield ("switch",), (self._number(switched), *state[1:])
        have_heard = all(
            model.core(local).root == common.root for model, local in zip(self.models, locals_, strict=True)
        )
        old = any(each.place == LIVE and each.root < common.root for local in locals_ for each in local.disk)
        if have_heard and old:
            renamed = (
                model.root_renamed(local, common.root)
                for model, local in zip(self.models, locals_, strict=True)
            )
            yield ("rename root",), (state[0], *map(self._number, renamed))

    def _crash(self, state: State) -> State | Broken:
        common: Common = self._parts[state[0]]
        after = common.spent(CRASH)._replace(incarnation=common.incarnation + 1, root=common.root + 1)
        numbers = []
        for model, number in zip(self.models, state[1:], strict=True):
            local = self._crashed(model, number, after)
            if isinstance(local, Broken):
                return local
            numbers.append(local)
        return (self._number(after), *numbers)

    def _crashed(self, model: ScopeModel, number: int, after: Common) -> int | Broken:
        scope = self.models.index(model)
        key = (scope, number, self._number(after))
        if key not in self._dead:
            self._dead[key] = self._settled(scope, model.crashed(self._parts[number], after), after)
        return self._dead[key]

    # --- what must hold ------------------------------------------------------------------------------------------

    def _judge(self, scope: int, number: int, common: int) -> tuple[str | None, bool]:
        key = (scope, number, common)
        judged = self._judged.get(key)
        if judged is None:
            model, local, shared = self.models[scope], self._parts[number], self._parts[common]
            is_over = not self.reaches or model.core(local).phase in (Phase.EMPTY, Phase.LIVE)
            judged = model.wrong(local, shared), is_over and model.is_quiet(local, shared)
            self._judged[key] = judged
        return judged

    def wrong(self, state: State) -> str | None:
        for scope, number in enumerate(state[1:]):
            wrong = self._judge(scope, number, state[0])[0]
            if wrong is not None:
                return wrong
        return None

    def good(self, state: State) -> bool:
        """Nothing is under way, the trash is empty, what is charged is what is kept."""
        return all(self._judge(scope, number, state[0])[1] for scope, number in enumerate(state[1:]))

    def tell(self, state: State, action: tuple[Any, ...], after: State | Broken) -> str:
        what, *rest = action
        words: dict[str, Callable[[], str]] = {
            "save": lambda: f"{rest[0]} is saved in life {rest[1]} of the id",
            "erase": lambda: f"{rest[0]} is erased: life {rest[1]} of the id is over",
            "promote": lambda: f"{rest[0]} is to be promoted",
            "load": lambda: f"{rest[0]} is loaded",
            "call": lambda: f"the call that {rest[0]}'s lock covers is done ({rest[1]})",
            "call fails": lambda: f"the call that {rest[0]}'s lock covers fails ({rest[1]})",
            "read": lambda: f"the loader reads {rest[0]}'s file",
            "check": lambda: f"the loader asks {rest[0]}'s scope again and returns",
            "write": lambda: f"a writer writes {rest[0]} of life {rest[1]}",
            "write fails": lambda: f"the write of {rest[0]} of life {rest[1]} fails",
            "ended": lambda: f"the writer of {rest[0]} of life {rest[1]} reports",
            "reap": lambda: f"the reaper removes {rest[1]}",
            "switch": lambda: "erase_all: new scopes stand under the next root",
            "root moved": lambda: f"erase_all: {rest[0]} hears of it",
            "rename root": lambda: "erase_all: the old root is renamed to the trash",
            "crash": lambda: "the process dies and is back",
        }
        said = words[what]()
        if isinstance(after, Broken):
            return said
        pairs = zip(self.models, state[1:], after[1:], strict=True)
        told = [
            (m.name, self._parts[a].told) for m, b, a in pairs if self._parts[b].told != self._parts[a].told
        ]
        return said + "".join(f"; {name}: {now}" for name, now in told if now != "nothing")


def worlds(budget: Literal["small", "full"]) -> Sequence[World[Any]]:
    """Full: two scopes, an id reused twice, a failed write, a crash; and with erase_all or failing calls, ids used less often."""
    if budget == "small":
        return [Snapshots(lives=(2, 1)), Snapshots(lives=(2,), failed_writes=1, crashes=1)]
    return [
        Snapshots(lives=(3, 1)),
        Snapshots(lives=(2,), failed_writes=1, failed_calls=1, crashes=1),
        Snapshots(lives=(2,), failed_calls=1, crashes=1, erase_alls=1),
        Snapshots(lives=(2, 1), erase_alls=1, failed_writes=1),
        Snapshots(lives=(3, 1), failed_writes=1, crashes=1),
    ]


def diagrams() -> dict[str, Diagram]:
    return {
        "snapshots": Diagram(
            "One scope of the snapshot store (core/snapshots)",
            tuple(Phase),
            from_table(snapshots.TABLE),
            initial=Phase.EMPTY,
            final=(Phase.CLOSED,),
        )
    }

"""Finds the worlds and the exhibits by listing their packages, and walks them.

A protocol's worlds are a module in checking/worlds/ with a function `worlds(budget)`, where `budget` is "small" (what a
test run can afford) or "full" (the stated minimum). An exhibit is a module in checking/museum/ with a constant `EXHIBIT`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Literal

import msgspec

from interlock.checking import museum as museum_package
from interlock.checking import worlds as worlds_package
from interlock.checking.explorer import Progress, Result, World, explore

Budget = Literal["small", "full"]


class Exhibit(msgspec.Struct, frozen=True, kw_only=True):
    """One public race. `broken` builds the world with the historical rule, `mended` the same world with ours.

    `public`: where anybody can read of it ("alibaba/tair-kvcache #208"). `rule`: what the system did. `story_steps`: the
    length of the shortest story that shows it, which a test holds us to. `kind`: see `explorer.Violation`.
    """

    title: str
    protocol: str
    public: str
    rule: str
    broken: Callable[[], World[Any]]
    mended: Callable[[], World[Any]]
    story_steps: int
    kind: str = "safety"


class Visit(msgspec.Struct, frozen=True):
    """An exhibit as explored: the historical rule must be violated as stated, ours be exhausted without violation."""

    exhibit: Exhibit
    broken: Result
    mended: Result

    @property
    def as_stated(self) -> bool:
        violation = self.broken.violation
        return (
            violation is not None
            and violation.kind == self.exhibit.kind
            and len(violation.story) == self.exhibit.story_steps
            and self.mended.exhausted
            and self.mended.violation is None
        )

    def __str__(self) -> str:
        found = self.broken.violation
        exhibit = self.exhibit
        story = "NOT FOUND" if found is None else f"found in {len(found.story)} steps:\n{found}"
        return f"{exhibit.title} ({exhibit.public})\n  rule: {exhibit.rule}\n{story}\n  ours: {self.mended}"


def protocols() -> list[str]:
    """Names of the protocols that have worlds."""
    return sorted(info.name for info in pkgutil.iter_modules(worlds_package.__path__))


def worlds_of(protocol: str, budget: Budget) -> Sequence[World[Any]]:
    """The worlds of one protocol. Raises `ValueError` for a protocol without worlds."""
    if protocol not in protocols():
        raise ValueError(f"there is no protocol {protocol!r}; there are {', '.join(protocols())}")
    module = importlib.import_module(f"{worlds_package.__name__}.{protocol}")
    found: Sequence[World[Any]] = module.worlds(budget)
    return found


def explore_all(
    names: Sequence[str],
    budget: Budget,
    *,
    seconds_max: float = 600.0,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Walks all worlds of the protocols `names`, `jobs` at a time in processes of their own; results in their order."""
    tasks = [(name, budget, at, seconds_max) for name in names for at in range(len(worlds_of(name, budget)))]
    if jobs == 1:
        for name, _, at, _ in tasks:
            yield explore(worlds_of(name, budget)[at], seconds_max=seconds_max, progress=progress)
        return
    # Spawned, not forked: a child that inherits a big heap pays for every page it touches.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        yield from pool.map(_explore_one, tasks)


def _explore_one(task: tuple[str, Budget, int, float]) -> Result:
    name, budget, at, seconds_max = task
    return explore(worlds_of(name, budget)[at], seconds_max=seconds_max)


def exhibits() -> list[Exhibit]:
    names = sorted(info.name for info in pkgutil.iter_modules(museum_package.__path__))
    modules = [importlib.import_module(f"{museum_package.__name__}.{name}") for name in names]
    return [module.EXHIBIT for module in modules if hasattr(module, "EXHIBIT")]


def visit(exhibit: Exhibit, *, seconds_max: float = 600.0, progress: Progress | None = None) -> Visit:
    """Explores both worlds of an exhibit."""
    broken = explore(exhibit.broken(), seconds_max=seconds_max, progress=progress)
    return Visit(exhibit, broken, explore(exhibit.mended(), seconds_max=seconds_max, progress=progress))

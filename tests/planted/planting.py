"""Planted bugs: one function of ours with a few words changed, in memory, for the length of a test.

A plant names the function, the words and what stands in their place; words that are not there exactly once fail the test, so
that a plant cannot wither in silence when the code moves on.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from interlock.testing.sim import disk
from interlock.testing.sim.faults import Fault, Shape
from interlock.testing.sim.runs import run_seed
from interlock.testing.sim.worlds import Result, run_world


class Plant(msgspec.Struct, frozen=True, kw_only=True):
    """One bug. `kinds`: the faults it takes. `found_at`: the first seed from 0 on that found it, when it was planted; a schedule
    may change with the code, so the test looks from shortly before that up to `seeds_max`."""

    story: str
    where: str
    """module:Class.function"""
    old: str
    new: str
    kinds: Sequence[str]
    found_at: int
    seeds_max: int
    plan: Sequence[Fault] = ()
    """A plan for it by hand, in `shape`; seeds are then draws of everything else."""
    shape: Shape | None = None

    def run(self, seed: int) -> Result:
        if self.shape is None:
            return run_seed(seed, self.kinds)
        return run_world(0, self.shape, self.plan, None, luck=seed)


def plant(bug: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    module_name, path = bug.where.split(":")
    if module_name == "interlock.host.files":
        _plant_in_files(bug, path.split(".")[-1], monkeypatch)
        return
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    monkeypatch.setattr(owner, name, _changed(inspect.getattr_static(owner, name), bug))


def _changed(function: Any, bug: Plant) -> Any:
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(bug.old) == 1, f"{bug.where} has {bug.old!r} {source.count(bug.old)} times"
    namespace: dict[str, Any] = {}
    code = compile(
        "from __future__ import annotations\n" + source.replace(bug.old, bug.new),
        f"<{bug.where}, planted>",
        "exec",
    )
    scope = function.__globals__
    before = scope.get(function.__name__)
    exec(code, scope, namespace)
    assert scope.get(function.__name__) is before
    return namespace[function.__name__]


def _plant_in_files(bug: Plant, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk runs a copy of that module, so the copy is changed."""
    original = disk.files_on

    def planted(calls: disk.SystemCalls) -> Any:
        files = original(calls)
        setattr(type(files), name, _changed(getattr(type(files), name), bug))
        return files

    monkeypatch.setattr("interlock.testing.sim.host.files_on", planted)

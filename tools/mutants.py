"""Mutation of conditions in core/: is there a test that fails for each condition that is wrong?

    tools/mutants [module …]        modules of src/interlock/core, for example `joins sessions`; all when left out

A mutant differs from the source in one condition: a comparison turned round or moved by one, `and` for `or`, a test that is
always true or always false, a dropped `not`. It is *killed* when a unit test of its module fails (`tests_of`)
or when a small world of a protocol that uses the module shows a violation within two seconds. Survivors are printed; each is a
missing test, or a condition that makes no difference and could say so.

Every mutant runs in a child that was forked after the heavy imports and before those of core.
"""

from __future__ import annotations

import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import msgspec
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "src" / "interlock" / "core"
WORLDS = ROOT / "src" / "interlock" / "checking" / "worlds"
PRELOADED = (hypothesis, msgspec, np, pytest)
CHILD_SECONDS_MAX = 120
SURVIVED, KILLED_BY_TEST, KILLED_BY_EXPLORER = 0, 10, 11

TURNED = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}


def mutants_of(source: str) -> Iterator[tuple[int, str, str, ast.Module]]:
    """(line, what stood there, what stands there now, whole mutated module) for each mutant, in order of the source."""
    tree = ast.parse(source)
    for number, node in enumerate(ast.walk(tree)):
        for changed in _changes(node):
            mutated = copy.deepcopy(tree)
            target = next(n for at, n in enumerate(ast.walk(mutated)) if at == number)
            for field, value in changed.items():
                setattr(target, field, value)
            ast.fix_missing_locations(mutated)
            line = getattr(node, "lineno", 0) or getattr(getattr(node, "test", None), "lineno", 0)
            yield line, _short(node), _short(target), mutated


def _changes(node: ast.AST) -> Iterator[dict[str, object]]:
    if isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            for other in TURNED.get(type(operator), []):
                yield {"ops": [*node.ops[:at], other(), *node.ops[at + 1 :]]}
    elif isinstance(node, ast.BoolOp):
        yield {"op": ast.Or() if isinstance(node.op, ast.And) else ast.And()}
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield {"op": ast.UAdd(), "operand": ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])}
    elif isinstance(node, ast.If | ast.IfExp) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield {"test": ast.Constant(True)}
        yield {"test": ast.Constant(False)}
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield {"ifs": []}


def _short(node: ast.AST) -> str:
    if isinstance(node, ast.If | ast.IfExp):
        return f"if {ast.unparse(node.test)}"
    if isinstance(node, ast.comprehension):
        return ast.unparse(node).strip()
    return ast.unparse(node)


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module from a changed tree, all others as they are."""

    def __init__(self, name: str, tree: ast.Module, path: Path) -> None:
        self.name, self.tree, self.path = name, tree, path

    def find_spec(
        self, name: str, _path: object, _target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.util.spec_from_loader(name, self, origin=str(self.path)) if name == self.name else None
        )

    def exec_module(self, module: object) -> None:
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


def verdict_of(module: str, tree: ast.Module, tests: list[str], protocols: list[str]) -> int:
    """Runs one mutant in a child of its own."""
    child = os.fork()
    if child == 0:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        try:
            os._exit(_judge(module, tree, tests, protocols))
        except BaseException:  # A mutant that cannot even be imported is noticed.
            os._exit(KILLED_BY_TEST)
    deadline = time.monotonic() + CHILD_SECONDS_MAX
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return KILLED_BY_TEST  # It hangs, and so would its test.


def _judge(module: str, tree: ast.Module, tests: list[str], protocols: list[str]) -> int:
    sys.meta_path.insert(0, _Mutated(f"interlock.core.{module}", tree, CORE / f"{module}.py"))
    hypothesis.settings.register_profile("mutants", database=None, derandomize=True)
    hypothesis.settings.load_profile("mutants")
    if tests and pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]) != 0:
        return KILLED_BY_TEST
    from interlock.checking.explorer import explore
    from interlock.checking.gallery import worlds_of

    until = time.monotonic() + 2.0
    for protocol in protocols:
        for world in worlds_of(protocol, "small"):
            left = until - time.monotonic()
            if left > 0 and explore(world, seconds_max=left).violation is not None:
                return KILLED_BY_EXPLORER
    return SURVIVED


def tests_of(module: str) -> list[str]:
    """Named after it, or after the module that it is a part of (`snapshot_state` of `snapshots`), or importing it."""
    family = re.escape(module.partition("_")[0])
    named = re.compile(rf"test_({re.escape(module)}.*|{family}s?)\.py")
    return sorted(
        str(test)
        for test in (ROOT / "tests" / "core").glob("test_*.py")
        if named.fullmatch(test.name) or re.search(rf"\bcore\.{module}\b", test.read_text())
    )


def main() -> int:
    os.chdir(ROOT)
    modules = sys.argv[1:] or sorted(
        path.stem for path in CORE.glob("*.py") if path.stem not in ("__init__", "limits", "errors")
    )
    survivors, total, by_explorer = [], 0, 0
    for module in modules:
        path = CORE / f"{module}.py"
        tests = tests_of(module)
        protocols = sorted(
            world.stem for world in WORLDS.glob("*.py") if re.search(rf"\b{module}\b", world.read_text())
        )
        if verdict_of(module, ast.parse(path.read_text()), tests, protocols) != SURVIVED:
            print(
                f"{module}: its tests or worlds fail without any mutation; mend them first", file=sys.stderr
            )
            return 2
        count = killed = 0
        for line, was, now, tree in mutants_of(path.read_text()):
            count += 1
            verdict = verdict_of(module, tree, tests, protocols)
            by_explorer += verdict == KILLED_BY_EXPLORER
            if verdict == SURVIVED:
                survivors.append(f"core/{module}.py:{line}: {was}  ->  {now}")
                print(f"  survived  {survivors[-1]}", flush=True)
            else:
                killed += 1
        total += count
        print(f"{module}: {killed} of {count} mutants killed", flush=True)
    print(
        f"together: {total - len(survivors)} of {total} killed, {by_explorer} of them by the explorer alone"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The rules of DESIGN §4, enforced: arrows between packages, purity of core, the seam, heavy and unsafe imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "interlock"

# Each package may import itself, core, and what is named here. `cli` imports any package, lazily.
ARROWS: dict[str, set[str]] = {
    "core": set(),
    "host": set(),
    "telemetry": {"host"},
    "wire": {"telemetry", "host"},
    "membership": {"wire", "telemetry", "host"},
    "transfer": {"membership", "wire", "telemetry", "host"},
    "store": {"transfer", "membership", "wire", "telemetry", "host"},
    "snapshots": {"store", "transfer", "membership", "wire", "telemetry", "host"},
    "connectors": {"store", "transfer", "membership", "wire", "telemetry", "host"},
    "text": {"host"},
    "fleet": {"store", "transfer", "membership", "wire", "telemetry", "host"},
    "engines": {"snapshots", "store", "transfer", "membership", "wire", "telemetry", "host"},
    "web": {"fleet", "text", "wire", "telemetry", "host"},
    "checking": set(),
    "testing": {
        "web",
        "text",
        "fleet",
        "engines",
        "store",
        "snapshots",
        "transfer",
        "membership",
        "wire",
        "telemetry",
        "host",
        "checking",
    },
}
# Pure: what they return follows from what they are given. `array` is memory alone: token ids are hashed as 32-bit words (prefixes).
CORE_MAY_IMPORT = {
    "__future__", "abc", "array", "bisect", "collections", "dataclasses", "enum", "functools", "hashlib", "heapq", "itertools",
    "math", "msgspec", "operator", "string", "struct", "types", "typing", "interlock",
}  # fmt: skip
HEAVY = {"torch", "vllm", "transformers", "ray", "nixl"}
HEAVY_IN = {"engines", "connectors", "snapshots", "transfer/lanes", "fleet/launchers"}
UNSAFE = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
SEAM = {"socket", "threading", "subprocess", "time", "multiprocessing"}
SEAM_CALLS = {
    ("asyncio", "sleep"), ("asyncio", "open_connection"), ("asyncio", "open_unix_connection"),
    ("asyncio", "start_server"), ("asyncio", "start_unix_server"), ("asyncio", "to_thread"),
    ("asyncio", "create_subprocess_exec"), ("asyncio", "create_subprocess_shell"),
}  # fmt: skip
# Outside the seam by decision. `checking` and `testing` are tools: they look at what they run from outside, with a real clock (how long
# an exploration took) and real processes (`checking` may not even import host/). Under simulated time both would be wrong.
SEAM_FREE = {"host", "checking", "testing", "benchmarks"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def package_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            yield node.module or "", node.lineno
            if node.module == "interlock":
                yield from ((f"interlock.{alias.name}", node.lineno) for alias in node.names)


def top_level(tree: ast.Module) -> Iterator[tuple[str, int]]:
    yield from imports(ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], []))


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in modules()}


def check_none(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def test_every_package_has_its_row() -> None:
    packages = {p.name for p in SOURCE.iterdir() if p.is_dir() and any(p.glob("*.py"))} - {
        "cli",
        "__pycache__",
    }
    assert packages <= set(ARROWS), packages - set(ARROWS)


def test_arrows_point_one_way(trees: dict[Path, ast.Module]) -> None:
    faults = []
    for path, tree in trees.items():
        package = package_of(path)
        if package in ("", "cli"):
            continue
        for name, line in imports(tree):
            if not name.startswith("interlock."):
                continue
            target = name.split(".")[1]
            if target not in {package, "core"} | ARROWS[package]:
                faults.append(f"{path}:{line}: {package} must not import {name}")
    check_none(faults)


def test_core_imports_only_what_is_pure(trees: dict[Path, ast.Module]) -> None:
    faults = []
    for path, tree in trees.items():
        if package_of(path) != "core":
            continue
        faults += [
            f"{path}:{line}: core must not import {name}"
            for name, line in imports(tree)
            if name.split(".")[0] not in CORE_MAY_IMPORT
            or (name.startswith("interlock.") and not name.startswith("interlock.core"))
        ]
    check_none(faults)


def test_heavy_packages_stay_in_their_rooms(trees: dict[Path, ast.Module]) -> None:
    faults = []
    for path, tree in trees.items():
        where = path.relative_to(SOURCE).as_posix()
        if any(where.startswith(room + "/") for room in HEAVY_IN):
            continue
        faults += [
            f"{path}:{line}: {name} does not belong here"
            for name, line in imports(tree)
            if name.split(".")[0] in HEAVY
        ]
    check_none(faults)


def test_nothing_unpickles_or_evaluates(trees: dict[Path, ast.Module]) -> None:
    faults = []
    for path, tree in trees.items():
        faults += [
            f"{path}:{line}: {name} is unsafe on outside input"
            for name, line in imports(tree)
            if name.split(".")[0] in UNSAFE
        ]
        faults += [
            f"{path}:{node.lineno}: {node.func.id}() runs what it reads"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("eval", "exec")
        ]
    check_none(faults)


def test_the_machine_is_reached_through_the_host_alone(trees: dict[Path, ast.Module]) -> None:
    faults = []
    for path, tree in trees.items():
        if package_of(path) in SEAM_FREE:
            continue
        faults += [
            f"{path}:{line}: {name} is used by host/ alone"
            for name, line in imports(tree)
            if name.split(".")[0] in SEAM
        ]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            if isinstance(function, ast.Name) and function.id == "open":
                faults.append(f"{path}:{node.lineno}: open() is used by host/ alone")
            elif (
                isinstance(function, ast.Attribute)
                and isinstance(function.value, ast.Name)
                and (function.value.id, function.attr) in SEAM_CALLS
            ):
                faults.append(
                    f"{path}:{node.lineno}: {function.value.id}.{function.attr} is used by host/ alone"
                )
    check_none(faults)


def test_heavy_packages_are_not_imported_by_the_command_line_at_start(trees: dict[Path, ast.Module]) -> None:
    faults = [
        f"{path}:{line}: cli imports {name} lazily, inside the command that needs it"
        for path, tree in trees.items()
        if package_of(path) == "cli"
        for name, line in top_level(tree)
        if name.split(".")[0] in HEAVY | {"starlette", "uvicorn", "tokenizers", "numpy"}
        or name.split(".")[:2]
        in (["interlock", "engines"], ["interlock", "connectors"], ["interlock", "web"])
    ]
    check_none(faults)


# --- what public names say of themselves -------------------------------------------------------------------------

SAY_WHAT_THEY_ARE_FOR = ("core", "host", "telemetry", "wire", "membership", "text", "cli")


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            yield node


@pytest.mark.parametrize("package", SAY_WHAT_THEY_ARE_FOR)
def test_every_public_name_says_what_it_is_for(trees: dict[Path, ast.Module], package: str) -> None:
    """A class or a function, and each method of a class but where the package's interface, or another class, says it already."""
    own = {path: tree for path, tree in trees.items() if package_of(path) == package}
    assert own
    told = {
        ("." if isinstance(outer, ast.ClassDef) else "") + node.name
        for tree in own.values()
        for outer in (tree, *public(tree.body))
        for node in public(outer.body)
        if ast.get_docstring(node) and not isinstance(node, ast.ClassDef)
    }
    check_none(
        [
            f"{path}:{node.lineno}: {node.name} has no docstring"
            for path, tree in own.items()
            for outer in (tree, *(node for node in public(tree.body) if isinstance(node, ast.ClassDef)))
            for node in public(outer.body)
            if not ast.get_docstring(node)
            and ("." if isinstance(outer, ast.ClassDef) else "") + node.name not in told
        ]
    )

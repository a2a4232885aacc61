"""`interlock snapshots ls|show|verify|rm DIR`: a look into a snapshot directory, and what is damaged in it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from interlock.cli.errors import Failure, Usage

VERBS = "ls, show, verify, rm"
FOLDERS = ("live", "kept")


def add_parser(commands: Any) -> None:
    """Adds the command; `run` is what its arguments are given to."""
    top = commands.add_parser("snapshots", help="list, show, verify and remove the snapshots of a directory")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    words = {
        "ls": "list the snapshots: path, bytes, position",
        "show": "print one snapshot's labels, structure and tensors",
        "verify": "check every byte; status 1 when a file is damaged, which is named with its tensor",
        "rm": "remove promoted snapshots by the first digits of their names",
    }
    for verb, help_words in words.items():
        parser = verbs.add_parser(verb, help=help_words, description=help_words)
        parser.add_argument("directory", type=Path, metavar="DIR", help="what the store was opened with")
        if verb != "verify":
            parser.add_argument(
                "name",
                nargs=None if verb in ("show", "rm") else "?",
                default="",
                metavar="NAME",
                help="a path from `ls`, or the first digits of a name",
            )
        parser.add_argument("--json", action="store_true", help="JSON, an object a line")


def run(arguments: argparse.Namespace) -> int:
    """Raises `Usage`, `Failure` for what is no snapshot directory. Status 1 also for what `verify` found."""
    if arguments.verb is None:
        raise Usage(f"snapshots needs one of: {VERBS}")
    directory: Path = arguments.directory
    if not (directory / "kept").is_dir():
        raise Failure(f"{directory} is no snapshot directory; name the one that the store was opened with")
    verb = {"ls": _ls, "show": _show, "verify": _verify, "rm": _remove}[arguments.verb]
    return verb(directory, arguments)


def _files(directory: Path, name: str = "") -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((directory / folder).rglob("*")) if path.is_file()]
    return [
        path
        for path in found
        if path.suffix != ".tmp"
        and (not name or path.name.startswith(name) or str(path.relative_to(directory)) == name)
    ]


def _say(arguments: argparse.Namespace, facts: dict[str, Any], words: str) -> None:
    print(json.dumps(facts) if arguments.json else words)


def _ls(directory: Path, arguments: argparse.Namespace) -> int:
    for path in _files(directory, arguments.name):
        name, size = str(path.relative_to(directory)), path.stat().st_size
        _say(arguments, {"path": name, "bytes": size}, f"{size:>14,}  {name}")
    return 0


def _read(directory: Path, path: Path) -> Any:
    from interlock.snapshots.format import read

    return read(str(path.relative_to(directory)), memoryview(path.read_bytes()))


def _show(directory: Path, arguments: argparse.Namespace) -> int:
    from interlock.snapshots.format import SnapshotDamaged

    files = _files(directory, arguments.name)
    if not files:
        raise Failure(f"no snapshot in {directory} is called {arguments.name}; `ls` lists them")
    for path in files:
        try:
            snapshot = _read(directory, path)
        except SnapshotDamaged as error:
            raise Failure(str(error)) from error
        tensors = {name: [raw.dtype, list(raw.shape)] for name, raw in snapshot.tensors.items()}
        facts = {
            "path": str(path.relative_to(directory)),
            "labels": snapshot.labels,
            "structure": snapshot.structure,
            "tensors": tensors,
        }
        lines = [facts["path"], *(f"  {key}: {value}" for key, value in snapshot.labels.items())]
        lines += [f"  {name}  {dtype} {shape}" for name, (dtype, shape) in tensors.items()]
        _say(arguments, facts, "\n".join(lines))
    return 0


def _verify(directory: Path, arguments: argparse.Namespace) -> int:
    from interlock.snapshots.format import SnapshotDamaged

    bad, files = 0, _files(directory)
    for path in files:
        try:
            _read(directory, path)
        except FileNotFoundError:
            continue  # erased meanwhile
        except SnapshotDamaged as error:
            bad += 1
            facts = {"path": error.file, "tensor": error.tensor, "reason": error.reason}
            _say(arguments, facts, str(error))
    _say(arguments, {"files": len(files), "damaged": bad}, f"{len(files)} snapshots, {bad} damaged")
    return 1 if bad else 0


def _remove(directory: Path, arguments: argparse.Namespace) -> int:
    """Only promoted ones: a request's own belong to the process that has the directory, and end with the request."""
    files = [path for path in _files(directory, arguments.name) if path.parent.name == "kept"]
    if not files:
        raise Failure(f"no promoted snapshot in {directory} is called {arguments.name}")
    for path in files:
        path.unlink(missing_ok=True)
    print(f"{len(files)} removed", file=sys.stderr if arguments.json else sys.stdout)
    return 0

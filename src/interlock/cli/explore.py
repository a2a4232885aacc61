"""`interlock explore`: walks the protocols exhaustively, or the museum of public races; exit status 1 on a violation."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from interlock.checking.explorer import Progress, Result
    from interlock.checking.gallery import Visit

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command; `run` is what its arguments are given to."""
    parser = subparsers.add_parser(
        "explore",
        help="walk every interleaving of the protocols within a stated budget",
        description="Walks every state of the protocols' worlds. Exit status: 0 all exhausted and well, 1 a violation was "
        "found (or, in the museum, not found), 2 a budget could not be exhausted or the arguments were wrong.",
    )
    parser.add_argument("protocol", nargs="?", help="only this protocol's worlds; all when left out")
    parser.add_argument("--budget", choices=("small", "full"), default="small", help="how much may happen")
    parser.add_argument("--seconds", type=float, default=600.0, help="give a world up after so long")
    parser.add_argument(
        "--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="worlds walked at a time"
    )
    parser.add_argument(
        "--museum", action="store_true", help="find the races of the past with the same explorer"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Explores what `args` names and prints it; returns the exit status."""
    from interlock.checking import gallery

    if args.protocol is not None and args.protocol not in gallery.protocols():
        known = ", ".join(gallery.protocols())
        print(f"There is no protocol {args.protocol!r}. Explore one of: {known}.", file=sys.stderr)
        return 2
    progress = _progress if sys.stderr.isatty() else None
    if args.museum:
        return _run_museum(args.protocol, args.seconds, args.json, progress)
    return _run_worlds(args, progress)


def _run_worlds(args: argparse.Namespace, progress: Progress | None) -> int:
    from interlock.checking import gallery

    names = gallery.protocols() if args.protocol is None else [args.protocol]
    status = 0
    for result in gallery.explore_all(
        names, args.budget, seconds_max=args.seconds, jobs=args.jobs, progress=progress
    ):
        _print_result(result, args.json)
        if result.violation is not None:
            status = 1
        elif not result.exhausted:
            status = status or 2
    return status


def _run_museum(protocol: str | None, seconds_max: float, as_json: bool, progress: Progress | None) -> int:
    from interlock.checking import gallery

    status = 0
    for exhibit in gallery.exhibits():
        if protocol is not None and exhibit.protocol != protocol:
            continue
        seen = gallery.visit(exhibit, seconds_max=seconds_max, progress=progress)
        print(_museum_json(seen) if as_json else f"{seen}\n", flush=True)
        if not seen.as_stated:
            print(f"{exhibit.title}: not as the exhibit states", file=sys.stderr)
            status = 1
    return status


def _print_result(result: Result, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(result).decode(), flush=True)
        return
    print(result, flush=True)
    if result.violation is not None:
        print(result.violation)


def _museum_json(seen: Visit) -> str:
    exhibit = seen.exhibit
    facts = {
        "title": exhibit.title,
        "protocol": exhibit.protocol,
        "public": exhibit.public,
        "rule": exhibit.rule,
        "as_stated": seen.as_stated,
        "broken": seen.broken,
        "mended": seen.mended,
    }
    return msgspec.json.encode(facts).decode()


def _progress(states: int, edges: int, depth: int, seconds: float) -> None:
    print(
        f"\r{states:,} states, {edges:,} edges, depth {depth}, {seconds:.0f} s",
        end="\r",
        file=sys.stderr,
        flush=True,
    )

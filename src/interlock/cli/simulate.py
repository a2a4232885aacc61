"""`interlock simulate`: whole fleets of the real classes on a simulated machine, a world a seed; exit status 1 on a failure."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from interlock.host.files import RealFiles
from interlock.host.threads import monotonic_s

if TYPE_CHECKING:
    from interlock.testing.sim.worlds import Result

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

KINDS = ("crash", "freeze", "net", "disk", "power", "wipe", "clock", "rot")
SEEDS_MAX = 1_000_000
REPLAY_CHARS_MAX = 1024 * 1024


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(word for word in text.split(",") if word and word != "none")
    unknown = [word for word in kinds if word not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no kind of fault; there are {', '.join(KINDS)}")
    return kinds


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 0 < value <= SEEDS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {SEEDS_MAX}")
    return value


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command; `run` is what its arguments are given to."""
    parser = subparsers.add_parser(
        "simulate",
        help="run whole fleets on a simulated machine, every fault from one seed",
        description="Runs the real coordinator, dispatchers, runners and store node on a simulated machine. Exit status: "
        "0 all seeds were well, 1 one was not; its smallest plan of faults and schedule and its timeline are printed.",
    )
    parser.add_argument("--seeds", type=_count, default=100, metavar="N", help="how many seeds (default 100)")
    parser.add_argument("--first", type=int, default=0, metavar="S", help="the first of them (default 0)")
    parser.add_argument("--seed", type=int, metavar="S", help="only this seed")
    parser.add_argument(
        "--replay",
        metavar="TEXT",
        help="one run again, as a failing one printed it; @FILE reads it from a file",
    )
    parser.add_argument(
        "--faults", type=_kinds, default=KINDS, metavar="LIST", help=f"of {','.join(KINDS)}; none: no faults"
    )
    parser.add_argument(
        "--jobs", type=int, choices=range(1, 65), default=2, metavar="N", help="processes (default 2)"
    )
    parser.add_argument(
        "--trace", action="store_true", help="with --seed or --replay: print the whole timeline"
    )
    parser.add_argument("--no-shrink", action="store_true", help="print a failing run as it is")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Simulates what `args` names and prints it; returns the exit status."""
    from interlock.testing.sim import runs

    if args.replay is not None:
        try:
            result = runs.run_replay(_text_of(args.replay))
        except (OSError, ValueError) as error:
            print(f"interlock simulate: {error}", file=sys.stderr)
            return 2
        if args.trace:
            print("\n".join(result.lines))
        print(runs.report(result) if not result.ok else f"seed {result.seed}: well this time")
        return int(not result.ok)
    if args.seed is not None:
        result = runs.run_seed(args.seed, args.faults)
        if args.trace:
            print("\n".join(result.lines))
        return _judge([result], args)
    seeds = range(args.first, args.first + args.seeds)
    failed, done, simulated_s, served = [], 0, 0.0, 0
    began_s = monotonic_s()
    for result in runs.run_seeds(seeds, args.faults, args.jobs):
        done += 1
        simulated_s += result.simulated_s
        served += result.served
        if not result.ok:
            failed.append(result)
            print(f"seed {result.seed} failed: {result.violations[0]}", flush=True)
        if sys.stderr.isatty():
            print(
                f"\r{done} of {len(seeds)} seeds, {len(failed)} failed", end="", file=sys.stderr, flush=True
            )
    took_s = max(monotonic_s() - began_s, 1e-9)
    print(
        f"{done} seeds, {len(failed)} failed; {served} requests answered; {simulated_s:,.0f} simulated seconds in "
        f"{took_s:.1f} s ({simulated_s / took_s:.0f} a second, {60 * done / took_s:.0f} runs a minute)"
    )
    return _judge(failed[:1], args)


def _judge(results: list[Result], args: argparse.Namespace) -> int:
    from interlock.testing.sim import runs

    status = 0
    for result in results:
        if result.ok:
            print(f"seed {result.seed}: well; {result.served} requests, {len(result.faults)} faults")
            continue
        status = 1
        smallest = result if args.no_shrink else runs.straighten(runs.shrink(result))
        print(runs.report(smallest))
        print(
            f"again: interlock simulate --seed {result.seed} --trace --faults {','.join(args.faults) or 'none'}"
        )
        print(
            f"the smallest again: interlock simulate --replay {runs.replay_text(smallest, fixed=not args.no_shrink)}"
        )
    return status


def _text_of(given: str) -> str:
    if not given.startswith("@"):
        return given
    path = Path(given[1:])
    text = RealFiles().read(path, REPLAY_CHARS_MAX)
    if text is None:
        raise ValueError(f"{path} does not exist; give the file that holds the run's text")
    return text.decode(errors="replace")

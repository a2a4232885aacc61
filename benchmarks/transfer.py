"""Reads of scattered memory between two processes: our lanes against Mooncake, NIXL, bare sockets and memcpy, taking turns.

    python benchmarks/transfer.py [--quick] [--mooncake PYTHON] [--nixl PYTHON] [--rounds N] [--only WORD]

Points are `<pieces of bytes>x<pieces a batch>`, in GB/s, with CPU seconds per GB of both processes beside. `--mooncake` and `--nixl` name the
interpreters that have mooncake-transfer-engine-non-cuda==0.3.13.post1, and nixl==1.5.1 with nixl-cu12==1.5.1 (installed with --no-deps).
Mooncake runs over TCP with its connection pool on, NIXL with one rail and a handle that is made once (its best case).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import Child, NotRun, Options, Side, begin, child, compare, line, not_run, options, percentile

HERE = Path(__file__).parent
SIZES = {
    "4K": [1, 64, 1024],
    "64K": [1, 64, 512],
    "256K": [1, 64, 128],
    "1M": [1, 16, 64],
    "16M": [1, 4],
}
BYTES = {"4K": 4096, "64K": 65536, "256K": 262144, "1M": 1 << 20, "16M": 16 << 20}
ROUND_BYTES = 256 << 20
TIMES_MAX = 400
ROUND_SECONDS = 0.5
QUICK = {"4K": [1, 1024], "64K": [64], "256K": [1, 64], "1M": [64], "16M": [4]}
FIRSTS = 30


RESTLESS = ("nixl", "nixl-tcp")
SETTLE_SECONDS = 0.2


class ByTurns:
    """A side that is frozen but for its turns: NIXL's agents poll at 0.8 to 1.0 cores a process, used or not, and four would take it from the others."""

    def __init__(self, side: Child) -> None:
        self._side = side
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        pid = self._side.process.pid
        owners = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *map(int, owners)):
            os.kill(each, number)

    def thaw(self) -> None:
        if self._side.process.poll() is None:
            self._signal(signal.SIGCONT)

    def ask(self, **question: Any) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        try:
            return self._side.ask(**question)
        finally:
            if self._side.process.poll() is None:
                self._signal(signal.SIGSTOP)


def measure(sides: dict[str, Any], size: str, count: int, given: Options) -> None:
    """One point: every side's GB/s, against memcpy and against the bare socket."""
    nbytes = BYTES[size] * count
    times = max(1, min(TIMES_MAX, (ROUND_BYTES // (4 if given.quick else 1)) // nbytes))
    cpu: dict[str, list[float]] = {name: [] for name in sides}

    def run(name: str, side: Any) -> float:
        found = side.ask(do="read", times=times, seconds=ROUND_SECONDS)
        moved = found["times"] * nbytes / 1e9
        cpu[name].append(found["cpu_seconds"] / moved)
        return float(moved / found["seconds"])

    ready = []
    for name, side in sides.items():
        try:
            side.ask(do="prepare", size=BYTES[size], count=count)
            ready.append(Side(name, lambda name=name, side=side: run(name, side)))  # type: ignore[misc]
        except NotRun as why:
            not_run(name, str(why))
    bench = f"{size}x{count}"
    found = compare(bench, "GB/s", ready, given.rounds, base="socket" if "socket" in sides else "")
    for name, values in cpu.items():
        if values and name in found:
            us_a_batch = nbytes / found[name].median / 1e3
            line(
                {
                    "point": bench,
                    "side": name,
                    "cpu_seconds_per_gb": round(statistics.median(values), 3),
                    "us_a_batch": round(us_a_batch, 1),
                    "us_a_piece": round(us_a_batch / count, 2),
                }
            )


def firsts(sides: dict[str, Any], given: Options) -> None:
    """From a ready reader that never spoke to the owner to its first 4 KiB."""
    took: dict[str, list[float]] = {name: [] for name in sides if name != "memcpy"}
    for _ in range(8 if given.quick else FIRSTS):
        for name in list(took):
            time.sleep(SETTLE_SECONDS)  # what the side before tears down late shall not be in this one's time
            try:
                took[name].append(1e3 * sides[name].ask(do="first")["seconds"])
            except NotRun as why:
                not_run(f"first connection of {name}", str(why))
                del took[name]
    for name, values in took.items():
        line(
            {
                "point": "first connection",
                "side": name,
                "unit": "ms",
                "p50": round(percentile(values, 0.5), 2),
                "p99": round(percentile(values, 0.99), 2),
                "samples": len(values),
            }
        )


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mooncake", default="", metavar="PYTHON")
    parser.add_argument("--sides", default="", metavar="A,B", help="only these sides")
    parser.add_argument("--nixl", default="", metavar="PYTHON")


def main() -> None:
    given = options(__doc__, rounds=9, quick_rounds=3, more=more)
    begin(given, "transfer")
    interpreters = {
        **dict.fromkeys(("memcpy", "socket", "tcp", "shm", "process"), sys.executable),
        "mooncake": given.arguments.mooncake,
        "nixl": given.arguments.nixl,
        "nixl-tcp": given.arguments.nixl,
    }
    sides: dict[str, Any] = {}
    with ExitStack() as stack:
        # Sides are ended by SIGKILL, so what they leave is cleared here.
        private = stack.enter_context(tempfile.TemporaryDirectory(prefix="itl", ignore_cleanup_errors=True))
        for name, python in interpreters.items():
            if given.arguments.sides and name not in given.arguments.sides.split(","):
                continue
            if not python:
                not_run(name, "no interpreter that has it was named")
                continue
            try:
                environment = {
                    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src")]),
                    "TRANSFER_BENCH_DIR": private,
                }
                command = [python, str(HERE / "transfer_sides.py"), name]
                sides[name] = stack.enter_context(
                    child(
                        name,
                        command,
                        env=environment,
                    )
                )
                if name in RESTLESS:
                    sides[name] = ByTurns(sides[name])
                    stack.callback(sides[name].thaw)
            except NotRun as why:
                not_run(name, str(why))
        for size, counts in (QUICK if given.quick else SIZES).items():
            for count in counts:
                if given.only in f"{size}x{count}":
                    measure(sides, size, count, given)
        if given.only in "first connection":
            firsts(sides, given)


if __name__ == "__main__":
    main()

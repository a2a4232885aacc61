"""What every benchmark here does alike, so that its figures can be compared: alternate, take the median, state the spread.

On a shared machine the same test varies by a factor of two between runs (hypervisor, neighbours), so a figure by itself says
little and a difference of two figures taken one after the other says nothing. So the *sides* of a comparison take turns,
round by round, in an order drawn anew each round; a point is the median of its rounds with the quartiles beside it; a ratio
is the median over rounds of the ratio *within* a round, with a bootstrap interval. The best round stands beside it: what
others do to a shared machine only ever takes time, so it is the least disturbed one. One point is one JSON line. A side that
cannot run here (a peer that is not installed) is a line too, and says why: nothing is left out in silence.

    python benchmarks/<name>.py [--quick] [--rounds N] [--only WORD] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

BOOTSTRAP_SAMPLES = 2000
CHILD_SECONDS_MAX = 300.0


@dataclass
class Options:
    """What the command line said."""

    quick: bool
    rounds: int
    only: str
    out: TextIO | None = None
    arguments: argparse.Namespace = field(default_factory=argparse.Namespace)


def options(
    description: str | None,
    *,
    rounds: int,
    quick_rounds: int,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> Options:
    """Parses the options that all benchmarks share, and those that `more` adds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds and small sizes: does it run, roughly how fast"
    )
    parser.add_argument(
        "--rounds", type=int, help=f"rounds of each comparison (default {rounds}, quick {quick_rounds})"
    )
    parser.add_argument("--only", default="", metavar="WORD", help="only points whose name contains WORD")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file as well")
    if more is not None:
        more(parser)
    given = parser.parse_args()
    if given.rounds is not None and given.rounds < 1:
        parser.error("--rounds is at least 1")
    out = given.out.open("a") if given.out else None
    return Options(
        given.quick, given.rounds or (quick_rounds if given.quick else rounds), given.only, out, given
    )


# --- what is measured ----------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One of the things compared. `run` does one round and returns its value, in the comparison's unit."""

    name: str
    run: Callable[[], float]


class NotRun(Exception):  # noqa: N818 - what is, not that it is wrong
    """This side cannot run here; the message says why."""


@dataclass
class Point:
    """The rounds of one side of one comparison."""

    bench: str
    side: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high


def alternate(sides: Sequence[Side], rounds: int, *, seed: int = 1) -> dict[str, list[float]]:
    """`rounds` values of each side. One round is every side once, in a random order; a first round only warms up.

    A side that raises `NotRun` is left out from there on.
    """
    order, values = random.Random(seed), {side.name: [] for side in sides}  # type: tuple[random.Random, dict[str, list[float]]]
    left = list(sides)
    for number in range(rounds + 1):
        order.shuffle(left)
        for side in list(left):
            try:
                value = side.run()
            except NotRun as reason:
                not_run(side.name, str(reason))
                left.remove(side)
                values.pop(side.name)
                continue
            if number:
                values[side.name].append(value)
    return values


def ratio(values: Sequence[float], base: Sequence[float], *, seed: int = 1) -> tuple[float, float, float]:
    """The median over rounds of value / base, and its 95 % bootstrap interval."""
    each = [a / b for a, b in zip(values, base, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(each, k=len(each))) for _ in range(BOOTSTRAP_SAMPLES))
    return (
        statistics.median(each),
        medians[int(0.025 * BOOTSTRAP_SAMPLES)],
        medians[int(0.975 * BOOTSTRAP_SAMPLES)],
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, by rank."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


# --- what is printed -----------------------------------------------------------------------------------------------------

_out: TextIO | None = None


def begin(given: Options, bench: str) -> None:
    """Says where and when: the first line of every run."""
    global _out
    _out = given.out
    line(
        {
            "bench": bench,
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "revision": revision(),
            "python": platform.python_version(),
            "cpus": len(os.sched_getaffinity(0)),
            "load_1min": round(os.getloadavg()[0], 2),
            "quick": given.quick,
            "rounds": given.rounds,
        }
    )


def line(fields: dict[str, Any]) -> None:
    text = json.dumps(fields)
    print(text, flush=True)
    if _out is not None:
        _out.write(text + "\n")
        _out.flush()


def not_run(side: str, why: str) -> None:
    line({"side": side, "not_run": why})


def report(point: Point, base: Point | None = None, **more: Any) -> None:
    """Prints a point, and against `base` if there is one."""
    low, high = point.quartiles
    fields: dict[str, Any] = {
        "point": point.bench,
        "side": point.side,
        "unit": point.unit,
        "median": _short(point.median),
        "quartiles": [_short(low), _short(high)],
        "best": _short((max if point.unit.endswith("/s") else min)(point.values)),
        "rounds": len(point.values),
    }
    if base is not None and base is not point:
        middle, least, most = ratio(point.values, base.values)
        best = max if point.unit.endswith("/s") else min
        fields |= {
            "of": base.side,
            "ratio": _short(middle),
            "ratio_95": [_short(least), _short(most)],
            "ratio_of_bests": _short(best(point.values) / best(base.values)),
        }
    line(fields | more)


def compare(
    bench: str, unit: str, sides: Sequence[Side], rounds: int, *, base: str = "", **more: Any
) -> dict[str, Point]:
    """Alternates the sides and reports each, against the side `base` if one is named."""
    found = {
        name: Point(bench, name, unit, values) for name, values in alternate(sides, rounds).items() if values
    }
    for point in found.values():
        report(point, found.get(base), **more)
    return found


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def revision() -> str:
    """The commit that is measured, with a + when the tree differs from it."""
    try:
        root = Path(__file__).parent
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, timeout=10
        )
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


# --- sides in processes of their own -----------------------------------------------------------------------------------


class Child:
    """A side that runs under another interpreter: it reads one JSON line a question and writes one a answer.

    Its program calls `answer` below with what it can do. Raises `NotRun` when it cannot start.
    """

    def __init__(self, name: str, command: Sequence[str], *, env: dict[str, str] | None = None) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        ready = self._hear()
        if "not_run" in ready:
            self.close()
            raise NotRun(ready["not_run"])

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        heard = self._hear()
        if "not_run" in heard:
            raise NotRun(heard["not_run"])
        return heard

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while True:
            ready, _, _ = select.select([self.process.stdout], [], [], CHILD_SECONDS_MAX)
            text = self.process.stdout.readline() if ready else ""
            if not text:
                self.process.kill()
                assert self.process.stderr is not None
                last = self.process.stderr.read()[-400:].strip().replace("\n", " | ")
                return {"not_run": f"{self.name} ended or did not answer: {last}"}
            with contextlib.suppress(ValueError):  # what a library prints besides
                found = json.loads(text)
                if isinstance(found, dict):
                    return found

    def close(self) -> None:
        """Its end of the pipe closes, and it leaves; what does not is killed."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


@contextlib.contextmanager
def child(name: str, command: Sequence[str], **more: Any) -> Iterator[Child]:
    made = Child(name, command, **more)
    try:
        yield made
    finally:
        made.close()


def answer(start: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """The other end of `Child`: `start` prepares and returns what answers; `NotRun` and missing packages are told."""
    try:
        does = start()
    except (NotRun, ImportError, OSError) as reason:
        print(json.dumps({"not_run": f"{reason}"}), flush=True)
        return
    print(json.dumps({"ready": True}), flush=True)
    for text in sys.stdin:
        try:
            heard = does(json.loads(text))
        except NotRun as reason:
            heard = {"not_run": f"{reason}"}
        print(json.dumps(heard), flush=True)

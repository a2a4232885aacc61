"""The fleet: how soon it stands, with how many words, and how many requests go through it, against Megatron-LM's coordinator.

    python benchmarks/fleet.py --megatron PYTHON [--quick] [--rounds N] [--seconds S] [--engines N] [--only pause|ranks|requests|http|alone] [--out FILE]

PYTHON is an interpreter that has megatron-core (with torch, pyzmq and msgpack; its HTTP server wants quart and hypercorn, too). Both
sides run the same number of engine processes on this machine, from whole processes of their own (`fleet_ours.py`,
`fleet_megatron.py`), and take turns (`harness.py`). Engines answer at once or step every 10 ms; no model is computed.

* `pause`: from the command until all members stand. Ours until the caller's call returns; Megatron's until the last rank's own event,
  which its client is never told.
* `ranks`: messages and rounds of a pause of many ranks on the simulated host; and its milliseconds over real sockets.
* `requests`: prompts of token ids, one token back, as the process that accepts HTTP sees them: ours from `Dispatcher.submit` over the
  engines' sockets, Megatron's from `InferenceClient.add_request` over its coordinator.
* `http`: the same prompts as JSON to a front's port, against Megatron's own server with as many front processes.
* `alone`: one request at a time, and what our dispatcher and our HTTP front add to a bare question to the same engine process, by turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import Child, NotRun, Options, Side, begin, child, compare, line, not_run, options, percentile

HERE = Path(__file__).parent
SIZES = (128, 512, 8000)
IN_FLIGHT = (64, 256, 1024)
RANKS = 64
INTERVALS = {"megatron": 20, "megatron, interval 1": 1}
"""Steps between two of its loop's consensus rounds; 20 is its default."""


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megatron", metavar="PYTHON", help="an interpreter that has megatron-core")
    parser.add_argument("--engines", type=int, default=2, help="engine processes of each side (default 2)")
    parser.add_argument("--seconds", type=float, help="of each side in each round (default 1, quick 0.4)")


class Bench:
    """The two sides, and what is asked of them."""

    def __init__(self, given: Options, ours: Child, megatron: Child | None) -> None:
        self._given, self._ours, self._megatron = given, ours, megatron
        self._seconds = given.arguments.seconds or (0.4 if given.quick else 1.0)

    def run(self) -> None:
        groups = {
            "pause": self.pause,
            "ranks": self.ranks,
            "requests": self.requests,
            "http": self.http,
            "alone": self.alone,
        }
        for name, group in groups.items():
            if self._given.only in name:
                group()

    def _sides(
        self, question: dict[str, Any], kept: dict[str, list[dict[str, Any]]], value: str
    ) -> list[Side]:
        """One side each; what they answered stands in `kept` beside the value that counts."""

        def side(name: str, asked: Child) -> Side:
            def run() -> float:
                kept.setdefault(name, []).append(asked.ask(**question))
                return float(kept[name][-1][value])

            return Side(name, run)

        sides = [side("ours", self._ours)]
        if self._megatron is not None:
            sides.append(side("megatron", self._megatron))
        return sides

    # --- pause -----------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        for busy in (True, False):
            times: dict[str, list[float]] = {}
            sides = [self._pausing("ours", self._ours, times, {"busy": busy})]
            if self._megatron is not None:
                for name, interval in INTERVALS.items():
                    question = {"busy": busy, "interval": interval}
                    sides.append(self._pausing(name, self._megatron, times, question))
            name = "pause, busy with steps of 10 ms" if busy else "pause, idle"
            compare(name, "ms (median)", sides, self._given.rounds, base="ours")
            for side, each in times.items():
                self._spread(name, side, each)

    def _pausing(
        self, name: str, asked: Child, times: dict[str, list[float]], question: dict[str, Any]
    ) -> Side:
        count = 5 if self._given.quick else 12

        def run() -> float:
            found = asked.ask(do="pause", count=count, **question)["ms"]
            times.setdefault(name, []).extend(found)
            return statistics.median(found)

        return Side(name, run)

    def _spread(self, point: str, side: str, times: list[float]) -> None:
        line(
            {
                "point": point,
                "side": side,
                "unit": "ms",
                "count": len(times),
                "p50": round(statistics.median(times), 2),
                "p99": round(percentile(times, 0.99), 2),
                "best": round(min(times), 2),
            }
        )

    def ranks(self) -> None:
        from fleet_rounds import pause_of

        found = pause_of(RANKS)
        line(
            {
                "point": f"pause, {RANKS} simulated ranks",
                "side": "ours",
                "rounds": round(found.rounds, 3),
                "messages": found.messages,
            }
        )
        times = self._ours.ask(do="ranks", ranks=RANKS, count=10 if self._given.quick else 40)["ms"]
        self._spread(f"pause, {RANKS} idle ranks over sockets", "ours", times)

    # --- requests --------------------------------------------------------------------------------------------------

    def requests(self) -> None:
        for size in SIZES:
            for in_flight in IN_FLIGHT[1:2] if self._given.quick else IN_FLIGHT:
                question = {
                    "do": "requests",
                    "prompt": size,
                    "in_flight": in_flight,
                    "seconds": self._seconds,
                }
                self._compare_rates(f"requests, {size} tokens, {in_flight} in flight", question)

    def http(self) -> None:
        for size in SIZES:
            question = {
                "do": "http",
                "prompt": size,
                "in_flight": 64,
                "seconds": self._seconds,
                "replicas": 1,
            }
            self._compare_rates(f"http, {size} tokens, 64 in flight", question)

    def _compare_rates(self, point: str, question: dict[str, Any]) -> None:
        kept: dict[str, list[dict[str, Any]]] = {}
        compare(point, "requests/s", self._sides(question, kept, "rate"), self._given.rounds, base="megatron")
        for side, answers in kept.items():
            if answers:  # a side that failed was named
                line({"point": point, "side": side, **_middle(answers[1:] or answers)})

    def alone(self) -> None:
        asked = {"ours": self._ours} | ({} if self._megatron is None else {"megatron": self._megatron})
        for size in SIZES[:2]:
            times: dict[tuple[str, str], list[float]] = {}
            for round_ in range(self._given.rounds + 1):
                for name, side in asked.items():
                    found = side.ask(do="alone", prompt=size, count=50 if self._given.quick else 150)
                    for what, each in found.items() if round_ else ():  # the first one warms up
                        times.setdefault((name, what), []).extend(each)
            for (name, what), each in times.items():
                self._spread(f"alone, {size} tokens, {what.removesuffix('_ms')}", name, each)
            bare = times["ours", "bare_ms"]
            for what in ("dispatched", "http"):
                added = [a - b for a, b in zip(times["ours", f"{what}_ms"], bare, strict=True)]
                self._spread(f"alone, {size} tokens, added: {what} less bare", "ours", added)


def _middle(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians over rounds of latency, and of the CPU of each process a request."""
    cpu = {
        name: round(statistics.median(each["cpu_us"].get(name, 0.0) for each in answers))
        for name in answers[-1]["cpu_us"]
    }
    return {
        "p50_ms": round(statistics.median(each["p50_ms"] for each in answers), 2),
        "p99_ms": round(statistics.median(each["p99_ms"] for each in answers), 2),
        "cpu_us_a_request": cpu,
        "cpu_us_in_all": sum(cpu.values()),
    }


def main() -> None:
    given = options(__doc__, rounds=5, quick_rounds=2, more=more)
    begin(given, "fleet")
    engines = str(given.arguments.engines)
    with ExitStack() as stack:
        ours = stack.enter_context(child("ours", [sys.executable, str(HERE / "fleet_ours.py"), engines]))
        megatron = None
        if given.arguments.megatron is None:
            not_run("megatron", "name an interpreter that has megatron-core by --megatron")
        else:
            command = [given.arguments.megatron, str(HERE / "fleet_megatron.py"), engines]
            try:
                quiet = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
                megatron = stack.enter_context(child("megatron", command, env=quiet))
            except NotRun as reason:
                not_run("megatron", str(reason))
        Bench(given, ours, megatron).run()


if __name__ == "__main__":
    main()

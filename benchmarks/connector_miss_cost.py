"""What the connector costs an engine that never hits: CPU seconds with it against CPU seconds without.

    flock … python benchmarks/connector_miss_cost.py [--starts 6] [--pairs 5] [--prompts 2] [--tokens 16]

Two engines of one rank live in processes of their own, one with the connector at a store node of its own, one without.
They take turns over the same prompts, which nobody has seen before; the order of the two alternates from pair to pair.
Two equal engines differ by some percent from process to process (where their memory happens to lie), so the engines are
started anew for every few pairs, and the interval is bootstrapped over starts and over pairs within them.
Each turn's cost is the CPU time of the engine's whole process (scheduler, rank, store client, all threads); the node's own CPU
time is told apart. The own prefix cache is emptied before each turn, and every prompt is new to the store, so every
look-up misses and every block is saved: the most a miss can cost.

Prints the mean of the paired differences with that 95 % interval, absolute and relative.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from interlock.engines.demo_model import build_demo_model

HELPERS = Path(__file__).parent.parent / "tests" / "connectors"
sys.path.insert(0, str(HELPERS))

WARM_UP_PAIRS = 2
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",  # waiting compute threads spin, which would be charged too
}


def cpu_s(pid: int | None = None) -> float:
    """User and system time of a process, all threads, in seconds."""
    if pid is None:
        times = os.times()
        return times.user + times.system
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serve_turns(model: str, store: str, state: str) -> None:
    """The engine process: a line with a seed comes in, a line with the turn's CPU seconds and counts goes out."""
    import connector_rig as rig

    options = {"store": store, "state": Path(state), "name": "benchmark"} if store else {}
    with rig.engine(Path(model), **options) as engine:  # type: ignore[arg-type]
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            seed, prompts, prompt_tokens, tokens = json.loads(line)
            random = np.random.default_rng(seed)
            batch = [[int(n) for n in random.integers(0, 512, prompt_tokens)] for _ in range(prompts)]
            engine.empty_own_cache()
            before = cpu_s()
            engine.run(batch, tokens)
            spent = cpu_s() - before
            counts = dict(engine.counts) if store else {}
            print(json.dumps({"cpu_s": spent, "counts": counts}), flush=True)


class Turns:
    """Drives one engine process."""

    def __init__(self, model: Path, store: str, state: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--engine", str(model), store, str(state)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        assert self._hear()["ready"]

    def _hear(self) -> dict:
        while True:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit("an engine ended; its output above says why")
            if line.startswith("{"):
                return json.loads(line)

    def turn(self, *job: int) -> dict:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._hear()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def interval(starts: list[list[float]], draws: int = 10_000) -> tuple[float, float]:
    """95 % of the means, bootstrapped over starts and over the pairs of each."""
    random = np.random.default_rng(0)
    values = np.array(starts)
    rows = random.integers(0, len(values), (draws, len(values)))
    columns = random.integers(0, values.shape[1], (draws, *values.shape))
    means = values[rows[:, :, None], columns].mean(axis=(1, 2))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


class Pair(NamedTuple):
    plain_s: float
    shared_s: float
    node_s: float


def one_start(arguments: argparse.Namespace, start: int, folder: Path) -> list[Pair]:
    """Both engines and a node, started for a few pairs; the first pairs warm them up and do not count."""
    import connector_rig as rig

    model = Path(arguments.model) if arguments.model else build_demo_model()
    folder.mkdir()
    store = rig.Store(folder, slab_bytes=arguments.slab_mib << 20)
    engines = [(model, "", folder), (model, store.address, folder)]
    turns = [Turns(*engine) for engine in (engines if start % 2 else reversed(engines))]
    plain, shared = turns if start % 2 else reversed(turns)
    pairs = []
    try:
        for pair in range(-WARM_UP_PAIRS, arguments.pairs):
            job = (1000 * start + pair + 10, arguments.prompts, arguments.prompt_tokens, arguments.tokens)
            node_before = cpu_s(store.process.pid)
            if pair % 2:
                one, two = plain.turn(*job), shared.turn(*job)
            else:
                two, one = shared.turn(*job), plain.turn(*job)
            if pair >= 0:
                pairs.append(Pair(one["cpu_s"], two["cpu_s"], cpu_s(store.process.pid) - node_before))
        counts = two["counts"]
        assert counts.get("saved_blocks"), counts
        assert not counts.get("loaded_blocks"), counts
    finally:
        for engine in turns:
            engine.close()
        store.close()
    return pairs


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    starts = [one_start(arguments, n, folder / str(n)) for n in range(arguments.starts)]
    differences = [[pair.shared_s - pair.plain_s for pair in pairs] for pairs in starts]
    ratios = [[pair.shared_s / pair.plain_s - 1 for pair in pairs] for pairs in starts]
    every = [pair for pairs in starts for pair in pairs]
    print(
        f"{arguments.starts} starts of {arguments.pairs} pairs of {arguments.prompts} prompts of "
        f"{arguments.prompt_tokens} tokens, {arguments.tokens} tokens generated each; all blocks missed and saved"
    )
    print(f"without connector  {statistics.mean(pair.plain_s for pair in every):.3f} CPU s a turn")
    print(
        f"with connector     {statistics.mean(pair.shared_s for pair in every):.3f} CPU s a turn "
        f"(and the node {statistics.mean(pair.node_s for pair in every):.3f})"
    )
    low, high = interval(differences)
    print(
        f"difference         {np.mean(differences) * 1e3:+.1f} ms [{low * 1e3:+.1f}, {high * 1e3:+.1f}] a turn"
    )
    low, high = interval(ratios)
    print(f"                   {np.mean(ratios):+.2%} [{low:+.2%}, {high:+.2%}]")
    print("by start           " + ", ".join(f"{np.mean(of_start):+.2%}" for of_start in ratios))


def main() -> None:
    if sys.argv[1:2] == ["--engine"]:
        serve_turns(*sys.argv[2:5])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a checkpoint directory; default: the demo model")
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=900)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--slab-mib", type=int, default=1024)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(HELPERS)
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


if __name__ == "__main__":
    main()

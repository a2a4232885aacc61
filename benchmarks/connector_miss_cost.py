"""What the connector costs an engine that never hits: CPU seconds with it against CPU seconds without.

    flock … python benchmarks/connector_miss_cost.py [--pairs 20] [--prompts 4] [--tokens 32]

Two engines of one rank live in processes of their own, one with the connector at a store node of its own, one without.
They take turns over the same prompts, which nobody has seen before; the order of the two alternates from pair to pair.
Each turn's cost is the CPU time of the engine's whole process (scheduler, rank, store client, all threads); the node's own CPU
time is told apart. The own prefix cache is emptied before each turn, and every prompt is new to the store, so every
look-up misses and every block is saved: the most a miss can cost.

Prints the mean of the paired differences with a 95 % bootstrap interval, absolute and relative.
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

import numpy as np

HELPERS = Path(__file__).parent.parent / "tests" / "connectors"
sys.path.insert(0, str(HELPERS))

WARM_UP_PAIRS = 3
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "2",
    # Idle compute threads spin otherwise, and their spinning would be charged to whoever ran last.
    "KMP_BLOCKTIME": "0",
    "OMP_WAIT_POLICY": "passive",
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


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % of the bootstrapped means."""
    random = np.random.default_rng(0)
    means = random.choice(values, (draws, len(values))).mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    import connector_rig as rig
    import tiny_llama

    model = tiny_llama.build(folder / "model") if arguments.model == "tiny" else Path(arguments.model)
    store = rig.Store(folder, slab_bytes=arguments.slab_mib << 20)
    plain, shared = Turns(model, "", folder), Turns(model, store.address, folder)
    plain_s, shared_s, node_s, counts = [], [], [], {}
    try:
        for pair in range(-WARM_UP_PAIRS, arguments.pairs):
            job = (1000 + pair, arguments.prompts, arguments.prompt_tokens, arguments.tokens)
            node_before = cpu_s(store.process.pid)
            if pair % 2:
                one, two = plain.turn(*job), shared.turn(*job)
            else:
                two, one = shared.turn(*job), plain.turn(*job)
            if pair >= 0:
                plain_s.append(one["cpu_s"])
                shared_s.append(two["cpu_s"])
                node_s.append(cpu_s(store.process.pid) - node_before)
            counts = two["counts"]
    finally:
        plain.close()
        shared.close()
        store.close()
    differences = [b - a for a, b in zip(plain_s, shared_s, strict=True)]
    ratios = [b / a - 1 for a, b in zip(plain_s, shared_s, strict=True)]
    low, high = interval(differences)
    low_share, high_share = interval(ratios)
    print(
        f"{arguments.pairs} pairs of {arguments.prompts} prompts of {arguments.prompt_tokens} tokens, "
        f"{arguments.tokens} tokens generated each"
    )
    print(f"without connector  {statistics.mean(plain_s):.3f} CPU s a turn")
    print(
        f"with connector     {statistics.mean(shared_s):.3f} CPU s a turn (and the node {statistics.mean(node_s):.3f})"
    )
    print(
        f"difference         {statistics.mean(differences) * 1e3:+.1f} ms [{low * 1e3:+.1f}, {high * 1e3:+.1f}] a turn"
    )
    print(f"                   {statistics.mean(ratios):+.2%} [{low_share:+.2%}, {high_share:+.2%}]")
    print(f"the connector's counts: {counts}")


def main() -> None:
    if sys.argv[1:2] == ["--engine"]:
        serve_turns(*sys.argv[2:5])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="a checkpoint directory with 512 tokens or more")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=900)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--slab-mib", type=int, default=1024)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(HELPERS)
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


if __name__ == "__main__":
    main()

"""Many seeds, each a world of its own; and of a failing one, the smallest plan of faults that still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from interlock.testing.sim.faults import KINDS, Fault, faults_of, shape_of
from interlock.testing.sim.worlds import Result, run_world

SHRINK_RUNS_MAX = 60
TIMELINE_LINES_MAX = 120


def run_seed(seed: int, kinds: Sequence[str] = KINDS) -> Result:
    """The world of one seed under its own plan of faults."""
    shape = shape_of(seed)
    return run_world(seed, shape, faults_of(seed, shape, kinds))


def run_seeds(seeds: Sequence[int], kinds: Sequence[str], jobs: int) -> Iterator[Result]:
    """Results as they come; several processes at a time, whose order of results is that of the seeds."""
    if jobs == 1:
        for seed in seeds:
            yield run_seed(seed, kinds)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_seed, seeds, [tuple(kinds)] * len(seeds))


def shrink(
    failed: Result,
    run: Callable[[int, Sequence[Fault]], Result] | None = None,
    runs_max: int = SHRINK_RUNS_MAX,
) -> Result:
    """A run of the same seed that still fails, with no more faults than it takes (ddmin, Zeller 1999).

    Whatever it fails of: the smallest plan may show another symptom of the same defect. Schedule and workload stay the seed's.
    """
    again = run or (lambda seed, faults: run_world(seed, failed.shape, faults))
    best, pieces, runs = failed, 2, 0
    if runs_max and best.faults and not (bare := again(failed.seed, [])).ok:
        return bare
    while len(best.faults) > 1 and runs < runs_max:
        size = -(-len(best.faults) // pieces)
        for start in range(0, len(best.faults), size):
            runs += 1
            left = best.faults[:start] + best.faults[start + size :]
            tried = again(failed.seed, left)
            if not tried.ok:
                best, pieces = tried, max(2, pieces - 1)
                break
        else:
            if size == 1:
                return best
            pieces = min(len(best.faults), 2 * pieces)
    return best


def report(result: Result, lines_max: int = TIMELINE_LINES_MAX) -> str:
    """A failing run in the system's own words: what broke, under which faults, and the timeline up to the first violation."""
    shape = result.shape
    first = next((n for n, line in enumerate(result.lines) if "VIOLATION" in line), len(result.lines))
    timeline = result.lines[max(0, first + 1 - lines_max) : first + 1]
    parts = [
        f"seed {result.seed}: {shape.engines} engines, {shape.fronts} fronts, {shape.kv_engines} store users of "
        f"{shape.ranks} ranks{', one engine far away' if shape.spread else ''}",
        "what must not be:",
        *(f"  {words}" for words in result.violations),
        f"the faults it takes ({len(result.faults)}):",
        *(f"  {fault}" for fault in result.faults),
        f"the timeline's last {len(timeline)} lines:",
        *(f"  {line}" for line in timeline),
    ]
    return "\n".join(parts)

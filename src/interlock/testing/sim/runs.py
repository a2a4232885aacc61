"""Many seeds, each a world of its own; and of a failing one, the smallest plan of faults and schedule that still fails."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import msgspec

from interlock.host.threads import monotonic_s
from interlock.testing.sim.faults import KINDS, Fault, Shape, faults_of, shape_of
from interlock.testing.sim.schedule import shrink_schedule
from interlock.testing.sim.worlds import Result, run_world

SHRINK_RUNS_MAX = 60
LUCK_TRIES = 60
SHRINK_SECONDS = 45.0
"""How long a schedule is cut down; each try is a run of its own."""
TIMELINE_LINES_MAX = 120
REPLAY_BYTES_MAX = 4 * 1024 * 1024
Run = Callable[[int, Sequence[Fault]], Result]


class Replay(msgspec.Struct, frozen=True):
    """One run, whole: the same code plays it the same way, whatever seeds mean by then."""

    seed: int
    shape: Shape
    faults: list[Fault]
    schedule: dict[int, int] | None
    """None: the seed's own."""
    luck: int = 0


def run_seed(seed: int, kinds: Sequence[str] = KINDS) -> Result:
    """The world of one seed under its own plan of faults."""
    shape = shape_of(seed)
    return run_world(seed, shape, faults_of(seed, shape, kinds))


def run_seeds(seeds: Sequence[int], kinds: Sequence[str], jobs: int) -> Iterator[Result]:
    """Results as they come; several processes at a time, whose order of results is that of the seeds."""
    if jobs == 1:
        for seed in seeds:
            yield _light(run_seed(seed, kinds))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_run_light, seeds, [tuple(kinds)] * len(seeds), chunksize=4)


def _run_light(seed: int, kinds: Sequence[str]) -> Result:
    return _light(run_seed(seed, kinds))


def _light(result: Result) -> Result:
    """Nobody reads the timeline of a run that was well."""
    return msgspec.structs.replace(result, lines=[]) if result.ok else result


# --- one run again -------------------------------------------------------------------------------------------------------


def replay_text(result: Result, *, fixed: bool) -> str:
    """What `--replay` takes. `fixed`: with the schedule that the result was shrunk to, else with the seed's."""
    whole = Replay(result.seed, result.shape, result.faults, result.schedule if fixed else None, result.luck)
    return base64.urlsafe_b64encode(zlib.compress(msgspec.json.encode(whole), 9)).decode()


def run_replay(text: str) -> Result:
    """Plays what `replay_text` wrote. Raises ValueError for anything else."""
    try:
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(base64.urlsafe_b64decode(text.strip()), REPLAY_BYTES_MAX)
        whole = msgspec.json.decode(data, type=Replay)
    except (zlib.error, binascii.Error, ValueError, msgspec.MsgspecError) as error:
        raise ValueError(f"this is no run that `interlock simulate` printed: {error}") from error
    return run_world(whole.seed, whole.shape, whole.faults, whole.schedule, whole.luck)


# --- smaller -------------------------------------------------------------------------------------------------------------


def shrink(failed: Result, run: Run | None = None, runs_max: int = SHRINK_RUNS_MAX) -> Result:
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


def straighten(failed: Result, seconds: float = SHRINK_SECONDS) -> Result:
    """The same faults under as plain a schedule as still fails: what is left of it is the race, if it takes one.

    Many defects take no race, only bad luck with delays and workload, which a changed schedule changes with it: so the plain
    schedule is tried with other luck first, then the seed's own is cut down.
    """
    until_s = monotonic_s() + seconds
    best = failed
    for luck in range(LUCK_TRIES):
        tried = run_world(failed.seed, failed.shape, failed.faults, {}, luck)
        if not tried.ok:
            return tried
        if monotonic_s() > until_s - seconds / 2:
            break

    def fails(schedule: Mapping[int, int]) -> bool:
        nonlocal best
        tried = run_world(failed.seed, failed.shape, failed.faults, schedule)
        if not tried.ok:
            best = tried
        return not tried.ok

    least = shrink_schedule(failed.schedule, fails, lambda: monotonic_s() < until_s)
    assert best is failed or set(best.schedule) <= set(least)
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
        f"the schedule: {len(result.schedule)} of {result.draws} choices are not the default",
        *(f"  {words}" for words in result.deviations),
        f"the timeline's last {len(timeline)} lines:",
        *(f"  {line}" for line in timeline),
    ]
    return "\n".join(parts)

"""Whole fleets of the real classes on the simulated machine, for as many seeds as the time holds (`make long`: thousands)."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys

import msgspec
import pytest

from interlock.host.threads import monotonic_s
from interlock.testing.sim.faults import KINDS, Fault, faults_of, shape_of
from interlock.testing.sim.kernel import SimProcess
from interlock.testing.sim.loop import SimFuture, SimTask
from interlock.testing.sim.runs import report, run_seed, shrink
from interlock.testing.sim.worlds import Result, run_world

SECONDS = 40.0
SEEDS_MAX = 400
FOUND_BEFORE = (33, 46, 176, 327, 415, 480, 1012, 1024, 2494, 3275, 4229, 249, 928)
"""Seeds that once found a bug of ours (docs/testing.md)."""
DIGESTS = """
import hashlib
from interlock.testing.sim.runs import run_seed
for seed in (42, 44):
    print(hashlib.sha256("\\n".join(run_seed(seed).lines).encode()).hexdigest())
"""


@pytest.mark.simulator
@pytest.mark.timeout(300)
def test_every_seed_that_fits_into_the_time_is_well() -> None:
    began_s = monotonic_s()
    for seed in (*FOUND_BEFORE, *range(SEEDS_MAX)):
        result = run_seed(seed)
        assert result.ok, report(result)
        if monotonic_s() - began_s > SECONDS and seed not in FOUND_BEFORE:
            break


@pytest.mark.simulator
@pytest.mark.timeout(120)
def test_the_real_store_client_serves_schedulers_and_ranks_on_threads() -> None:
    """Without faults, and every promise is kept: seed 0 found that a rank which was not attached yet dropped its report."""
    for seed in range(2):
        shape = msgspec.structs.replace(shape_of(seed), clients=True, ranks=2)
        result = run_world(seed, shape, [])
        assert result.ok, report(result)
        assert run_world(seed, shape, []).lines == result.lines


@pytest.mark.simulator
def test_a_client_whose_connection_is_half_open_makes_a_new_one() -> None:
    """Its breaker opened and closed for ever: time-outs were no reason to give the connection up."""
    shape = msgspec.structs.replace(shape_of(8), clients=True, stop=False)
    for rank in ("", "-r0"):
        result = run_world(8, shape, [Fault(5.0, "half-open", "store", f"kv-0{rank}")])
        assert result.ok, report(result)


@pytest.mark.simulator
@pytest.mark.timeout(120)
def test_a_coordinator_without_disk_clock_and_engines_leads_above_what_fronts_remember() -> None:
    """Seed 1012, by hand."""
    for seed in range(3):
        shape = msgspec.structs.replace(shape_of(seed), engines=1, stop=False, spread=False, run_s=12.0)
        faults = [
            Fault(3.0, "clock-back", "host-a", detail="86400"),
            Fault(5.0, "state-lost", "coordinator"),
            Fault(5.0, "crash", "engine-0"),
        ]
        result = run_world(seed, shape, faults)
        assert result.ok, report(result)


@pytest.mark.simulator
def test_without_faults_every_request_is_answered() -> None:
    for seed in range(3):
        result = run_seed(seed, ())
        assert result.ok, report(result)
        assert result.served > 3
        assert not result.faults


@pytest.mark.simulator
def test_the_same_seed_gives_the_same_log_byte_for_byte_whatever_the_hash_seed() -> None:
    digests = []
    for hash_seed in ("0", "4711"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            [sys.executable, "-c", DIGESTS],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        digests.append(run.stdout)
    assert len(set(digests)) == 1
    here = [hashlib.sha256("\n".join(run_seed(seed).lines).encode()).hexdigest() for seed in (42, 44)]
    assert digests[0].split() == here


def test_another_seed_gives_another_world_and_other_faults() -> None:
    assert shape_of(1) != shape_of(2)
    plans = [faults_of(seed, shape_of(seed), KINDS) for seed in range(8)]
    assert len({tuple(map(str, plan)) for plan in plans if plan}) == sum(map(bool, plans))


def test_a_failing_plan_shrinks_to_the_faults_it_takes() -> None:
    shape = shape_of(0)
    faults = [Fault(float(n), "crash", f"engine-{n}") for n in range(14)]

    def run(seed: int, plan: object) -> Result:
        assert isinstance(plan, list)
        names = {fault.target for fault in plan}
        broken = ["both"] if {"engine-3", "engine-11"} <= names else []
        return Result(seed, shape, plan, broken, ["   0.0  VIOLATION both"], 0.0, 0, 0)

    smallest = shrink(run(0, faults), run)
    assert [fault.target for fault in smallest.faults] == ["engine-3", "engine-11"]
    words = report(smallest)
    assert "seed 0" in words
    assert "crash engine-11" in words
    assert "VIOLATION" in words


@pytest.mark.simulator
def test_a_fleet_whose_only_engine_never_thaws_in_time_is_still_served_afterwards() -> None:
    shape = msgspec.structs.replace(shape_of(1), engines=1, stop=False, run_s=6.0)
    result = run_world(1, shape, [Fault(1.0, "freeze", "engine-0", seconds=60.0)])
    assert result.ok, report(result)


@pytest.mark.simulator
@pytest.mark.timeout(120)
def test_a_run_leaves_nothing_behind() -> None:
    """Each once left 4 MB: a `finally` that made a task after the run had asyncio set up a real loop, which kept the whole world."""
    for seed in range(4):
        shape = msgspec.structs.replace(shape_of(seed), run_s=3.0, stop=False, web=bool(seed % 2))
        result = run_world(seed, shape, faults_of(seed, shape, KINDS))
        assert result.ok, report(result)
        left = [thing for thing in gc.get_objects() if isinstance(thing, (SimTask, SimFuture, SimProcess))]
        assert not left, f"after {seed + 1} runs there are still {len(left)}, for instance {left[0]!r}"

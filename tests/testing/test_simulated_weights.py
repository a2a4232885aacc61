"""The simulated engine and the checks tell weights apart, and whole fleets change them, sleep and wake under every fault."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from interlock.fleet.generation import Made
from interlock.host.threads import monotonic_s
from interlock.testing.sim.faults import Fault, shape_of
from interlock.testing.sim.promises import Promises
from interlock.testing.sim.runs import report, run_seed
from interlock.testing.sim.tokens import answer_to, next_token, spread, went_back, wrong_token
from interlock.testing.sim.worlds import run_world

SECONDS = 20.0
PROMPT = [7, 7, 7]


def test_a_token_of_other_weights_than_it_says_is_seen() -> None:
    tokens = answer_to(PROMPT, 4, "3")
    assert wrong_token(PROMPT, tokens, ["3"] * 4, kept=False) is None
    assert wrong_token(PROMPT, tokens, ["3", "3", "4", "4"], kept=True) is not None
    assert wrong_token(PROMPT, tokens, ["3"] * 3, kept=False) == (
        "4 tokens came and 3 of them say by which weights"
    )


def test_a_token_over_kv_of_other_weights_is_seen_but_where_an_update_kept_it() -> None:
    first = answer_to(PROMPT, 2, "1")
    mixed = [*first, next_token("2", [*PROMPT, *first], mixed=True)]
    versions = spread([Made("1", 2), Made("2", 1)])
    assert wrong_token(PROMPT, mixed, versions, kept=False) is not None
    assert wrong_token(PROMPT, mixed, versions, kept=True) is None
    alone = [next_token("2", PROMPT, mixed=True)]
    assert wrong_token(PROMPT, alone, ["2"], kept=True) is not None, (
        "a request of one version has no KV of another"
    )


def test_a_request_that_goes_back_to_older_weights_is_seen() -> None:
    order = {"0": 0, "2": 1, "10": 2}
    assert went_back(["2", "10", "10"], order) is None
    assert went_back(["10", "2"], order) == "weights '2' went on where '10' had been"


class Process:
    """What the promises ask of one."""

    name = "engine-0"
    dead = False


def promises() -> tuple[Promises, list[str], Any]:
    told: list[str] = []
    process = cast("Any", Process())
    runner = SimpleNamespace(member_state=SimpleNamespace(heard="something", state="RUNNING"))
    return Promises(told.append, cast("Any", {process: runner}), {}), told, process


def test_a_step_with_other_weights_than_somebody_was_told_is_seen() -> None:
    ours, told, process = promises()
    asked = ours.update_asked("recompute")
    ours.decided("1")
    ours.loaded(process, "1")
    ours.update_done("1", asked)
    ours.stepped(process, "begins", "1")
    assert not told
    ours.stepped(process, "begins", "0")
    assert "with weights 0, and every engine stands with 1" in told[-1]
    ours.stepped(process, "ends", None)
    assert "without whole weights" in told[-1]
    ours.update_asked("keep")
    told.clear()
    ours.stepped(process, "begins", "0")
    assert not told, "from the question on, nothing is promised"
    ours.update_done("2", ours.update_asked("keep"))
    assert "weights 2 stand, and" in told[-1]


def test_a_hold_that_was_broken_while_it_was_asked_for_promises_nothing() -> None:
    ours, told, process = promises()
    before = ours.breaks_of("one")
    with ours.breaking("one"), ours.breaking("one"):
        ours.holds("one", 1.0, before)
        ours.holds("one", 1.0, ours.breaks_of("one"))
    ours.stepped(process, "begins", "0")
    assert not told
    ours.holds("one", 2.0, ours.breaks_of("one"))
    ours.stepped(process, "begins", "0")
    assert "one was told at 2.000 s that the fleet stands" in told[0]


@pytest.mark.simulator
@pytest.mark.timeout(300)
def test_fleets_that_change_their_weights_sleep_and_wake_are_well_for_every_seed_that_fits_into_the_time() -> (
    None
):
    began_s = monotonic_s()
    for seed in (seed for seed in range(1000, 2000) if shape_of(seed).weights):
        result = run_seed(seed)
        assert result.ok, report(result)
        if monotonic_s() - began_s > SECONDS:
            break


@pytest.mark.simulator
@pytest.mark.timeout(120)
def test_without_faults_they_do_all_of_it() -> None:
    """A world in which nothing of it happened would be well, too."""
    awaited = {
        "was told that weights",
        "was told that the fleet is suspended",
        "everything is switched off",
        "is refused at epoch",
        "fails to update",
        "was told that the fleet is stopped",
        "was told that the fleet is started",
    }
    for seed in range(20):
        shape = msgspec.structs.replace(shape_of(seed), weights=True, starts=True, quiet=False, run_s=20.0)
        result = run_world(seed, shape, [])
        assert result.ok, report(result)
        assert result.served
        awaited -= {words for words in awaited if any(words in line for line in result.lines)}
        if not awaited:
            return
    pytest.fail(f"twenty worlds have not seen this: {awaited}")


@pytest.mark.simulator
@pytest.mark.timeout(120)
def test_the_coordinator_the_engines_and_the_fronts_die_at_every_moment_of_a_suspension() -> None:
    for seed in range(3):
        shape = msgspec.structs.replace(shape_of(seed), weights=True, run_s=16.0)
        names = ["coordinator", "engine-0", "front-0"]
        faults = [Fault(1.0 + 0.7 * n, "crash", names[n % 3]) for n in range(20)]
        result = run_world(seed, shape, faults)
        assert result.ok, report(result)


def test_a_fleet_that_is_said_to_be_stopped_has_no_engine_that_goes_on_unless_somebody_starts_it() -> None:
    ours, told, _ = promises()
    asked = ours.stop_asked()
    ours.start_asked()
    ours.stop_done(asked)
    assert not told
    ours.stop_done(ours.stop_asked())
    assert "is STOPPED, and" in told[0]


def test_a_start_with_other_weights_promises_them_once_it_is_done() -> None:
    ours, told, process = promises()
    ours.update_asked("recompute")
    ours.decided("3")
    ours.start_done("3")
    ours.stepped(process, "begins", "3")
    assert not told
    ours.stepped(process, "begins", "0")
    assert "every engine stands with 3" in told[0]


@pytest.mark.simulator
@pytest.mark.timeout(120)
def test_a_fleet_is_stopped_and_started_while_everybody_dies() -> None:
    for seed in range(4):
        shape = msgspec.structs.replace(shape_of(seed), weights=True, starts=True, run_s=16.0)
        names = ["coordinator", "engine-0", "front-0"]
        faults = [Fault(1.0 + 0.9 * n, "crash", names[n % 3]) for n in range(16)]
        result = run_world(seed, shape, faults)
        assert result.ok, report(result)

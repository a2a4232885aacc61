"""The command `interlock simulate`: what it prints and how it ends."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from interlock.cli.main import main
from interlock.testing.sim import runs
from interlock.testing.sim.faults import Fault, shape_of
from interlock.testing.sim.worlds import Result


@pytest.mark.simulator
def test_seeds_that_are_well_end_with_status_0_and_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--seeds", "2", "--jobs", "1", "--faults", "crash"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 seeds, 0 failed;")
    assert "runs a minute" in said


@pytest.mark.simulator
def test_a_seed_can_be_traced(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--seed", "1", "--trace", "--faults", "none"]) == 0
    said = capsys.readouterr().out
    assert "coordinator[102] starts on host-a" in said
    assert "the faults cease" in said


def test_a_failing_seed_ends_with_status_1_and_its_smallest_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shape_of(3)

    def broken(seed: int, faults: list[Fault]) -> Result:
        bad = ["it fell over"] if any(fault.kind == "power-cut" for fault in faults) else []
        return Result(seed, shape, list(faults), bad, ["0.0  VIOLATION it fell over"], 1.0, 1, 0)

    plan = [Fault(1.0, "crash", "store"), Fault(2.0, "power-cut", "host-a"), Fault(3.0, "crash", "front-0")]
    monkeypatch.setattr(runs, "run_seed", lambda seed, kinds: broken(seed, plan))
    monkeypatch.setattr(runs, "run_world", lambda seed, shape, faults, *more: broken(seed, list(faults)))
    assert main(["simulate", "--seed", "3"]) == 1
    said = capsys.readouterr().out
    assert "the faults it takes (1):" in said
    assert "power-cut host-a" in said
    assert "again: interlock simulate --seed 3 --trace" in said
    assert "the schedule: 0 of 0 choices are not the default" in said
    text = said.rpartition("--replay ")[2].strip()
    assert main(["simulate", "--replay", text]) == 1
    assert "power-cut host-a" in capsys.readouterr().out


def test_a_run_is_replayed_from_a_file_and_junk_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shape = msgspec.structs.replace(shape_of(3), run_s=2.0)
    file = tmp_path / "run"
    file.write_text(runs.replay_text(Result(3, shape, [], [], [], 0.0, 0, 0), fixed=True))
    assert main(["simulate", "--replay", f"@{file}"]) == 0
    assert "seed 3: well this time" in capsys.readouterr().out
    assert main(["simulate", "--replay", "junk"]) == 2
    assert "no run that" in capsys.readouterr().err
    assert main(["simulate", "--replay", f"@{tmp_path}/none"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_an_unknown_kind_of_fault_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--faults", "gremlins"]) == 2
    assert "'gremlins' is no kind of fault" in capsys.readouterr().err

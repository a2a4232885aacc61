"""The example is what a trainer copies: it runs for real, with an engine killed on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "rl_loop.py"
pytestmark = [pytest.mark.fleet, pytest.mark.timeout(600)]


def test_a_trainers_loop_with_an_engine_killed_on_the_way_ends_with_nothing_amiss(run_home: Path) -> None:
    words = [sys.executable, str(EXAMPLE), "--rounds", "4", "--kill-in", "2", "--steps", "1"]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(run_home), "TMPDIR": str(run_home)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=540, check=False)
    said = done.stdout
    assert done.returncode == 0, said[-3000:] + done.stderr[-3000:]
    rows = [line for line in said.splitlines() if line.strip()[:1].isdigit() and " s " in line]
    assert [row.split()[0] for row in rows if "pause" not in row][:4] == ["1", "2", "3", "4"]
    assert "killed (process " in said
    assert "all held" in said
    assert [path for path in run_home.rglob("*") if path.is_file()] == []

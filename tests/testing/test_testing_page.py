"""What docs/testing.md tells an outsider to do works from an empty folder, and finds what it says it finds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"
WRITES = 'await host.in_thread(host.files.write_durably, STATE, b"%d" % count)'
WRITES_LATE = 'asyncio.get_running_loop().call_later(0.05, host.files.write_durably, STATE, b"%d" % count)'


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_counter.py").write_text(code)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_counter.py"]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_the_pages_example_runs_in_an_empty_folder_and_fails_where_it_should(tmp_path: Path) -> None:
    example = next(
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "def counter" in code
    )
    right = run(tmp_path, example)
    assert "10 passed" in right.stdout, right.stdout
    assert example.count(WRITES) == 1
    wrong = run(tmp_path, example.replace(WRITES, WRITES_LATE))
    assert "10 failed" in wrong.stdout, wrong.stdout
    assert "the last lines of its timeline" in wrong.stdout

"""The table of holes names tests that exist: a guarantee whose test was renamed away is noticed here."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "docs" / "protocols" / "holes.md"


def test_every_test_that_the_table_of_holes_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", TABLE.read_text()))
    there = {
        name
        for path in TESTS.rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 60
    assert named <= there, f"no such tests: {sorted(named - there)}"


def test_all_twenty_holes_stand_in_the_table() -> None:
    rows = re.findall(r"^\| (\d+) \|.*`test_\w+`", TABLE.read_text(), re.MULTILINE)
    assert rows == [str(number) for number in range(1, 21)]

"""What the tests with real engines share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from interlock.host.processes import list_processes


@pytest.fixture(scope="session")
def descendants() -> Callable[[int], list[int]]:
    """The processes below one, by descent, whatever session they are in."""

    def below(root: int) -> list[int]:
        entries = list_processes()
        found, frontier = [], {root}
        while frontier:
            frontier = {entry.pid for entry in entries if entry.parent in frontier}
            found += sorted(frontier)
        return found

    return below

"""What the tests with real engines share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture(scope="module")
def run_home() -> Iterator[Path]:
    """A private home for run directories, with the short path that sockets need; pytest's own are too long."""
    home = Path(tempfile.mkdtemp(prefix="il-"))
    yield home
    shutil.rmtree(home)

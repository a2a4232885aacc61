"""What the examples' tests share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def run_home() -> Iterator[Path]:
    """A private home for run directories, with the short path that sockets need; pytest's own are too long."""
    home = Path(tempfile.mkdtemp(prefix="il-"))
    yield home
    shutil.rmtree(home)

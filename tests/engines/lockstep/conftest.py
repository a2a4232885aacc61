"""Two ranks of a tiny Mixtral in lockstep: real processes, real gloo, shared by all tests that leave them alive."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent / "transformers"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from gatekeeper import GATE, Gatekeeper
from lockstep_bench import Groups
from tiny_models import Library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """With a short path, which sockets need."""
    path = Path(tempfile.mkdtemp(prefix="il-"))
    yield path
    shutil.rmtree(path)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def gatekeeper(home: Path) -> AsyncIterator[Gatekeeper]:
    keeper = Gatekeeper(home / "gate.sock")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(GATE, str(keeper.path))
        await keeper.open()
        yield keeper
        await keeper.close()


@pytest.fixture
def gate(gatekeeper: Gatekeeper) -> Iterator[Gatekeeper]:
    """Open for every rank before and after the test."""
    gatekeeper.reset()
    yield gatekeeper
    gatekeeper.reset()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def all_groups(library: Library, home: Path, gatekeeper: Gatekeeper) -> AsyncIterator[Groups]:
    groups = Groups(library, home)
    yield groups
    await groups.close()


@pytest_asyncio.fixture(loop_scope="session")
async def groups(all_groups: Groups) -> AsyncIterator[Groups]:
    """`await groups.take(gated=True)`: a started, idle group. What the test leaves so is kept for the next one."""
    yield all_groups
    await all_groups.take_back()

"""Two ranks of a tiny Mixtral in lockstep: real processes, real gloo."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent / "transformers"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from gatekeeper import Gatekeeper
from lockstep_bench import GATED, make_engine
from tiny_models import Library

from interlock.engines.lockstep.engine import LockstepEngine


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def home() -> Iterator[Path]:
    """With a short path, which sockets need."""
    path = Path(tempfile.mkdtemp(prefix="il-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def gate(home: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gatekeeper]:
    keeper = Gatekeeper(home / "gate.sock")
    monkeypatch.setenv("TEST_LOCKSTEP_GATE", str(keeper.path))
    await keeper.open()
    yield keeper
    await keeper.close()


@pytest.fixture
async def start(library: Library, home: Path) -> AsyncIterator[Callable[..., Awaitable[LockstepEngine]]]:
    """`await start(gated=True)`: a started engine; stopped at the end, with no process left."""
    started: list[LockstepEngine] = []

    async def begin(*, gated: bool = False, **options: Any) -> LockstepEngine:
        engine = make_engine(library, home, program=GATED if gated else None, **options)
        started.append(engine)
        await engine.start()
        return engine

    yield begin
    for engine in started:
        async with asyncio.timeout(30):
            await engine.stop()

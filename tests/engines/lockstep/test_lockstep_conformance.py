"""A lockstep group passes the public conformance suite of engines."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from lockstep_bench import Groups, pids
from tiny_models import VOCABULARY, Library

from interlock.engines.lockstep.engine import LockstepEngine
from interlock.testing.check_engine import Bench, Check, Ground, engine_checks

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="session")]


def kill(engine: object) -> None:
    assert isinstance(engine, LockstepEngine)
    os.kill(pids(engine)[1], signal.SIGKILL)


@pytest_asyncio.fixture(loop_scope="session")
async def bench(groups: Groups, library: Library) -> AsyncIterator[Bench]:
    """A check that leaves its group alive and as it was gives it to the next one."""
    engine = await groups.take()
    library.model("mixtral", seed=1)
    ground = Ground(
        vocabulary=VOCABULARY,
        kill=kill,
        own_weights=groups.weights(engine),
        other_weights=library.path("mixtral", 1),
        prefill_tokens=1500,
        patience_s=90.0,
    )
    yield Bench(engine, groups.capabilities, ground)


@pytest.mark.parametrize("check", engine_checks(), ids=str)
async def test_a_lockstep_group_conforms(check: Check, bench: Bench) -> None:
    await check.run(bench)

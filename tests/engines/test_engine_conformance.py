"""The Transformers engine passes the public conformance suite, on a checkpoint made here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from interlock.engines.random_llama import TINY, write_llama
from interlock.engines.transformers.engine import TransformersEngine
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.real import RealHost
from interlock.testing.check_engine import Bench, Check, Ground, engine_checks

pytestmark = [pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("weights")
    return [write_llama(home / str(seed), TINY, seed) for seed in (7, 8)]


def ground(weights: list[Path]) -> Ground:
    return Ground(
        vocabulary=TINY.vocabulary,
        kill=kill,
        own_weights=weights[0],
        other_weights=weights[1],
        prefill_tokens=1500,
        patience_s=60.0,
    )


def kill(engine: object) -> None:
    """Its thread ends by an error, as of a defect in the library."""
    assert isinstance(engine, TransformersEngine)
    engine._loop._ranks.computer.forward = None


def make_engine(weights: list[Path], home: Path) -> TransformersEngine:
    config = TransformersConfig(
        model=str(weights[0]),
        model_id="tiny",
        name="engine-0",
        state_dir=str(home / "state"),
        scratch_dir=str(home),
        step_tokens=128,
    )
    return TransformersEngine(RealHost(), config)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(weights: list[Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    engine = make_engine(weights, tmp_path_factory.mktemp("engine"))
    yield Bench(engine, await engine.start(), ground(weights))
    await engine.stop()


@pytest.mark.parametrize("check", engine_checks(ends=False), ids=str)
async def test_the_transformers_engine_conforms(check: Check, shared: Bench) -> None:
    await check.run(shared)


@pytest.mark.parametrize("check", engine_checks(ends=True), ids=str)
async def test_the_transformers_engine_ends_as_it_should(
    check: Check, weights: list[Path], tmp_path: Path
) -> None:
    engine = make_engine(weights, tmp_path)
    try:
        await check.run(Bench(engine, await engine.start(), ground(weights)))
    finally:
        async with asyncio.timeout(20):
            await engine.stop()

"""A lockstep group passes the public conformance suite of engines."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
import transformers
from lockstep_bench import pids

from interlock.engines.lockstep.engine import LockstepEngine
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.real import RealHost
from interlock.testing.check_engine import Bench, Check, Ground, engine_checks

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]
VOCABULARY = 512


def write_mixtral(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("weights")
    return [write_mixtral(home / str(seed), seed) for seed in (7, 8)]


@pytest.fixture(scope="module")
def homes() -> Iterator[Path]:
    """With a short path, which sockets need."""
    path = Path(tempfile.mkdtemp(prefix="il-"))
    yield path
    shutil.rmtree(path)


def ground(weights: list[Path]) -> Ground:
    return Ground(
        vocabulary=VOCABULARY,
        kill=kill,
        own_weights=weights[0],
        other_weights=weights[1],
        prefill_tokens=1500,
        patience_s=90.0,
    )


def kill(engine: object) -> None:
    assert isinstance(engine, LockstepEngine)
    os.kill(pids(engine)[1], signal.SIGKILL)


def make_engine(weights: list[Path], home: Path) -> LockstepEngine:
    (home / "scratch").mkdir(parents=True)
    config = TransformersConfig(
        model=str(weights[0]),
        model_id="tiny",
        name="group",
        state_dir=str(home / "state"),
        scratch_dir=str(home / "scratch"),
        log=str(home / "log"),
        step_tokens=128,
        data_parallel=2,
    )
    return LockstepEngine(RealHost(), config)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(weights: list[Path], homes: Path) -> AsyncIterator[Bench]:
    engine = make_engine(weights, homes / "shared")
    yield Bench(engine, await engine.start(), ground(weights))
    await engine.stop()


@pytest.mark.parametrize("check", engine_checks(ends=False), ids=str)
async def test_a_lockstep_group_conforms(check: Check, shared: Bench) -> None:
    await check.run(shared)


@pytest.mark.parametrize("check", engine_checks(ends=True), ids=str)
async def test_a_lockstep_group_ends_as_it_should(check: Check, weights: list[Path], homes: Path) -> None:
    engine = make_engine(weights, homes / check.name[:12])
    try:
        await check.run(Bench(engine, await engine.start(), ground(weights)))
    finally:
        async with asyncio.timeout(30):
            await engine.stop()

"""`engines.vllm` over a real vLLM: the public conformance suite, and what only its kind of engine does.

One start-up serves the file up to the engine's death; stopping it is checked on another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from interlock.core.sampling import Sampling
from interlock.core.targets import KeptCache
from interlock.engines.base import RequestRejected, Unable
from interlock.engines.demo_model import SEED, SHAPE, build_demo_model
from interlock.engines.random_llama import write_llama
from interlock.engines.vllm import VllmEngine
from interlock.engines.vllm_setup import VllmConfig
from interlock.host.real import RealHost
from interlock.host.sweep import descendants, remove_shared_memory, shared_memory_of
from interlock.testing.check_engine import Bench, Check, Ground, engine_checks

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

SUITE = engine_checks(ends=False)
(SUSPENSION,) = [check for check in SUITE if check.name == "a_suspended_engine_keeps_its_requests"]
SUITE.remove(SUSPENSION)  # asked below, together with what only this kind of engine must show
DEATH, STOP = engine_checks(ends=True)


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model drawn with another seed; the engine reads its tokenizer, too."""
    folder = write_llama(tmp_path_factory.mktemp("weights") / "other", SHAPE, SEED + 1)
    for file in build_demo_model().iterdir():
        if file.suffix == ".json" and not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@contextlib.contextmanager
def cleared() -> Iterator[None]:
    """Whatever an engine of these tests leaves behind goes with it."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        memory = shared_memory_of(os.getpid())
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        remove_shared_memory(memory)
        os.environ.clear()
        os.environ.update(environment)


async def started(home: Path, other_weights: Path) -> Bench:
    config = VllmConfig(
        model=str(build_demo_model()),
        model_id="demo",
        name="engine-0",
        store=None,
        state_dir=str(home / "state"),
        scratch_dir=str(home),
        # Small steps, so that a prompt takes several and can be met in the middle.
        arguments=["--max-model-len", "2048", "--max-num-batched-tokens", "256"],
    )
    engine = VllmEngine(RealHost(), config)
    capabilities = await engine.start()
    assert capabilities.max_model_tokens == 2048
    ground = Ground(
        vocabulary=8000,
        kill=kill,
        own_weights=build_demo_model(),
        other_weights=other_weights,
        prefill_tokens=1500,
        patience_s=120.0,
    )
    return Bench(engine, capabilities, ground)


def kill(engine: object) -> None:
    """Its last worker."""
    assert isinstance(engine, VllmEngine)
    assert engine._core is not None
    workers = descendants(engine._core.watches[0].pid)
    os.kill(max(workers), signal.SIGKILL)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory, other_weights: Path) -> AsyncIterator[Bench]:
    with cleared():
        bench = await started(tmp_path_factory.mktemp("vllm"), other_weights)
        yield bench
        await bench.engine.stop()


@pytest.mark.parametrize("check", SUITE, ids=str)
async def test_the_vllm_engine_conforms(check: Check, shared: Bench) -> None:
    await check.run(shared)


async def test_a_suspended_engine_keeps_its_requests_and_no_process_but_this_one(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspend, suspensions = shared.engine.suspend, 0

    async def watched() -> None:
        nonlocal suspensions
        assert suspensions or descendants(os.getpid())
        await suspend()
        suspensions += 1
        left = {pid: _words(pid) for pid in descendants(os.getpid())}
        assert not any(b"VLLM" in words or b"Engine" in words for words in left.values()), left
        assert not shared_memory_of(os.getpid()), "what the ranks shared went with them"

    with monkeypatch.context() as patch:
        patch.setattr(shared.engine, "suspend", watched)
        await SUSPENSION.run(shared)
    assert suspensions == 2
    assert (await shared.answer(shared.prompt(1), 3)).finish == "length"


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/comm").read_bytes()
    except OSError:
        return b""


async def test_kv_cannot_be_kept_over_a_change_of_weights(shared: Bench, other_weights: Path) -> None:
    async with shared.paused():
        with pytest.raises(Unable, match="drops its KV cache"):
            await shared.engine.update_weights(other_weights, "1", KeptCache.KEEP)


async def test_an_error_of_the_engine_is_not_the_clients_fault(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own ValueError in mid-stream ends the request as an error of the engine; only a refusal is the client's."""
    reader = shared.read(shared.prompt(2), 500)
    await reader.until(3)
    assert isinstance(shared.engine, VllmEngine)
    shared.engine._kept[reader.key].queue.put(ValueError("a defect"))
    last = await reader.end()
    assert (last.finish, last.detail) == ("error", "vLLM failed at it: ValueError: a defect")
    with pytest.raises(RequestRejected, match="top_p"):
        await shared.answer(shared.prompt(2), Sampling(max_tokens=1, top_p=3.0))


async def test_its_death_is_noticed_within_seconds(shared: Bench) -> None:
    async with asyncio.timeout(20):
        await DEATH.run(shared)


async def test_it_stops_in_order(tmp_path: Path, other_weights: Path) -> None:
    with cleared():
        bench = await started(tmp_path, other_weights)
        await STOP.run(bench)

"""`engines.vllm` over a real vLLM: tokens, freezing in mid-stream, aborts, refusals, and its death. One start-up for all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from interlock.core.targets import Mode
from interlock.engines.base import EngineGone, Progress, RequestRejected, Work
from interlock.engines.demo_model import build_demo_model
from interlock.engines.vllm import VllmEngine
from interlock.engines.vllm_setup import VllmConfig
from interlock.host.real import RealHost
from interlock.host.sweep import descendants, remove_shared_memory, shared_memory_of
from interlock.wire.engine_messages import Sampling

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

PROMPT = list(range(300, 400))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    home = tmp_path_factory.mktemp("vllm")
    config = VllmConfig(
        model=str(build_demo_model()),
        model_id="demo",
        name="engine-0",
        store=None,
        state_dir=str(home / "state"),
        scratch_dir=str(home),
        arguments=["--max-model-len", "2048"],
    )
    environment = dict(os.environ)
    engine = VllmEngine(RealHost(), config)
    capabilities = await engine.start()
    assert capabilities.max_model_tokens == 2048
    memory = shared_memory_of(os.getpid())
    try:
        yield engine
    finally:
        await engine.stop()
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        remove_shared_memory(memory)
        os.environ.clear()
        os.environ.update(environment)


class Reader:
    """One request, read in the background."""

    def __init__(
        self, engine: VllmEngine, key: str, tokens: int, prompt: list[int] | None = None, **more: int
    ) -> None:
        sampling = Sampling(max_tokens=tokens, temperature=0.0, **more)  # type: ignore[arg-type]
        work = Work(key=key, prompt=prompt or PROMPT, sampling=sampling, cache_salt="tenant:0")
        self.steps: list[Progress] = []
        self.grown = asyncio.Condition()
        self.task = asyncio.create_task(self._read(engine, work))

    async def _read(self, engine: VllmEngine, work: Work) -> None:
        async with contextlib.aclosing(engine.generate(work)) as steps:
            async for step in steps:
                async with self.grown:
                    self.steps.append(step)
                    self.grown.notify_all()

    @property
    def tokens(self) -> list[int]:
        return [token for step in self.steps for token in step.tokens]

    async def until(self, count: int) -> None:
        async with asyncio.timeout(60), self.grown:
            await self.grown.wait_for(lambda: len(self.tokens) >= count)

    async def end(self) -> Progress:
        async with asyncio.timeout(120):
            await self.task
        return self.steps[-1]


async def test_greedy_tokens_are_the_same_with_and_without_a_local_hit(engine: VllmEngine) -> None:
    first, second = Reader(engine, "a", 24), None
    assert (await first.end()).finish == "length"
    second = Reader(engine, "b", 24)
    assert (await second.end()).cached_tokens == 96
    assert first.tokens == second.tokens
    assert len(set(first.tokens)) > 12


async def test_logprobs_come_one_a_token_best_first(engine: VllmEngine) -> None:
    reader = Reader(engine, "logprobs", 5, logprobs=3)
    await reader.end()
    found = [entry for step in reader.steps for entry in step.logprobs]
    assert len(found) == 5
    for token, entry in zip(reader.tokens, found, strict=True):
        assert (entry.rank, len(entry.top), entry.top[0]) == (1, 3, (token, entry.logprob))
        assert [p for _, p in entry.top] == sorted((p for _, p in entry.top), reverse=True)


async def test_a_stop_token_ends_a_request_and_is_named(engine: VllmEngine) -> None:
    reader = Reader(engine, "plain", 8)
    await reader.end()
    wanted = reader.tokens[5]
    sampling = Sampling(max_tokens=50, temperature=0.0, stop_token_ids=[wanted])
    steps = [
        step
        async for step in engine.generate(
            Work(key="stopped", prompt=PROMPT, sampling=sampling, cache_salt="tenant:0")
        )
    ]
    assert (steps[-1].finish, steps[-1].detail) == ("stop", str(wanted))


async def test_salts_keep_caches_apart(engine: VllmEngine) -> None:
    sampling = Sampling(max_tokens=2, temperature=0.0)
    work = Work(key="other", prompt=PROMPT, sampling=sampling, cache_salt="another tenant:0")
    assert [step async for step in engine.generate(work)][-1].cached_tokens == 0


async def test_keep_freezes_in_mid_stream_and_the_tokens_are_those_of_an_undisturbed_run(
    engine: VllmEngine,
) -> None:
    undisturbed = Reader(engine, "undisturbed", 150)
    await undisturbed.end()
    reader = Reader(engine, "frozen", 150)
    await reader.until(10)
    await engine.pause(Mode.KEEP)
    count = len(reader.tokens)
    assert count < 150
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(reader.task), 1.0)
    assert len(reader.tokens) == count
    await engine.unpause()
    assert (await reader.end()).finish == "length"
    assert reader.tokens == undisturbed.tokens


async def test_a_request_that_comes_during_a_pause_waits_for_its_end(engine: VllmEngine) -> None:
    await engine.pause(Mode.KEEP)
    reader = Reader(engine, "early", 3)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(reader.task), 0.5)
    await engine.unpause()
    assert (await reader.end()).finish == "length"


async def test_a_stricter_pause_ends_one_that_waits(engine: VllmEngine) -> None:
    reader = Reader(engine, "long", 1500)
    await reader.until(5)
    waiting = asyncio.create_task(engine.pause(Mode.WAIT))
    await reader.until(len(reader.tokens) + 2)
    waiting.cancel()
    async with asyncio.timeout(10):
        await engine.pause(Mode.ABORT)
    assert (await reader.end()).finish == "abort"
    assert len(reader.tokens) < 1500
    await engine.unpause()


async def test_an_abort_ends_a_request_also_while_paused(engine: VllmEngine) -> None:
    reader = Reader(engine, "unwanted", 1500)
    await reader.until(5)
    await engine.pause(Mode.KEEP)
    await engine.abort("unwanted")
    await engine.abort("never heard of")
    assert (await reader.end()).finish == "abort"
    await engine.unpause()


async def test_leaving_the_iterator_aborts_in_the_engine(engine: VllmEngine) -> None:
    reader = Reader(engine, "left", 1500)
    await reader.until(5)
    reader.task.cancel()
    await asyncio.gather(reader.task, return_exceptions=True)
    await engine.pause(Mode.WAIT)  # returns only when nothing runs
    await engine.unpause()
    assert engine.load().running == 0


@pytest.mark.parametrize(
    ("sampling", "prompt", "words"),
    [
        (Sampling(max_tokens=0), PROMPT, "max_tokens"),
        (Sampling(max_tokens=4, top_p=7.0), PROMPT, "top_p"),
        (Sampling(max_tokens=4), [10**6], "vocabulary"),
        (Sampling(max_tokens=4), [300] * 3000, "maximum model length"),
    ],
)
async def test_impossible_requests_are_rejected_in_words(
    engine: VllmEngine, sampling: Sampling, prompt: list[int], words: str
) -> None:
    with pytest.raises(RequestRejected, match=words):
        async for _ in engine.generate(Work(key="bad", prompt=prompt, sampling=sampling, cache_salt="t")):
            pass


async def test_the_death_of_a_worker_is_noticed_within_seconds(engine: VllmEngine) -> None:
    reader = Reader(engine, "last", 1500)
    await reader.until(5)
    death = asyncio.create_task(engine.died())
    core = engine._core[0].pid
    workers = descendants(core)
    assert workers
    os.kill(max(workers), signal.SIGKILL)
    async with asyncio.timeout(5):
        assert "exited" in await death
    with pytest.raises(EngineGone):
        await reader.end()

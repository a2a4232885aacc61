"""A vLLM engine and a Transformers engine behind one endpoint, with one KV cache: what one computed the other reads.

Every token is compared with a plain vLLM run. One start-up serves the file; the last test kills the vLLM engine.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from interlock.cli import demo
from interlock.engines.demo_model import build_demo_model
from interlock.host.real import RealHost
from interlock.host.sockets import free_port
from interlock.testing.equality import Completion, compare
from interlock.text.model import TextModel

pytestmark = [
    pytest.mark.fleet,
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]
TOKENS = 24


@pytest.fixture(scope="module")
def host() -> RealHost:
    return RealHost()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return demo.documents(TextModel.load(build_demo_model()).encode)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def computing(host: RealHost, prompts: list[list[int]]) -> asyncio.Task[list[Completion]]:
    """The plain run, beside the start of the fleet: both mostly import."""
    return asyncio.create_task(demo.plain_run(host, build_demo_model(), prompts))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    host: RealHost, run_home: Path, computing: asyncio.Task[list[Completion]]
) -> AsyncIterator[demo.Fleet]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(run_home))
        engine = "vllm:1,transformers:1"
        model = str(build_demo_model())
        async with demo.running_fleet(host, model, free_port(), print, engine=engine) as running:
            await asyncio.wait({computing})
            yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reference(computing: asyncio.Task[list[Completion]], fleet: demo.Fleet) -> list[Completion]:
    return await computing


async def kinds(fleet: demo.Fleet) -> dict[str, str]:
    """Kind of engine → its name."""
    return {member["facts"]["engine"]: member["name"] for member in (await fleet.status())["members"]}


@pytest.mark.parametrize(("computes", "reads"), [("vllm", "transformers"), ("transformers", "vllm")])
async def test_what_one_kind_computed_the_other_reads_with_equal_tokens(
    fleet: demo.Fleet,
    prompts: list[list[int]],
    reference: list[Completion],
    computes: str,
    reads: str,
) -> None:
    names, found = await kinds(fleet), 0
    for index in (0, 1) if computes == "vllm" else (2, 3):
        prompt = prompts[index]
        cold = await fleet.answer(prompt, TOKENS, names[computes])
        other = await fleet.answer(prompt, TOKENS, names[reads])
        assert (cold.engine, other.engine) == (names[computes], names[reads])
        assert cold.cached_tokens < 64, "the documents have next to nothing in common"
        # On a busy machine one look-up may come too late, by design: then it is computed.
        found += other.cached_tokens >= len(prompt) - 64
        for name, answer in ((f"computed by {computes}", cold), (f"read by {reads}", other)):
            compared = compare(name, reference[index], answer.completion)
            assert compared.equal, str(compared)
    assert found, f"{reads} computed both documents anew"


async def test_both_kinds_stand_at_one_pause_and_go_on_unchanged(
    fleet: demo.Fleet, host: RealHost, prompts: list[list[int]], reference: list[Completion]
) -> None:
    names = await kinds(fleet)
    streams: list[tuple[list[int], list[float]]] = [([], []), ([], [])]

    async def read(name: str, ids: list[int], logprobs: list[float]) -> None:
        async for new, new_logprobs, _, _ in fleet.stream(prompts[0], demo.STREAM_TOKENS, name):
            ids.extend(new)
            logprobs.extend(new_logprobs)

    readers = [asyncio.ensure_future(read(name, *streams[i])) for i, name in enumerate(names.values())]
    async with asyncio.timeout(60):
        while not all(len(ids) >= 5 for ids, _ in streams):
            await host.clock.sleep_s(0.01)
    await fleet.ctl("pause", "--mode", "keep", "--owner", "test")
    assert all(member["standing"] for member in (await fleet.status())["members"])
    await host.clock.sleep_s(0.5)  # what was already on its way arrives
    frozen = [len(ids) for ids, _ in streams]
    await host.clock.sleep_s(1.0)
    assert [len(ids) for ids, _ in streams] == frozen
    assert min(frozen) < demo.STREAM_TOKENS
    await fleet.ctl("unpause", "--owner", "test")
    async with asyncio.timeout(120):
        await asyncio.gather(*readers)
    for name, (ids, logprobs) in zip(names, streams, strict=True):
        compared = compare(f"paused on {name}", reference[0], Completion(tokens=ids, logprobs=logprobs))
        assert compared.equal, str(compared)


async def test_a_request_goes_on_in_the_other_kind_when_its_engine_is_killed(
    descendants: Callable[[int], list[int]],
    fleet: demo.Fleet,
    host: RealHost,
    prompts: list[list[int]],
    reference: list[Completion],
) -> None:
    vllm = (await kinds(fleet))["vllm"]
    runner = (await fleet.engines())[vllm]
    tree = [runner, *descendants(runner)]
    assert len(tree) >= 2, "the runner had a core below it"
    ids: list[int] = []
    logprobs: list[float] = []
    async for new, new_logprobs, served_by, _ in fleet.stream(prompts[1], demo.STREAM_TOKENS, vllm):
        if not ids and new:
            assert served_by == vllm
        ids += new
        logprobs += new_logprobs
        if runner and len(ids) >= demo.FREEZE_AFTER_TOKENS:
            os.kill(runner, signal.SIGKILL)  # only the runner: its core and workers must not outlive it
            runner = 0
    compared = compare("vllm killed", reference[1], Completion(tokens=ids, logprobs=logprobs))
    assert compared.equal, str(compared)
    assert len(ids) == demo.STREAM_TOKENS
    deadline_s = host.clock.monotonic_s() + 50  # on a machine with one core free it takes one second
    while left := [pid for pid in tree if Path(f"/proc/{pid}").exists()]:
        words = {pid: Path(f"/proc/{pid}/status").read_text()[:200] for pid in left}
        assert host.clock.monotonic_s() < deadline_s, f"these outlived their runner {tree[0]}: {words}"
        await host.clock.sleep_s(0.1)

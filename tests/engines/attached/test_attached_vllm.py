"""A real vLLM that others run: paused in mid-stream, its weights changed in place, and no KV of the old ones hit afterwards.

Both kinds of attachment, one start-up each, both with our connector and a store node, where the old weights' blocks stay. That the
old blocks would be hit is shown first: the same prompt is found in the store after vLLM's own cache was emptied.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import interlock
from interlock.cli import demo
from interlock.engines.demo_model import SEED, SHAPE, build_demo_model
from interlock.engines.random_llama import write_llama
from interlock.fleet.client import FleetClient
from interlock.fleet.coordinator import Coordinator, CoordinatorConfig
from interlock.host.real import RealHost
from interlock.host.sockets import free_port
from interlock.host.sweep import descendants, remove_shared_memory, shared_memory_of
from interlock.store.main import StoreConfig, run_node
from interlock.testing.equality import Completion, compare
from interlock.text.model import TextModel
from interlock.wire.identity import load_identity

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TOKENS = 12
STREAM_TOKENS = 400
START_SECONDS = 300.0
Ask = Callable[[list[int], int], Awaitable[tuple[Completion, int]]]
"""(prompt, tokens) → what it made, and how many of the prompt's tokens were found in a cache."""


@pytest.fixture(scope="module")
def new_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("weights") / "new", SHAPE, SEED + 1)
    for file in build_demo_model().iterdir():
        if file.suffix == ".json" and not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [prompt[:300] for prompt in demo.documents(TextModel.load(build_demo_model()).encode)[:2]]


@pytest.fixture(scope="module")
def references(new_weights: Path, prompts: list[list[int]]) -> tuple[list[Completion], list[Completion]]:
    """By the old weights and by the new ones, from the library alone."""

    async def run() -> tuple[list[Completion], list[Completion]]:
        host = RealHost()
        old, new = await asyncio.gather(
            *(
                demo.plain_run(host, path, prompts, "transformers")
                for path in (build_demo_model(), new_weights)
            )
        )
        return old, new

    return asyncio.run(run())


class Place:
    """A coordinator and a store node in this process."""

    def __init__(self, folder: Path) -> None:
        self.host, self.folder = RealHost(), folder
        self.coordinator = f"unix:{folder}/coordinator.sock"
        self.store = f"unix:{folder}/store.sock"
        self.client = FleetClient(self.host, self.coordinator)

    @property
    def connector(self) -> dict[str, Any]:
        """As a user of plain vLLM configures it: nothing tells it of weights."""
        return {
            "kv_connector": "InterlockConnector",
            "kv_connector_module_path": "interlock.connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "store": self.store,
                "engine": "attached",
                "state_dir": str(self.folder / "connector"),
                "lookup_seconds": 1.0,
            },
        }


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(tmp_path)
    host = place.host
    state = tmp_path / "coordinator"
    host.files.make_private_dir(state)
    coordinator = Coordinator(
        host,
        load_identity(host, state, "coordinator"),
        CoordinatorConfig(address=place.coordinator, state_dir=state, recovering_s=0.1),
    )
    await coordinator.start()
    node = StoreConfig(address=place.store, state_dir=tmp_path / "node", slab_bytes=256 << 20)
    tasks = [asyncio.create_task(coordinator.run()), asyncio.create_task(run_node(host, node))]
    try:
        yield place
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await coordinator.close()


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


async def show_an_update(
    place: Place,
    engine: object,
    ask: Ask,
    empty_own_cache: Callable[[], Awaitable[None]],
    prompts: list[list[int]],
    references: tuple[list[Completion], list[Completion]],
    new_weights: Path,
) -> None:
    """The test itself, the same for both kinds."""
    old, new = references
    prompt = prompts[0]
    before, cached = await ask(prompt, TOKENS)
    assert cached == 0
    assert compare("before", old[0], before).equal
    async with asyncio.timeout(60):  # what was saved can be read a moment later
        while True:
            await empty_own_cache()
            again, cached = await ask(prompt, TOKENS)
            if cached:
                break
    assert cached >= 256, "the store has the old weights' blocks, and serves them"
    assert compare("from the store", old[0], again).equal

    async with await interlock.attach(
        engine, coordinator=place.coordinator, name="policy", weights=build_demo_model()
    ) as attached:
        await attached.joined(60.0)
        (member,) = (await place.client.status()).members
        assert "without_token_ledger" in member.facts.capabilities
        streaming = asyncio.create_task(ask(prompts[1], STREAM_TOKENS))
        await asyncio.sleep(0.3)  # it may be anywhere in its prompt or its answer
        async with place.client.paused(timeout_s=120.0) as pause:
            assert not streaming.done()
            await pause.update_weights("v1", str(new_weights), timeout_s=120.0)
            late = asyncio.create_task(ask(prompt, TOKENS))  # it comes while the fleet is paused
            await asyncio.sleep(0.3)
            assert not late.done()
        assert attached.version == "v1"
        for name, (made, cached) in {"late": await late, "after": await ask([*prompt], TOKENS)}.items():
            assert compare(name, new[0], made).equal
            assert not compare(name, old[0], made).equal, "the comparison can fail"
            if name == "late":
                assert cached == 0, "KV of the old weights lies in the store, and in vLLM's own cache"
        lived, _ = await streaming
        assert len(lived.tokens) == STREAM_TOKENS
        assert attached.drifts == 0
        _, cached = await ask(prompt, TOKENS)
        assert cached >= 256, "what the new weights made is shared again"


async def test_an_async_llm_in_this_process_hits_no_kv_of_the_old_weights(
    place: Place,
    prompts: list[list[int]],
    references: tuple[list[Completion], list[Completion]],
    new_weights: Path,
) -> None:
    from vllm.config import KVTransferConfig

    from interlock.engines.vllm_core import LastStats, VllmCore
    from interlock.engines.vllm_setup import VllmConfig, engine_arguments, prepare_environment

    with cleared():
        config = VllmConfig(
            model=str(build_demo_model()),
            model_id="",
            name="attached",
            store=None,
            state_dir=str(place.folder / "engine"),
            scratch_dir=str(place.folder),
            arguments=["--max-model-len", "1024"],
            kv_bytes=256 << 20,
        )
        prepare_environment(config)

        def build() -> Any:
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments = engine_arguments(config)
            arguments.kv_transfer_config = KVTransferConfig(**place.connector)
            return AsyncLLM.from_engine_args(arguments)

        llm = await place.host.in_thread(build)
        core = VllmCore(place.host, llm, LastStats())
        numbers = iter(range(1000))

        async def ask(prompt: list[int], tokens: int) -> tuple[Completion, int]:
            from vllm import SamplingParams

            sampling = SamplingParams(
                temperature=0.0, max_tokens=tokens, logprobs=2, ignore_eos=True, detokenize=False
            )
            last: Any = None
            async for output in llm.generate({"prompt_token_ids": prompt}, sampling, f"r{next(numbers)}"):
                last = output
            (made,) = last.outputs
            logprobs = [
                step[token].logprob for token, step in zip(made.token_ids, made.logprobs, strict=True)
            ]
            return Completion(tokens=list(made.token_ids), logprobs=logprobs), last.num_cached_tokens or 0

        async def empty_own_cache() -> None:
            assert await llm.reset_prefix_cache()

        try:
            await show_an_update(place, llm, ask, empty_own_cache, prompts, references, new_weights)
            attached = await interlock.attach(llm, coordinator=place.coordinator, name="dies")
            await attached.joined(60.0)
            assert attached.version == "v1", "vLLM's own label says what it has"
            os.kill(core.watches[0].pid, signal.SIGKILL)
            assert "has died" in await asyncio.wait_for(attached.ended(), 60.0)
            states = {member.name: member.state for member in (await place.client.status()).members}
            assert states["dies"] == "LOST"
        finally:
            await core.end()


async def test_a_server_by_its_url_hits_no_kv_of_the_old_weights(
    place: Place,
    prompts: list[list[int]],
    references: tuple[list[Completion], list[Completion]],
    new_weights: Path,
) -> None:
    import httpx

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(build_demo_model()),
        "--served-model-name", "policy", "--dtype", "float32", "--enforce-eager", "--block-size", "32",
        "--max-model-len", "1024", "--kv-cache-memory-bytes", str(256 << 20), "--host", "127.0.0.1",
        "--port", str(port), "--enable-prompt-tokens-details",
        "--kv-transfer-config", json.dumps(place.connector),
    ]  # fmt: skip
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_RPC_BASE_PATH": str(place.folder),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    log = place.folder / "server.log"
    child = await place.host.spawn(argv, env=environment, log=log)
    memory: set[str] = set()
    try:
        async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
            async with asyncio.timeout(START_SECONDS):
                while True:
                    assert child.returncode is None, log.read_text()[-3000:]
                    with contextlib.suppress(httpx.TransportError):
                        if (await client.get("/health")).status_code == 200:
                            break
                    await asyncio.sleep(0.5)
            memory |= {name for pid in descendants(child.pid) for name in shared_memory_of(pid)}

            async def ask(prompt: list[int], tokens: int) -> tuple[Completion, int]:
                body = {
                    "model": "policy", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0,
                    "logprobs": 2, "ignore_eos": True, "return_token_ids": True,
                }  # fmt: skip
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                said = msgspec.json.decode(answer.content)
                (choice,) = said["choices"]
                details = said["usage"].get("prompt_tokens_details") or {}
                made = Completion(tokens=choice["token_ids"], logprobs=choice["logprobs"]["token_logprobs"])
                return made, details.get("cached_tokens") or 0

            async def empty_own_cache() -> None:
                answer = await client.post("/reset_prefix_cache")
                assert answer.json()["success"]

            await show_an_update(place, url, ask, empty_own_cache, prompts, references, new_weights)
    finally:
        memory |= {name for pid in descendants(child.pid) for name in shared_memory_of(pid)}
        child.terminate()
        await child.end_tree(10.0)
        remove_shared_memory(memory)

"""Two lockstep groups of two ranks behind one endpoint: one rank is killed, one is frozen, and no stream changes a token.

The whole way: HTTP, dispatcher, runner, leader, ranks, gloo. Every token is compared with a plain run of the library.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
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

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]
TOKENS = 200
Library = Callable[[Path, list[list[int]]], list[Completion]]


@pytest.fixture(scope="module")
def host() -> RealHost:
    return RealHost()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Mixtral with the demo model's tokenizer."""
    import torch
    import transformers

    folder, known = tmp_path_factory.mktemp("mixtral"), build_demo_model()
    torch.manual_seed(3)
    config = transformers.MixtralConfig(
        vocab_size=8000, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(known / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [ids[:60] for ids in demo.documents(TextModel.load(build_demo_model()).encode)][:2]


@pytest.fixture(scope="module")
def reference(by_the_library: Library, model: Path, prompts: list[list[int]]) -> list[Completion]:
    return by_the_library(model, prompts)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    host: RealHost, run_home: Path, model: Path, reference: list[Completion]
) -> AsyncIterator[demo.Fleet]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(run_home))
        async with demo.running_fleet(
            host,
            str(model),
            free_port(),
            print,
            engine="transformers:2",
            data_parallel=2,
            options=["--step-seconds", "2"],  # the frozen rank is waited for that long
        ) as running:
            yield running


class Stream:
    """One request over HTTP, read in the background."""

    def __init__(self, fleet: demo.Fleet, prompt: list[int], tokens: int, engine: str | None = None) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.task = asyncio.create_task(self._read(fleet, prompt, tokens, engine))

    async def _read(self, fleet: demo.Fleet, prompt: list[int], tokens: int, engine: str | None) -> None:
        async for new, logprobs, _, _ in fleet.stream(prompt, tokens, engine):
            self.ids += new
            self.logprobs += logprobs

    async def until(self, count: int) -> None:
        async with asyncio.timeout(120):
            while len(self.ids) < count:
                assert not self.task.done(), "it ended before"
                await asyncio.sleep(0.005)

    async def whole(self, name: str, reference: Completion) -> None:
        async with asyncio.timeout(120):
            await self.task
        compared = compare(name, reference, Completion(tokens=self.ids, logprobs=self.logprobs))
        assert compared.equal, str(compared)


def ranks_of(runner: int, descendants: Callable[[int], list[int]]) -> dict[int, int]:
    """Rank → process, by what each was started with."""
    found = {}
    for pid in descendants(runner):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"interlock.engines.lockstep.rank" in words:
            config = json.loads(words[words.index(b"interlock.engines.lockstep.rank") + 1])
            found[config["engine"]["expert_group"]["rank"]] = pid
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_group_that_loses_a_rank_is_replaced_whole_and_no_stream_changes_a_token(
    descendants: Callable[[int], list[int]],
    fleet: demo.Fleet,
    host: RealHost,
    prompts: list[list[int]],
    reference: list[Completion],
    number: signal.Signals,
) -> None:
    tokens = min(TOKENS, len(reference[0].tokens))
    names = sorted(await fleet.engines())
    before = await fleet.engines()
    ranks = ranks_of(before[names[0]], descendants)
    assert sorted(ranks) == [0, 1]
    others = ranks_of(before[names[1]], descendants)
    hit = [Stream(fleet, prompts[0], tokens, names[0]) for _ in range(2)]
    undisturbed = Stream(fleet, prompts[1], tokens, names[1])
    for stream in (*hit, undisturbed):
        await stream.until(8)
    os.kill(ranks[1], number)
    for stream in hit:
        await stream.whole(f"rank 1 of its group {number.name}", reference[0])
    await undisturbed.whole("of the other group", reference[1])
    async with asyncio.timeout(120):
        while (now := await fleet.engines()).get(names[0]) in (
            None,
            before[names[0]],
        ) or not await demo.ready(fleet, 2):
            await host.clock.sleep_s(0.2)
    assert not [pid for pid in (before[names[0]], *ranks.values()) if Path(f"/proc/{pid}").exists()]
    assert ranks_of(now[names[1]], descendants) == others, "the other group went on as it was"
    again = Stream(fleet, prompts[0], tokens, names[0])
    await again.whole("of the group's next life", reference[0])


async def test_a_fleet_of_groups_is_paused_suspended_and_resumed_under_its_streams(
    descendants: Callable[[int], list[int]],
    fleet: demo.Fleet,
    prompts: list[list[int]],
    reference: list[Completion],
) -> None:
    tokens = min(TOKENS, len(reference[0].tokens))
    names = await fleet.engines()
    streams = [Stream(fleet, prompts[0], tokens, name) for name in names]
    for stream in streams:
        await stream.until(5)
    await fleet.ctl("pause", "--mode", "keep", "--owner", "test")
    before = {name: ranks_of(pid, descendants) for name, pid in names.items()}
    await fleet.ctl("suspend", "--owner", "test")
    assert [pid for ranks in before.values() for pid in ranks.values() if Path(f"/proc/{pid}").exists()] == []
    assert await fleet.engines() == names, "the runners stay: a suspended group is not gone"
    await fleet.ctl("resume", "--owner", "test")
    await fleet.ctl("unpause", "--owner", "test")
    for stream in streams:
        await stream.whole("over a suspension of its group", reference[0])

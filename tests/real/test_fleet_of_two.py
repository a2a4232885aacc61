"""The main job with real engines: one endpoint, two Transformers engines, one shared KV cache, deaths and pauses.

One start-up serves the whole file; the tests run in order, the last ones end the fleet. What vLLM has to do with it stands
in test_fleet_of_both_kinds.py.
"""

from __future__ import annotations

import asyncio
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

ENGINE = "transformers"
Library = Callable[[Path, list[list[int]]], list[Completion]]
pytestmark = [pytest.mark.fleet, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def host() -> RealHost:
    return RealHost()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return demo.documents(TextModel.load(build_demo_model()).encode)


@pytest.fixture(scope="module")
def reference(by_the_library: Library, prompts: list[list[int]]) -> list[Completion]:
    return by_the_library(build_demo_model(), prompts)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(host: RealHost, run_home: Path, reference: list[Completion]) -> AsyncIterator[demo.Fleet]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(run_home))
        async with demo.running_fleet(
            host, str(build_demo_model()), free_port(), print, engine=f"{ENGINE}:2"
        ) as running:
            yield running


async def wait_until(host: RealHost, condition: Callable[[], object], seconds: float) -> None:
    """Polls something outside our processes, with a deadline; raises `TimeoutError`."""
    async with asyncio.timeout(seconds):
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            await host.clock.sleep_s(0.1)


async def two_running(fleet: demo.Fleet) -> bool:
    return [member["state"] for member in (await fleet.status())["members"]].count("RUNNING") == 2


async def test_the_official_client_gets_completions_and_chats_streamed_and_whole(fleet: demo.Fleet) -> None:
    models = await fleet.client.models.list()
    assert [model.id for model in models.data] == ["demo"]
    whole = await fleet.client.completions.create(
        model="demo", prompt="def main():", max_tokens=8, temperature=0
    )
    streamed = await fleet.client.completions.create(
        model="demo", prompt="def main():", max_tokens=8, temperature=0, stream=True
    )
    assert (
        "".join([chunk.choices[0].text async for chunk in streamed if chunk.choices])
        == whole.choices[0].text
        != ""
    )
    messages = [{"role": "user", "content": "What is a generator?"}]
    chat = await fleet.client.chat.completions.create(
        model="demo", messages=messages, max_tokens=8, temperature=0
    )  # type: ignore[arg-type]
    chunks = await fleet.client.chat.completions.create(
        model="demo", messages=messages, max_tokens=8, temperature=0, stream=True  # type: ignore[arg-type]
    )  # fmt: skip
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])
    assert text == chat.choices[0].message.content != ""


async def reused(fleet: demo.Fleet, prompts: list[list[int]], engine: str, tries: int = 4) -> int:
    """Which of the prompts `engine` found in the shared cache. On a busy machine one look-up may come too late, by design."""
    for index, prompt in enumerate(prompts[:tries]):
        if (await fleet.answer(prompt, 1, engine)).cached_tokens >= len(prompt) - 64:
            return index
    raise AssertionError(f"{engine} computed all of {tries} prompts anew")


async def test_a_prefix_computed_by_one_engine_is_reused_by_the_other(
    fleet: demo.Fleet, prompts: list[list[int]], reference: list[Completion]
) -> None:
    first, second = sorted(await fleet.engines())
    found = 0
    for index, prompt in enumerate(prompts):
        cold = await fleet.answer(prompt, 24, first)
        other = await fleet.answer(prompt, 24, second)
        assert (cold.engine, other.engine) == (first, second)
        assert cold.cached_tokens < 64, "the documents have next to nothing in common"
        found += other.cached_tokens >= len(prompt) - 64  # the second engine never saw this prompt
        assert compare("cold", reference[index], cold.completion).equal
        assert compare("other engine", reference[index], other.completion).equal
    assert found, "the second engine computed every document anew"


async def test_the_comparison_can_fail(prompts: list[list[int]], reference: list[Completion]) -> None:
    assert not compare("another document", reference[0], reference[1]).equal


async def test_a_stream_stands_still_while_the_fleet_is_paused_and_goes_on_unchanged(
    fleet: demo.Fleet, host: RealHost, prompts: list[list[int]], reference: list[Completion]
) -> None:
    ids: list[int] = []
    logprobs: list[float] = []
    seen = asyncio.Event()

    async def read() -> None:
        async for new, new_logprobs, _, _ in fleet.stream(prompts[2], demo.STREAM_TOKENS):
            ids.extend(new)
            logprobs.extend(new_logprobs)
            if len(ids) >= 10:
                seen.set()

    reading = asyncio.ensure_future(read())
    async with asyncio.timeout(60):
        await seen.wait()
    await fleet.ctl("pause", "--mode", "keep", "--owner", "test")
    status = await fleet.status()
    assert status["target"] == "PAUSED"
    assert all(member["standing"] for member in status["members"])
    await host.clock.sleep_s(0.5)  # what was already on its way arrives
    frozen = len(ids)
    await host.clock.sleep_s(1.0)
    assert len(ids) == frozen < demo.STREAM_TOKENS
    await fleet.ctl("unpause", "--owner", "test")
    async with asyncio.timeout(120):
        await reading
    assert compare("paused", reference[2], Completion(tokens=ids, logprobs=logprobs)).equal
    assert len(ids) == demo.STREAM_TOKENS


def other_weights(folder: Path) -> Path:
    """The demo model with the same shapes and other weights in each layer: its KV and its tokens are others."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(build_demo_model(), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "v_proj" in name:
            tensors[name] = -tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


async def test_weights_change_under_a_stream_and_no_cached_block_crosses_versions(
    fleet: demo.Fleet,
    by_the_library: Library,
    prompts: list[list[int]],
    reference: list[Completion],
    tmp_path: Path,
) -> None:
    """pause, update, suspend, resume, unpause: the stream goes on, and says which weights made which of its tokens."""
    changed = other_weights(tmp_path / "v1")
    ids: list[int] = []
    spans: list[dict[str, object]] = []
    seen = asyncio.Event()

    async def read() -> None:
        stream = await fleet.client.completions.create(
            model="demo", prompt=prompts[1], max_tokens=demo.STREAM_TOKENS, temperature=0.0, stream=True,
            stream_options={"include_usage": True}, extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        async for chunk in stream:
            for choice in chunk.choices:
                ids.extend(getattr(choice, "token_ids", None) or [])
            if chunk.usage:
                spans.extend(chunk.usage.weights[0])  # type: ignore[attr-defined]
            if len(ids) >= 10:
                seen.set()

    reading = asyncio.ensure_future(read())
    async with asyncio.timeout(60):
        await seen.wait()
    await fleet.ctl("pause", "--owner", "trainer")
    await fleet.ctl("update", "v1", str(changed), "--owner", "trainer")
    await fleet.ctl("suspend", "--owner", "trainer")
    assert {member["state"] for member in (await fleet.status())["members"]} == {"SUSPENDED"}
    await fleet.ctl("resume", "--owner", "trainer")
    await fleet.ctl("unpause", "--owner", "trainer")
    async with asyncio.timeout(120):
        await reading
    old, new = spans
    assert (old["version"], new["version"]) == ("0", "v1")
    assert len(ids) == demo.STREAM_TOKENS == int(str(old["tokens"])) + int(str(new["tokens"]))
    made_before = int(str(old["tokens"]))
    assert ids[:made_before] == reference[1].tokens[:made_before]
    assert ids != reference[1].tokens[: len(ids)]

    plain = by_the_library(changed, prompts[:1])
    answer = await fleet.answer(prompts[0], 24)
    assert answer.cached_tokens == 0, "its KV of the old version lies in the store and in both engines"
    assert compare("updated", plain[0], answer.completion).equal
    assert not compare("updated", reference[0], answer.completion).equal

    await fleet.ctl("pause", "--owner", "trainer")
    await fleet.ctl("update", "v2", str(build_demo_model()), "--owner", "trainer")
    await fleet.ctl("unpause", "--owner", "trainer")
    assert compare("back", reference[0], (await fleet.answer(prompts[0], 24)).completion).equal


async def test_an_illegal_command_is_refused_with_what_to_do_instead(fleet: demo.Fleet) -> None:
    with pytest.raises(RuntimeError, match="RUNNING"):
        await fleet.ctl("unpause", "--owner", "test")


async def test_streams_go_on_when_the_store_is_killed_and_reuse_heals(
    descendants: Callable[[int], list[int]],
    fleet: demo.Fleet,
    host: RealHost,
    prompts: list[list[int]],
    reference: list[Completion],
) -> None:
    store = next(
        pid
        for pid in descendants(fleet.child.pid)
        if b"store" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    )
    os.kill(store, signal.SIGKILL)
    answer = await fleet.answer(prompts[3], 24)
    assert compare("store killed", reference[3], answer.completion).equal
    first, second = sorted(await fleet.engines())
    salt = 7

    async def healed() -> bool:
        nonlocal salt
        salt += 1
        prompt = [salt, *prompts[3]]
        await fleet.answer(prompt, 1, first)
        return (await fleet.answer(prompt, 1, second)).cached_tokens > demo.DOCUMENT_TOKENS // 2

    await wait_until(host, healed, 60.0)


async def test_a_request_goes_on_elsewhere_when_its_engine_is_killed_and_no_process_of_it_stays(
    descendants: Callable[[int], list[int]],
    fleet: demo.Fleet,
    host: RealHost,
    prompts: list[list[int]],
    reference: list[Completion],
) -> None:
    killed: list[str] = []
    tree: list[int] = []

    async def kill(engine: str) -> None:
        runner = (await fleet.engines())[engine]
        tree.extend([runner, *descendants(runner)])
        os.kill(runner, signal.SIGKILL)
        killed.append(engine)
        await wait_until(host, lambda: not any(Path(f"/proc/{pid}").exists() for pid in tree), 5.0)

    before = {member["name"]: member["incarnation"] for member in (await fleet.status())["members"]}
    completion, _ = await demo.show_disturbed(fleet, prompts[1], kill, print)
    assert killed
    assert len(completion.tokens) == demo.STREAM_TOKENS
    assert compare("killed", reference[1], completion).equal
    await wait_until(host, lambda: two_running(fleet), 240.0)
    after = {member["name"]: member["incarnation"] for member in (await fleet.status())["members"]}
    assert after[killed[0]] > before[killed[0]]
    index = await reused(fleet, prompts, killed[0])  # what was saved before the engine's new life began
    again = await fleet.answer(prompts[index], 24, killed[0])
    assert compare("restarted", reference[index], again.completion).equal


async def test_nothing_outlives_a_killed_supervisor(
    descendants: Callable[[int], list[int]], fleet: demo.Fleet, host: RealHost, run_home: Path
) -> None:
    tree = descendants(fleet.child.pid)
    assert len(tree) >= 5, "coordinator, store, front, two engines"
    os.kill(fleet.child.pid, signal.SIGKILL)
    await wait_until(host, lambda: not any(Path(f"/proc/{pid}").exists() for pid in tree), 15.0)
    assert [path for path in run_home.rglob("*") if not path.is_dir()] == []

"""A real fleet of Transformers engines is suspended, every process SIGKILLed, started again and resumed; and stopped and started.

Streams are taken up over HTTP at the cursor where the last front left them; tokens are those of an undisturbed run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from interlock.engines.demo_model import build_demo_model
from interlock.fleet.client import FleetClient
from interlock.fleet.launchers.rundir import coordinator_address
from interlock.host.processes import list_processes
from interlock.host.real import RealHost
from interlock.host.sockets import free_port
from interlock.text.model import TextModel

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]
TOKENS = 240
BEFORE = 12
MIB = 1 << 20


class Serve:
    """`interlock serve` with a state directory and a disk, started as often as the test says."""

    def __init__(self, host: RealHost, home: Path) -> None:
        self.host, self.home, self.port = host, home, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.web = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=60.0)
        self.lives = 0

    async def start(self) -> None:
        self.lives += 1
        options = ["--engine", "transformers:1", "--port", str(self.port), "--served-model-name", "demo"]
        options += ["--state-dir", str(self.home / "state"), "--disk", str(self.home / "disk")]
        options += ["--disk-gib", "0.5", "--store-gib", "0.25", "--snapshots-gib", "0"]
        with self.log.open("wb") as log:
            argv = [sys.executable, "-m", "interlock", "serve", str(build_demo_model()), *options]
            self.process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)
        async with asyncio.timeout(120):
            while "ready in" not in self.said:
                assert self.process.poll() is None, self.said
                await asyncio.sleep(0.1)

    @property
    def log(self) -> Path:
        return self.home / f"serve-{self.lives}.log"

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    async def ctl(self, *words: str) -> Any:
        argv = [sys.executable, "-m", "interlock", "ctl", *words, "--json", "--port", str(self.port)]
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr + done.stdout
        return msgspec.json.decode(done.stdout)

    async def kill_everything(self, below: Callable[[int], list[int]]) -> None:
        """The supervisor first is stopped, so that it starts nothing again, then all of them are killed."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        tree = below(self.process.pid)
        assert len(tree) >= 4, "coordinator, store, engine and front run"
        for pid in [*tree, self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        async with asyncio.timeout(20):
            while any(entry.pid in tree and entry.state != "Z" for entry in list_processes()):
                await asyncio.sleep(0.05)

    async def end(self) -> None:
        await self.web.aclose()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            await asyncio.to_thread(self.process.wait, 30)

    @contextlib.asynccontextmanager
    async def stream(self, method: str, path: str, **more: Any) -> AsyncIterator[AsyncIterator[Any]]:
        """Chunks of a stream of ours."""
        async with self.web.stream(method, path, **more) as answer:
            assert answer.status_code == 200, await answer.aread()

            async def chunks() -> AsyncIterator[Any]:
                async for line in answer.aiter_lines():
                    if line and line != "data: [DONE]":
                        yield msgspec.json.decode(line.removeprefix("data: "))

            yield chunks()


def asked(prompt: list[int], **more: Any) -> dict[str, Any]:
    return {
        "model": "demo", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    text = TextModel.load(build_demo_model())
    return text.encode(
        "def main(arguments):\n    '''Reads a file, line by line, and counts the words of it.'''\n" * 6
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(run_home: Path) -> AsyncIterator[Serve]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="il-state-") as home:
        patch.setenv("XDG_RUNTIME_DIR", str(run_home))
        patch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")))
        serve = Serve(RealHost(), Path(home))
        await serve.start()
        try:
            yield serve
        finally:
            await serve.end()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(fleet: Serve, prompt: list[int]) -> dict[str, list[int]]:
    """Greedy, and sampled with a seed and a penalty: what only the engine's own state carries on."""
    answers = {}
    for name, more in KINDS.items():
        answer = await fleet.web.post("/v1/completions", json=asked(prompt, **more))
        answers[name] = answer.json()["choices"][0]["token_ids"]
        assert len(answers[name]) == TOKENS
    return answers


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "seed": 7, "presence_penalty": 0.3},
}


async def begin(fleet: Serve, prompt: list[int], kind: str, stop: asyncio.Event) -> tuple[str, list[int]]:
    """Reads a stream until the connection breaks, and sets nothing right: its name, and the tokens that came."""
    name, ids = "", []
    with contextlib.suppress(httpx.HTTPError):
        body = asked(prompt, stream=True, **KINDS[kind])
        async with fleet.stream("POST", "/v1/completions", json=body) as chunks:
            async for chunk in chunks:
                name = chunk["id"]
                ids += [token for choice in chunk["choices"] for token in choice.get("token_ids") or []]
                if len(ids) >= BEFORE:
                    stop.set()
    return name, ids


async def test_a_fleet_suspended_killed_whole_and_started_again_goes_on_token_for_token(
    fleet: Serve,
    prompt: list[int],
    undisturbed: dict[str, list[int]],
    descendants: Callable[[int], list[int]],
) -> None:
    under_way = {kind: asyncio.Event() for kind in KINDS}
    reading = {k: asyncio.create_task(begin(fleet, prompt, k, under_way[k])) for k in KINDS}
    async with asyncio.timeout(60):
        await asyncio.gather(*(event.wait() for event in under_way.values()))
    coordinator = FleetClient(fleet.host, coordinator_address(fleet.port))
    await coordinator.pause(owner="t")  # not by ctl, which takes as long to start as the answer to end
    suspended = await fleet.ctl("suspend", "--owner", "t")
    memory = suspended["members"][0]["memory"]
    model_bytes = sum(file.stat().st_size for file in build_demo_model().glob("*.safetensors"))
    assert memory["given_back_bytes"] > model_bytes / 2, "its weights at least left memory"
    assert memory["resident_bytes"] > 0
    await fleet.kill_everything(descendants)
    left = {kind: await task for kind, task in reading.items()}
    for kind, (name, ids) in left.items():
        assert name
        assert BEFORE <= len(ids) < TOKENS, "it was in the middle"
        assert ids == undisturbed[kind][: len(ids)]

    await fleet.start()
    status = await fleet.ctl("status")
    assert status["target"] == "SUSPENDED"
    assert [member["state"] for member in status["members"]] == ["SUSPENDED"]
    assert "the fleet is SUSPENDED, as it was left" in fleet.said

    async def take_up(name: str, after: int) -> list[int]:
        ids: list[int] = []
        path = f"/interlock/streams/{name}?after={after}"
        async with fleet.stream("GET", path) as chunks:
            async for chunk in chunks:
                ids += [token for choice in chunk["choices"] for token in choice.get("token_ids") or []]
        return ids

    rest = {k: asyncio.create_task(take_up(name, len(ids))) for k, (name, ids) in left.items()}
    await fleet.ctl("resume", "--owner", "t")
    await fleet.ctl("unpause", "--owner", "t")
    for kind, (_, ids) in left.items():
        assert ids + await rest[kind] == undisturbed[kind], kind


async def test_a_killed_front_is_started_again_and_its_stream_taken_up(
    fleet: Serve, prompt: list[int], undisturbed: dict[str, list[int]]
) -> None:
    under_way = asyncio.Event()
    reading = asyncio.create_task(begin(fleet, prompt, "sampled", under_way))
    async with asyncio.timeout(60):
        await under_way.wait()
    assert fleet.process is not None
    (front,) = [
        entry.pid
        for entry in list_processes()
        if entry.parent == fleet.process.pid
        and b"\0front\0" in Path(f"/proc/{entry.pid}/cmdline").read_bytes()
    ]
    os.kill(front, signal.SIGKILL)
    name, ids = await reading
    assert BEFORE <= len(ids) < TOKENS
    answer = None
    async with asyncio.timeout(60):
        while answer is None:
            with contextlib.suppress(httpx.HTTPError):
                answer = await fleet.web.get(f"/interlock/streams/{name}?stream=false")
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["token_ids"] == undisturbed["sampled"]
    assert ids == undisturbed["sampled"][: len(ids)]


async def test_a_fleet_stopped_to_zero_starts_again_and_says_the_same(
    fleet: Serve, prompt: list[int], undisturbed: dict[str, list[int]]
) -> None:
    await fleet.ctl("stop", "--owner", "t")
    refused = await fleet.web.post("/v1/completions", json=asked(prompt))
    assert refused.status_code == 503
    assert "stopped" in refused.json()["error"]["message"]
    started = await fleet.ctl("start", "--owner", "t", "--timeout", "120")
    assert [member["outcome"] for member in started["members"]] == ["standing"]
    answer = await fleet.web.post("/v1/completions", json=asked(prompt, temperature=0.0))
    assert answer.json()["choices"][0]["token_ids"] == undisturbed["greedy"]

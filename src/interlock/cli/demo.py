"""`interlock demo`: what a fleet does that one engine does not, shown on this machine and checked token by token.

The road: a plain run of vLLM (or of the Transformers library) makes the reference; a fleet of two engines starts; long documents are asked about cold, on the
same engine, and on the *other* engine through the shared cache; a stream is frozen by pause and goes on; an engine is
killed in mid-stream and the stream goes on. Every token must equal the plain run's (ties within float error apart).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from interlock.cli.arguments import port
from interlock.cli.errors import Failure, Usage
from interlock.host.base import Child
from interlock.host.real import RealHost
from interlock.host.sweep import descendants
from interlock.testing.equality import Comparison, Completion, compare

DOCUMENT_MODULES = ["argparse", "subprocess", "datetime", "logging"]
"""Long prefixes that are on any machine: what these standard modules say of themselves."""
DOCUMENT_TOKENS = 1600
ANSWER_TOKENS = 24
STREAM_TOKENS = 160
FREEZE_AFTER_TOKENS = 20
FREEZE_SECONDS = 1.5
READY_SECONDS_MAX = 600.0
STATUS_TOLD = 128 + signal.SIGTERM
PLAIN = {"vllm": "a plain vLLM engine", "transformers": "the Transformers library's own generate"}


class Answer(msgspec.Struct):
    """One streamed completion as the client saw it."""

    completion: Completion
    engine: str
    cached_tokens: int
    first_token_s: float


class Row(msgspec.Struct):
    """One line of the table: how fast the first token came, and how much of the prompt was not computed again."""

    name: str
    first_token_ms: float
    cached_tokens: int
    prompt_tokens: int


def documents(encode: Callable[[str], list[int]]) -> list[list[int]]:
    """One prompt per module: its own documentation strings, cut to DOCUMENT_TOKENS tokens, then a question."""
    import importlib
    import inspect

    prompts = []
    for name in DOCUMENT_MODULES:
        module = importlib.import_module(name)
        members = [
            module,
            *(member for _, member in sorted(inspect.getmembers(module)) if inspect.getdoc(member)),
        ]
        text = "\n\n".join(inspect.getdoc(member) or "" for member in members)
        prompts.append(encode(text)[:DOCUMENT_TOKENS] + encode(f"\n\nIn short, the module {name} is for"))
    return prompts


class Fleet:
    """A fleet of ours in child processes, and the client to talk to it."""

    def __init__(self, host: RealHost, child: Child, port: int, interlock: list[str]) -> None:
        from openai import AsyncOpenAI

        self.host, self.child, self.port, self.interlock = host, child, port, interlock
        self.client = AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120.0
        )

    async def status(self) -> dict[str, Any]:
        """What `interlock ctl status --json` prints: any user can ask for the same."""
        return msgspec.json.decode(await self.ctl("status", "--json"))  # type: ignore[no-any-return]

    async def ctl(self, *words: str) -> str:
        """What `interlock ctl …` printed. Raises `RuntimeError` with its errors."""
        return await self.host.in_thread(self._ctl, *words)

    def _ctl(self, *words: str) -> str:
        from interlock.host.blocking import run_command

        return run_command([*self.interlock, "ctl", *words, "--port", str(self.port)], timeout_s=60.0)

    async def engines(self) -> dict[str, int]:
        """Name → process id of each engine's runner."""
        return {member["name"]: member["facts"]["pid"] for member in (await self.status())["members"]}

    async def stream(
        self, prompt: list[int], tokens: int, engine: str | None = None
    ) -> AsyncIterator[tuple[list[int], list[float], str, int]]:
        """Yields (token ids, logprobs, engine, cached tokens) as they come. Greedy, so that tokens can be compared."""
        extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
        headers = {"x-interlock-engine": engine} if engine else {}
        stream = await self.client.completions.create(
            model="demo", prompt=prompt, max_tokens=tokens, temperature=0.0, logprobs=2, stream=True,
            stream_options={"include_usage": True}, extra_body=extra, extra_headers=headers,
        )  # fmt: skip
        served_by = stream.response.headers.get("x-interlock-engine", "?")
        async for chunk in stream:
            cached = (
                chunk.usage.prompt_tokens_details.cached_tokens
                if chunk.usage and chunk.usage.prompt_tokens_details
                else 0
            )
            for choice in chunk.choices:
                logprobs = choice.logprobs.token_logprobs if choice.logprobs else []
                yield (
                    list(getattr(choice, "token_ids", None) or []),
                    [x or 0.0 for x in logprobs or []],
                    served_by,
                    0,
                )
            if chunk.usage:
                yield [], [], served_by, cached or 0

    async def answer(self, prompt: list[int], tokens: int, engine: str | None = None) -> Answer:
        """One whole answer of `tokens` tokens, by the named engine or whichever the router picks."""
        started = self.host.clock.monotonic_s()
        first, ids, logprobs, served_by, cached = 0.0, [], [], "", 0
        async for new, new_logprobs, served_by, cached in self.stream(prompt, tokens, engine):  # noqa: B007
            first = first or (self.host.clock.monotonic_s() - started if new else 0.0)
            ids += new
            logprobs += new_logprobs
        return Answer(Completion(tokens=ids, logprobs=logprobs), served_by, cached, first)


async def show_reuse(
    fleet: Fleet, prompts: list[list[int]]
) -> tuple[list[Row], list[tuple[str, int, Completion]]]:
    """The table's rows, and each answer as (its name, its prompt's number, its tokens)."""
    first, second = sorted(await fleet.engines())[:2]
    rows, made = [], []
    for name, engine in (("cold", first), ("same engine", first), ("other engine, shared cache", second)):
        answers = [await fleet.answer(prompt, ANSWER_TOKENS, engine) for prompt in prompts]
        rows.append(
            Row(
                name,
                median(answer.first_token_s for answer in answers) * 1e3,
                round(median(answer.cached_tokens for answer in answers)),
                round(median(len(prompt) for prompt in prompts)),
            )
        )
        made += [(f"{name}, {DOCUMENT_MODULES[i]}", i, answer.completion) for i, answer in enumerate(answers)]
    return rows, made


async def show_disturbed(
    fleet: Fleet, prompt: list[int], disturb: Callable[[str], Any], say: Callable[[str], None]
) -> tuple[Completion, float]:
    """Streams, disturbs the fleet after some tokens, and returns all tokens with the longest wait between two."""
    ids: list[int] = []
    logprobs: list[float] = []
    clock = fleet.host.clock
    last, longest, disturbing = clock.monotonic_s(), 0.0, None
    async for new, new_logprobs, engine, _ in fleet.stream(prompt, STREAM_TOKENS):
        if new and ids:
            longest = max(longest, clock.monotonic_s() - last)
        last = clock.monotonic_s()
        ids += new
        logprobs += new_logprobs
        if disturbing is None and len(ids) >= FREEZE_AFTER_TOKENS:
            say(f"  {len(ids)} tokens from {engine} …")
            disturbing = asyncio.ensure_future(disturb(engine))
    if disturbing is not None:
        await disturbing
    return Completion(tokens=ids, logprobs=logprobs), longest


def print_table(rows: list[Row], say: Callable[[str], None]) -> None:
    """The first row is what the others are compared with."""
    cold = rows[0].first_token_ms
    say(f"\n  {'':<28}{'time to first token':>20}{'':>8}{'cached tokens':>20}")
    for row in rows:
        say(
            f"  {row.name:<28}{row.first_token_ms:>17.0f} ms{cold / row.first_token_ms:>7.1f}×"
            f"{row.cached_tokens:>11} of {row.prompt_tokens:>5}"
        )
    say("")


@contextlib.asynccontextmanager
async def running_fleet(
    host: RealHost,
    model: str,
    port: int,
    say: Callable[[str], None],
    *,
    engine: str = "vllm:2",
    tp: int = 1,
    data_parallel: int = 1,
    options: Sequence[str] = (),
) -> AsyncIterator[Fleet]:
    """`interlock serve` in a child process, ready; ended, with all its processes, on the way out. `engine` names numbers,
    `options` are more words for it."""
    interlock = [sys.executable, "-m", "interlock"]
    engines = sum(int(part.partition(":")[2]) for part in engine.split(","))
    shape = ["--engine", engine, "--tp", str(tp), "--data-parallel", str(data_parallel)]
    argv = [*interlock, "serve", model, *shape, "--port", str(port), "--served-model-name", "demo", *options]
    child = await host.spawn(argv, env=dict(os.environ), log=None)
    fleet = Fleet(host, child, port, interlock)
    try:
        async with asyncio.timeout(READY_SECONDS_MAX):
            while not await ready(fleet, engines):
                if child.returncode is not None:
                    raise Failure(
                        f"the fleet did not start (exit status {child.returncode}); the lines above say why"
                    )
                await host.clock.sleep_s(0.2)
        yield fleet
    finally:
        await fleet.client.close()
        child.terminate()
        try:
            async with asyncio.timeout(30.0):
                await child.wait()
        except TimeoutError:
            say("the fleet did not leave by itself; ending it")
            await child.end_tree(10.0)


async def ready(fleet: Fleet, engines: int) -> bool:
    """The endpoint answers and all engines are RUNNING, by its own word. Asked of it alone: `ctl` is a process each time, and
    engines that start need the cores."""
    import httpx

    try:
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://127.0.0.1:{fleet.port}/health", timeout=5.0)
        return answer.status_code == 200 and answer.json()["members"].get("RUNNING", 0) >= engines
    except (httpx.HTTPError, OSError, ValueError):
        return False


async def pause_and_unpause(fleet: Fleet, say: Callable[[str], None]) -> None:
    """Freezes the fleet for FREEZE_SECONDS."""
    await fleet.ctl("pause", "--mode", "keep", "--owner", "demo")
    say("  paused: every engine stands between two steps")
    await fleet.host.clock.sleep_s(FREEZE_SECONDS)
    await fleet.ctl("unpause", "--owner", "demo")
    say("  unpaused")


async def kill_engine(fleet: Fleet, engine: str, say: Callable[[str], None]) -> None:
    """SIGKILL to the runner of `engine`; its ranks end with it."""
    pid = (await fleet.engines())[engine]
    os.kill(pid, signal.SIGKILL)
    say(f"  SIGKILL to {engine} (process {pid})")


async def show(
    fleet: Fleet, prompts: list[list[int]], reference: list[Completion], say: Callable[[str], None]
) -> bool:
    """The whole show on a fleet that is ready. True when every token is `reference`'s and the cache was used."""
    started = fleet.host.clock.monotonic_s()
    for engine in sorted(await fleet.engines()):  # the first request of an engine pays for its warm-up
        await fleet.answer(prompts[0][-40:], 8, engine)
    say("1. The same documents, asked about three times")
    rows, made = await show_reuse(fleet, prompts)
    print_table(rows, say)
    say("2. A stream, frozen by pause and continued by unpause")
    completion, longest = await show_disturbed(
        fleet, prompts[0], lambda _: pause_and_unpause(fleet, say), say
    )
    made.append(("paused in mid-stream", 0, completion))
    say(f"  {len(completion.tokens)} tokens in all; the longest silence between two: {longest:.2f} s\n")
    say("3. An engine killed in mid-stream")
    completion, longest = await show_disturbed(
        fleet, prompts[1], lambda engine: kill_engine(fleet, engine, say), say
    )
    made.append(("engine killed in mid-stream", 1, completion))
    say(f"  {len(completion.tokens)} tokens in all; the longest silence between two: {longest:.2f} s\n")
    say("4. Are these the tokens of a plain run?")
    comparisons = [compare(name, reference[index], completion) for name, index, completion in made]
    for comparison in comparisons:
        say(f"  {comparison}")
    say(f"\n  shown in {fleet.host.clock.monotonic_s() - started:.0f} s after the fleet was ready")
    return verdict(comparisons, rows, say)


def verdict(comparisons: list[Comparison], rows: list[Row], say: Callable[[str], None]) -> bool:
    """Says it and returns it."""
    equal = all(comparison.equal for comparison in comparisons)
    reused = all(row.cached_tokens > row.prompt_tokens // 2 for row in rows[1:])
    say("  all equal" if equal else "  NOT EQUAL")
    if not reused:
        say("  NOT REUSED: a repeated document was computed again")
    return equal and reused


def add_parser(commands: Any) -> None:
    """Adds the command; `run` is what its arguments are given to."""
    parser = commands.add_parser(
        "demo", help="show prefix reuse, pause and an engine's death on a fleet of two, and check the tokens"
    )
    parser.add_argument(
        "model", nargs="?", help="a local checkpoint directory (default: the demo model, built on first use)"
    )
    parser.add_argument(
        "--port", type=port, default=0, help="port of the fleet that the demo starts (default: a free one)"
    )
    parser.add_argument(
        "--engine",
        choices=list(PLAIN),
        default="vllm",
        help="what the fleet's two engines are (default vllm; transformers starts in seconds)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Raises `Usage` for what is no checkpoint, `Failure` when the reference or the fleet failed. Nothing outlives it, also when
    it is interrupted or told to end (SIGTERM)."""
    from interlock.text.errors import ModelFilesError

    try:
        return asyncio.run(_until_told(arguments))
    except asyncio.CancelledError:
        return STATUS_TOLD
    except ModelFilesError as error:
        raise Usage(str(error)) from error
    except (RuntimeError, OSError) as error:  # a child's last words; nobody answered in time
        raise Failure(f"the demo ended early: {error}") from error
    finally:
        for pid in descendants(
            os.getpid()
        ):  # the reference, where it was interrupted: nobody waits for it any more
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def _until_told(arguments: argparse.Namespace) -> int:
    task = asyncio.ensure_future(demo(arguments.model, arguments.port, arguments.engine))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


async def demo(model: str | None, port: int, engine: str) -> int:
    """Reference, fleet, show. Returns the exit status: 0 when everything held. `port` 0: a free one."""
    from interlock.engines.demo_model import build_demo_model
    from interlock.host.sockets import free_port
    from interlock.text.model import TextModel

    host = RealHost()

    def say(line: str) -> None:
        print(line, flush=True)

    directory = Path(model) if model else build_demo_model()
    text = TextModel.load(directory)
    prompts = documents(text.encode)
    say(f"0. The reference: {PLAIN[engine]}, no Interlock")
    reference = await plain_run(host, directory, prompts, engine)
    async with running_fleet(host, str(directory), port or free_port(), say, engine=f"{engine}:2") as fleet:
        return 0 if await show(fleet, prompts, reference, say) else 1


async def plain_run(
    host: RealHost, model: Path, prompts: list[list[int]], engine: str = "vllm"
) -> list[Completion]:
    """The same prompts without anything of ours, in a process of its own that is gone afterwards."""
    from interlock.host.blocking import run_command

    question = msgspec.json.encode(
        {"model": str(model), "prompts": prompts, "tokens": STREAM_TOKENS, "engine": engine}
    )
    argv = [sys.executable, "-m", "interlock.engines.plain"]
    answer = await host.in_thread(lambda: run_command(argv, timeout_s=READY_SECONDS_MAX, stdin=question))
    return msgspec.json.decode(answer.splitlines()[-1], type=list[Completion])

"""A front over a fleet that does what a script says; everything else is real: the app, uvicorn, sockets, the tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from interlock.core.errors import ChannelFault, InterlockError
from interlock.core.identity import Epoch
from interlock.core.targets import State
from interlock.fleet.generation import Generation
from interlock.fleet.ledger import GenerationRequest
from interlock.host.ports import bind_port, port_of
from interlock.host.real import RealHost
from interlock.testing.text_files import END_ID, write_text_files
from interlock.text.model import TextModel
from interlock.web.app import make_app
from interlock.web.front import Access, Front
from interlock.web.main import FrontServer
from interlock.wire.engine_messages import TokenLogprobs
from interlock.wire.fleet_messages import (
    CommandProgress,
    CommandReport,
    EngineFacts,
    Events,
    Happened,
    Hold,
    Member,
    Membership,
)

MODEL = "tiny"
MODEL_TOKENS_MAX = 256


class Step(msgspec.Struct):
    """What an engine does next in a script."""

    tokens: list[int] = []
    finish: str = ""
    error: InterlockError | None = None
    detail: str = ""
    hold: asyncio.Event | None = None
    """Wait for it first."""


Script = Callable[[GenerationRequest], list[Step]]


def membership(target: str = State.RUNNING, state: str = State.RUNNING, members: int = 1) -> Membership:
    facts = msgspec.convert(
        {"address": "unix:/e", "model": "m", "max_model_tokens": MODEL_TOKENS_MAX, "engine": "scripted"},
        EngineFacts,
    )
    made = [Member(f"engine-{n}", 7, facts, state, True, "v1") for n in range(members)]
    return Membership(Epoch(3, 4), target, "v1", [], made)


class ScriptedFleet:
    """`interlock.web.front.Fleet`: generations are the real class, pushed to as a dispatcher does."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.membership: Membership | None = membership()
        self.coordinator_connected = True
        self.ready = True
        self.counters: dict[str, int] = {}
        self.refuse: InterlockError | None = None
        self.requests: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self.running: dict[str, asyncio.Task[None]] = {}
        self.generations: dict[str, Generation] = {}
        self.kept: dict[str, GenerationRequest] = {}
        """What an earlier life of this front had: it goes on by the script when it is taken up, from its first token."""
        self.recovered = True
        self.taken_up: list[str] = []

    def known(self, request: str) -> GenerationRequest | None:
        return self.kept.get(request)

    def take_up(self, request: str) -> Generation:
        self.taken_up.append(request)
        generation = Generation(self.kept[request], self._abort)
        self.generations[request] = generation
        self.running[request] = asyncio.create_task(self._run(self.kept[request], generation))
        return generation

    def in_flight(self) -> dict[str, int]:
        return {"engine-0": len(self.running), "": 0}

    def submit(self, request: GenerationRequest) -> Generation:
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        generation = Generation(request, self._abort)
        self.generations[request.id] = generation
        self.running[request.id] = asyncio.create_task(self._run(request, generation))
        return generation

    async def _run(self, request: GenerationRequest, generation: Generation) -> None:
        generation.engine = request.engine or "engine-0"
        for step in self.script(request):
            if step.hold is not None:
                await step.hold.wait()
            if step.error is not None:
                generation.fail(step.error)
            elif not generation.push(
                step.tokens,
                self._logprobs(request, step.tokens),
                step.finish,
                len(request.prompt) - 1,
                step.detail,
            ):
                raise AssertionError("the reader is too far behind for a test")
            await asyncio.sleep(0)
        del self.running[request.id]

    @staticmethod
    def _logprobs(request: GenerationRequest, tokens: list[int]) -> list[TokenLogprobs]:
        count = request.sampling.logprobs
        if count is None:
            return []
        seed = request.sampling.seed or 0
        return [
            TokenLogprobs(-0.5 - seed, 1, [(token + n, -0.5 - n) for n in range(count)]) for token in tokens
        ]

    async def _abort(self, request: str) -> None:
        task = self.running.pop(request, None)
        if task is not None:
            self.aborted.append(request)
            task.cancel()
            self.generations[request].close()


class ScriptedCoordinator:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None

    async def status(self, timeout_s: float = 5.0) -> Membership:
        self._called("status")
        return msgspec.structs.replace(membership(), holds=[Hold("trainer", "keep")])

    async def pause(self, mode: str = "keep", **more: Any) -> CommandProgress:
        return self._called("pause", mode=mode, **more)

    async def unpause(self, **more: Any) -> CommandProgress:
        return self._called("unpause", **more)

    async def update_weights(self, version: str, weights: str, **more: Any) -> CommandProgress:
        return self._called("update", version=version, weights=weights, **more)

    async def suspend(self, **more: Any) -> CommandProgress:
        return self._called("suspend", **more)

    async def resume(self, **more: Any) -> CommandProgress:
        return self._called("resume", **more)

    async def start(self, **more: Any) -> CommandProgress:
        return self._called("start", **more)

    async def drain(self, **more: Any) -> CommandProgress:
        return self._called("drain", **more)

    async def stop(self, **more: Any) -> CommandProgress:
        return self._called("stop", **more)

    async def command(self, command_id: str, **more: Any) -> CommandReport:
        progress = self._called("command", command_id=command_id, **more)
        return CommandReport("t", command_id, "PAUSE", "PAUSED", 0.0, progress)

    async def events(self, after: int = 0, ring: str = "", **more: Any) -> Events:
        self._called("events", after=after, ring=ring, **more)
        return Events("r", [Happened(after + 1, 0, "target", {"state": "PAUSED"})], after + 1)

    async def metrics(self, timeout_s: float = 5.0) -> str:
        self._called("metrics")
        return "interlock_coordinator_members 1\n"

    def _called(self, verb: str, **more: Any) -> CommandProgress:
        self.calls.append((verb, more))
        if self.error is not None:
            raise self.error
        return CommandProgress(Epoch(3, 5), [], True, True, "PAUSED")


class Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]  # type: ignore[no-any-return]


class World(msgspec.Struct):
    """One front, its app, and what it stands on."""

    front: Front
    fleet: ScriptedFleet
    coordinator: ScriptedCoordinator
    text: TextModel
    app: Any

    async def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Straight into the application: no socket, so that thousands of bodies can be tried."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        path, _, query = path.partition("?")
        given = [{"type": "http.request", "body": data, "more_body": False}]
        sent: list[dict[str, Any]] = []
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if given:
                return given.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http",
            "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
            "server": ("test", 80), "client": ("test", 1),
        }  # fmt: skip
        async with asyncio.timeout(20):
            await self.app(scope, receive, send)
        start = sent[0]
        assert start["type"] == "http.response.start"
        assert not sent[-1].get("more_body", False), "the answer ends"
        return Answer(
            start["status"],
            {key.decode().lower(): value.decode() for key, value in start["headers"]},
            b"".join(message.get("body", b"") for message in sent[1:]),
        )

    async def complete(self, **body: Any) -> Answer:
        return await self.ask("POST", "/v1/completions", {"model": MODEL, "prompt": "hello", **body})

    async def chat(self, **body: Any) -> Answer:
        messages = [{"role": "user", "content": "hello"}]
        return await self.ask("POST", "/v1/chat/completions", {"model": MODEL, "messages": messages, **body})


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.load(write_text_files(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def host() -> RealHost:
    return RealHost()


@pytest.fixture
def make_world(host: RealHost, text: TextModel) -> Callable[..., World]:
    def make(script: Script | None = None, access: Access | None = None) -> World:
        def says_hello(request: GenerationRequest) -> list[Step]:
            ids = text.encode("Hello, Zürich 🚂!", add_special=False)[: request.sampling.max_tokens]
            full = len(ids) == request.sampling.max_tokens
            return [Step([i]) for i in ids[:-1]] + [
                Step(ids[-1:], "length") if full else Step([ids[-1], END_ID], "stop")
            ]

        fleet, coordinator = ScriptedFleet(script or says_hello), ScriptedCoordinator()
        front = Front(host, fleet, coordinator, text, served_model_name=MODEL, access=access or Access())
        return World(front, fleet, coordinator, text, make_app(front))

    return make


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


@contextlib.asynccontextmanager
async def serve(world: World) -> AsyncIterator[str]:
    """The front on a real socket; yields its base URL."""
    sock = bind_port("127.0.0.1", 0)
    server = FrontServer(world.front)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        async with asyncio.timeout(10):
            await server.listening.wait()
        yield f"http://127.0.0.1:{port_of(sock)}"
    finally:
        server.should_exit = True
        async with asyncio.timeout(10):
            await serving
        sock.close()


@pytest.fixture
def serving() -> Callable[[World], contextlib.AbstractAsyncContextManager[str]]:
    return serve


@pytest.fixture
def step() -> type[Step]:
    return Step


@pytest.fixture
def fault() -> type[ChannelFault]:
    return ChannelFault


@pytest.fixture
def fleet_view() -> Callable[..., Membership]:
    return membership

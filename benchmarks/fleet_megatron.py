"""Megatron-LM's side of `fleet.py`, under an interpreter that has megatron-core: its own coordinator process, client, engine loop and HTTP server.

    PYTHON benchmarks/fleet_megatron.py ENGINES

The questions are those of `fleet_ours.py`, and {"do": "pause", …, "interval": n} sets the engine loop's `ep_consensus_interval`.
Requests go from its `InferenceClient` over its coordinator to stand-ins of engines, which speak its protocol and answer what they
find at once, without the 20 ms that its loop sleeps when idle. Pauses are of its real engine loop, one process a rank, an expert-parallel
group of all; only the model's step is a stand-in (a sleep), for that needs a GPU. Nothing of Megatron's is changed or copied here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace
from typing import Any

from fleet_common import STEP_SECONDS, drive, post, prompts
from harness import NotRun, answer

LOCAL = "127.0.0.1"
REQUESTS_MAX = 4096
START_SECONDS = 120.0
HTTP_VOCABULARY = 250
TOKEN = 7
SUBMIT_REQUEST, ENGINE_REPLY = 20, 21
"""Of its `headers`, so that the stand-ins need not import it."""


class Tokenizer:
    """Text is not what is measured."""

    eod = 0

    def detokenize(self, tokens: list[int]) -> str:
        return "t" * len(tokens)


# --- engines that answer at once -------------------------------------------------------------------------------------------


def answering_engine(address: str, number: int, finished: dict[str, Any]) -> None:
    """Registers as an engine does; each batch of requests that has arrived is answered by one reply, as after one step."""
    import msgpack
    import zmq

    sock = zmq.Context.instance().socket(zmq.DEALER)
    sock.setsockopt(zmq.IDENTITY, f"mp-coord-{number}".encode())
    sock.connect(address)
    sock.send(b"")
    while True:
        messages = [sock.recv()]
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(sock.recv(flags=zmq.NOBLOCK))
        replies = []
        for message in messages:
            said = msgpack.unpackb(message, raw=False)
            if said[0] == SUBMIT_REQUEST:
                prompt = said[2] if said[3]["return_prompt_tokens"] else []
                replies.append({**finished, "request_id": said[1], "prompt_tokens": prompt})
        if replies:
            sock.send(msgpack.packb([ENGINE_REPLY, replies], use_bin_type=True))


def finished_request() -> dict[str, Any]:
    """What its engine would serialize of a request that made one token."""
    import torch
    from megatron.core.inference.headers import Headers
    from megatron.core.inference.inference_request import (
        DynamicInferenceRequest,
        DynamicInferenceRequestRecord,
        Status,
    )
    from megatron.core.inference.sampling_params import SamplingParams

    assert (Headers.SUBMIT_REQUEST.value, Headers.ENGINE_REPLY.value) == (SUBMIT_REQUEST, ENGINE_REPLY)
    request = DynamicInferenceRequest(
        request_id=0,
        prompt_tokens=torch.zeros(0, dtype=torch.int64),
        sampling_params=SamplingParams(num_tokens_to_generate=1),
        status=Status.COMPLETED,
        generated_tokens=[TOKEN],
    )
    finished: dict[str, Any] = DynamicInferenceRequestRecord.from_request(request).merge().serialize()
    return finished


class Answering:
    """The coordinator, so many answering engines, and a client in this process."""

    def __init__(self, engines: int) -> None:
        from megatron.core.inference.data_parallel_inference_coordinator import (
            DataParallelInferenceCoordinator,
        )

        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        ready = spawn.Event()
        self.coordinator = spawn.Process(
            target=DataParallelInferenceCoordinator.entrypoint,
            kwargs={
                "pipe_connection": there,
                "ready_event": ready,
                "data_parallel_size": engines,
                "tokenizer": Tokenizer(),
                "max_requests": REQUESTS_MAX,
                "hostname": LOCAL,
            },
            daemon=True,
        )
        self.coordinator.start()
        if not here.poll(START_SECONDS):
            raise NotRun("Megatron's coordinator did not start")
        self.address = here.recv()
        finished = finished_request()
        self.engines = [
            spawn.Process(target=answering_engine, args=(self.address, number, finished), daemon=True)
            for number in range(engines)
        ]
        for engine in self.engines:
            engine.start()
        if not ready.wait(START_SECONDS):
            raise NotRun("Megatron's coordinator did not hear all engines")
        self.client: Any = None
        self.port: int | None = None
        self.replicas: list[Any] = []

    def pids(self) -> dict[str, int]:
        processes = {"coordinator": self.coordinator.pid}
        processes |= {f"engine-{number}": engine.pid for number, engine in enumerate(self.engines)}
        processes |= {f"front-{number}": replica.pid for number, replica in enumerate(self.replicas)}
        return {"client": os.getpid(), **{name: pid for name, pid in processes.items() if pid is not None}}

    async def ask(self, prompt: list[int]) -> None:
        from megatron.core.inference.inference_client import InferenceClient
        from megatron.core.inference.sampling_params import SamplingParams

        if self.client is None:
            self.client = InferenceClient(self.address)
            self.client.start()
        reply = await self.client.add_request(prompt, SamplingParams(num_tokens_to_generate=1))
        assert reply["generated_tokens"] == [TOKEN], reply

    def serve_http(self, replicas: int) -> int:
        """Its own server. Raises `NotRun` without Quart and Hypercorn."""
        from megatron.core.inference.text_generation_server.dynamic_text_gen_server import (
            text_generation_server as server,
        )

        if not server.HAS_BACKEND:
            raise NotRun("Megatron's HTTP server needs quart and hypercorn")
        if self.port is None:
            sock = socket.socket()
            sock.bind((LOCAL, 0))
            self.port = int(sock.getsockname()[1])
            server.start_text_gen_server(
                self.address, Tokenizer(), 0, self.port, num_replicas=replicas, sock=sock
            )
            self.replicas = list(server._SERVER_PROCESSES)
            wait_for_port(self.port)
        return self.port

    def close(self) -> None:
        for process in [*self.replicas, *self.engines, self.coordinator]:
            process.kill()
            process.join(10)


def wait_for_port(port: int) -> None:
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends:
        with contextlib.suppress(OSError), socket.create_connection((LOCAL, port), 1.0):
            return
        time.sleep(0.05)
    raise NotRun("Megatron's HTTP server did not listen")


# --- ranks: the engine loop as it is -----------------------------------------------------------------------------------------


class Ranks:
    """One process a rank, a client in this one. A rank says when it is PAUSED and when RUNNING, on the clock that all share."""

    def __init__(self, count: int) -> None:
        from megatron.core.inference.inference_client import InferenceClient

        with socket.socket() as probe:
            probe.bind((LOCAL, 0))
            port = probe.getsockname()[1]
        self._ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "rank", str(number), str(count), str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]
        self._client = InferenceClient(self._hear(0)["address"])

    async def pause(self, busy: bool, count: int, interval: int) -> list[float]:
        """From the client's send to the last rank's PAUSED; that somebody would have to be told so is not counted."""
        if not hasattr(self._client, "listener_task"):
            self._client.start()
        self._tell(busy=busy, interval=interval)
        await asyncio.sleep(0.3)
        times = []
        for _ in range(count):
            await asyncio.sleep(random.uniform(0.02, 0.04))
            begun = time.monotonic()
            self._client.pause_engines()
            times.append(1e3 * (self._all("paused") - begun))
            self._client.unpause_engines()
            self._all("running")
        self._tell(busy=False, interval=interval)
        return times

    def _all(self, state: str) -> float:
        return max(self._hear(number)[state] for number in range(len(self._ranks)))

    def _tell(self, **what: Any) -> None:
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(what) + "\n")
            rank.stdin.flush()

    def _hear(self, number: int) -> dict[str, Any]:
        out = self._ranks[number].stdout
        assert out is not None
        while line := out.readline():
            if line.startswith('{"'):
                found: dict[str, Any] = json.loads(line)
                return found
        raise NotRun(f"Megatron's rank {number} ended with {self._ranks[number].wait()}")

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait(10)


def rank(number: int, count: int, port: int) -> None:
    """The real `DynamicInferenceEngine.run_engine_with_coordinator`; below it stands what needs a GPU."""
    import torch.distributed as dist
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine, EngineState

    dist.init_process_group("gloo", init_method=f"tcp://{LOCAL}:{port}", rank=number, world_size=count)
    alone = [dist.new_group([each]) for each in range(count)][number]
    everybody = dist.group.WORLD
    busy = False

    class Engine(DynamicInferenceEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            defaults = InferenceConfig()
            self.pg_collection = SimpleNamespace(dp=everybody, ep=everybody, mp=alone, tp=alone, pp=alone)
            self.controller = SimpleNamespace(tokenizer=Tokenizer(), dummy_forward=step)
            self.context = SimpleNamespace(
                max_requests=REQUESTS_MAX,
                block_size_tokens=defaults.block_size_tokens,
                enable_prefix_caching=False,
                prefix_caching_coordinator_policy=defaults.prefix_caching_coordinator_policy,
                prefix_caching_routing_alpha=defaults.prefix_caching_routing_alpha,
                step_count=0,
                prefix_cache_lru_clock=0,
                get_active_request_count=lambda: int(busy),
            )
            self.disable_ep_consensus = defaults.disable_ep_consensus
            self.use_synchronous_zmq_collectives = defaults.use_synchronous_zmq_collectives
            self.ep_consensus_interval = defaults.ep_consensus_interval
            self.rank, self.requests, self.waiting_request_ids = number, {}, deque()
            self._generation_epoch, self._pending_signals = None, deque()
            self._loop, self._cond = asyncio.get_running_loop(), asyncio.Condition()
            self._state_events = {state: asyncio.Event() for state in self._STATE_EVENTS}
            self.state = EngineState.RUNNING
            self._state_events[EngineState.RUNNING].set()
            none = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
            self.step_start_event = self.step_end_event = none

        async def async_step(self) -> None:
            step()
            await asyncio.sleep(0)

    def step() -> None:
        time.sleep(STEP_SECONDS)

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    async def run() -> None:
        nonlocal busy
        engine = Engine()
        address = await engine.start_listening_to_data_parallel_coordinator(hostname=LOCAL)
        if number == 0:
            say(address=address)

        def listen() -> None:
            nonlocal busy
            for line in sys.stdin:
                told = json.loads(line)
                busy, engine.ep_consensus_interval = told["busy"], told["interval"]

        threading.Thread(target=listen, daemon=True).start()
        while True:
            await engine.wait_until(EngineState.PAUSED)
            say(paused=time.monotonic())
            await engine.wait_until(EngineState.RUNNING)
            say(running=time.monotonic())

    asyncio.run(run())


# --- questions ---------------------------------------------------------------------------------------------------------------


class Megatron:
    def __init__(self, engines: int) -> None:
        import megatron.core.inference.inference_client
        import msgpack
        import zmq

        assert megatron, (msgpack, zmq)
        self._engines = engines
        self._answering: Answering | None = None
        self._ranks: Ranks | None = None
        self._connections: list[Any] = []

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        match question:
            case {"do": "pause", "busy": busy, "count": count, "interval": interval}:
                self._ranks = self._ranks or Ranks(self._engines)
                return {"ms": await self._ranks.pause(busy, count, interval)}
            case {"do": "requests", "prompt": tokens, "in_flight": in_flight, "seconds": seconds}:
                side = self._side()
                return await drive(side.ask, prompts(tokens), in_flight, seconds, side.pids())
            case {
                "do": "http",
                "prompt": tokens,
                "in_flight": in_flight,
                "seconds": seconds,
                "replicas": replicas,
            }:
                return await self._http(tokens, in_flight, seconds, replicas)
            case {"do": "alone", "prompt": tokens, "count": count}:
                side, prompt, times = self._side(), prompts(tokens)[0], []
                for _ in range(count):
                    begun = time.perf_counter()
                    await side.ask(prompt)
                    times.append(1e3 * (time.perf_counter() - begun))
                return {"dispatched_ms": times}
        raise ValueError(f"{question} is no question")

    def _side(self) -> Answering:
        self._answering = self._answering or Answering(self._engines)
        return self._answering

    async def _http(self, tokens: int, in_flight: int, seconds: float, replicas: int) -> dict[str, Any]:
        side = self._side()
        port = side.serve_http(replicas)
        bodies = [
            json.dumps({"model": "m", "prompt": prompt, "max_tokens": 1}).encode()
            for prompt in prompts(tokens, HTTP_VOCABULARY)
        ]

        async def ask(prompt: list[int]) -> None:
            await post(port, bodies[prompt[0]], self._connections)

        numbers = [[each] for each in range(len(bodies))]
        return await drive(ask, numbers, in_flight, seconds, side.pids())

    def close(self) -> None:
        for side in (self._answering, self._ranks):
            if side is not None:
                side.close()


def main(engines: int) -> None:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    side: Megatron | None = None

    def start() -> Any:
        nonlocal side
        side = made = Megatron(engines)
        return lambda question: loop.run_until_complete(made.answer(question))

    try:
        answer(start)
    finally:
        if side is not None:
            side.close()


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(*map(int, sys.argv[2:]))
    else:
        main(int(sys.argv[1]))

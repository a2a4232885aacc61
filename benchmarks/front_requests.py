"""What one HTTP request costs the front, in CPU: everything of text/ and web/ over a real socket, the fleet answering at once.

    python benchmarks/front_requests.py [--seconds 3]

The server runs in a process of its own, so its CPU time is its own. Each row is one kind of request on four kept connections.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop

from interlock.core.identity import Epoch
from interlock.fleet.generation import Generation
from interlock.fleet.ledger import GenerationRequest
from interlock.host.ports import bind_port, port_of
from interlock.host.real import RealHost
from interlock.testing.text_files import write_text_files
from interlock.text.model import TextModel
from interlock.web.front import Access, Front
from interlock.web.main import FrontServer
from interlock.wire.engine_messages import TokenLogprobs
from interlock.wire.fleet_messages import EngineFacts, Member, Membership

CONNECTIONS = 4
TOKENS = 64


class InstantFleet:
    """Every request is answered in its own time slice: one piece for each token of a stream, all at once otherwise."""

    coordinator_connected = ready = True

    def __init__(self) -> None:
        facts = EngineFacts("unix:/e", "m", 8192, "instant")
        self.membership = Membership(
            Epoch(1, 1), "RUNNING", "v", [], [Member("e", 1, facts, "RUNNING", True, "v")]
        )

    def in_flight(self) -> dict[str, int]:
        return {}

    def submit(self, request: GenerationRequest) -> Generation:
        generation = Generation(request, self._abort)
        asyncio.get_running_loop().create_task(self._run(request, generation))
        return generation

    async def _run(self, request: GenerationRequest, generation: Generation) -> None:
        count, logprobs = request.sampling.max_tokens, request.sampling.logprobs
        each = 1 if request.priority else count  # priority 1 asks for one piece a token
        for start in range(0, count, each):
            tokens = [300 + (start + n) % 64 for n in range(each)]
            entries = (
                [TokenLogprobs(-0.5, 1, [(t + n, -0.5 - n) for n in range(logprobs)]) for t in tokens]
                if logprobs is not None
                else []
            )
            generation.push(tokens, entries, "length" if start + each >= count else "", 0, "")
            await asyncio.sleep(0)

    async def _abort(self, request: str) -> None:
        pass


def serve(model_dir: Path, pipe: Connection) -> None:
    async def run() -> None:
        front = Front(
            RealHost(),
            InstantFleet(),
            None,
            TextModel.load(model_dir),
            served_model_name="m",
            access=Access(),  # type: ignore[arg-type]
        )
        sock = bind_port("127.0.0.1", 0)
        server = FrontServer(front)
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        await server.listening.wait()
        pipe.send(port_of(sock))
        while (word := await asyncio.get_running_loop().run_in_executor(None, pipe.recv)) == "usage":
            used = resource.getrusage(resource.RUSAGE_SELF)
            pipe.send(used.ru_utime + used.ru_stime)
        assert word == "stop"
        server.should_exit = True
        await serving

    uvloop.run(run())


async def load(port: int, path: str, body: dict[str, Any], seconds: float) -> int:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: b\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    sent = head.encode() + data
    ends = time.monotonic() + seconds

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        count = 0
        while time.monotonic() < ends:
            writer.write(sent)
            header = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in header.split(b"\r\n")[0], header
            if b"transfer-encoding: chunked" in header:
                await reader.readuntil(b"\r\n0\r\n\r\n")
            else:
                length = int(header.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
            count += 1
        writer.close()
        return count

    return sum(await asyncio.gather(*(one() for _ in range(CONNECTIONS))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0)
    seconds = parser.parse_args().seconds
    text = "The levers of an interlocking are pulled in any order. " * 8
    completion = {"model": "m", "prompt": text, "max_tokens": TOKENS}
    chat = {"model": "m", "messages": [{"role": "user", "content": text}] * 3, "max_tokens": TOKENS}
    per_token = {"stream": True, "priority": 1}
    rows = [
        ("completion, whole", "/v1/completions", completion),
        ("completion, 1 token", "/v1/completions", {**completion, "max_tokens": 1}),
        ("completion, streamed token by token", "/v1/completions", completion | per_token),
        ("  with logprobs=5", "/v1/completions", completion | per_token | {"logprobs": 5}),
        (
            "  with 4 stop strings",
            "/v1/completions",
            completion | per_token | {"stop": ["zzz", "###", "\n\n\n", "</s>"]},
        ),
        ("chat, whole", "/v1/chat/completions", chat),
        ("chat, streamed token by token", "/v1/chat/completions", chat | per_token),
    ]
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("spawn").Process(
            target=serve, args=(write_text_files(Path(folder)), theirs)
        )
        child.start()
        port = ours.recv()
        uvloop.run(load(port, *rows[0][1:], 0.5))
        print(f"{TOKENS} tokens an answer unless said otherwise; {len(text)} characters of text a message")
        print(f"{'':<40}{'requests/s':>12}{'CPU ms a request':>20}{'CPU µs a token':>18}")
        for name, path, body in rows:
            ours.send("usage")
            before, started = ours.recv(), time.monotonic()
            count = uvloop.run(load(port, path, body, seconds))
            ours.send("usage")
            cpu, elapsed = ours.recv() - before, time.monotonic() - started
            tokens = count * body["max_tokens"]
            print(f"{name:<40}{count / elapsed:>12.0f}{1e3 * cpu / count:>20.3f}{1e6 * cpu / tokens:>18.1f}")
        ours.send("stop")
        child.join(10)


if __name__ == "__main__":
    main()

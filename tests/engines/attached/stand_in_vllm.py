"""A vLLM server as far as its development endpoints go: a state that they change, and nothing that computes.

What the endpoints are called, take and answer is vLLM 0.32's (entrypoints/rl/online, entrypoints/serve/dev).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any
from urllib.parse import parse_qsl, urlsplit


class StandInVllm:
    """`async with`; its `url` stays over `stop` and `start`."""

    def __init__(self, *, development: bool = True) -> None:
        self.development = development
        self.port = 0
        self.calls: list[tuple[str, dict[str, str]]] = []
        self.holding_blocks = 0
        """So often a reset is refused because a load is on its way."""
        self.fail_reload = ""
        self.let_pause = asyncio.Event()
        self.let_pause.set()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._forget()

    def _forget(self) -> None:
        self.paused, self.label, self.weights, self.cached = False, "default", "", True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self, *, forget: bool = False) -> None:
        """`forget`: as a process that ends; else only the network is away."""
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.close()
        await self._server.wait_closed()
        if forget:
            self._forget()

    async def __aenter__(self) -> StandInVllm:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def named(self, path: str) -> list[dict[str, str]]:
        return [given for called, given in self.calls if called == path]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    (
                        int(line.partition(":")[2])
                        for line in head.splitlines()
                        if line.lower().startswith("content-length:")
                    ),
                    0,
                )
                body = await reader.readexactly(length)
                target = urlsplit(head.split()[1])
                status, answer = await self._answer(target.path, dict(parse_qsl(target.query)), body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
                await writer.drain()
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "policy", "max_model_len": 512}]}
        if path == "/metrics":
            return (
                200,
                b'vllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_waiting{engine="0"} 1.0\n',
            )
        if not self.development:
            return 404, {"detail": "Not Found"}
        if path not in ("/is_paused", "/weight_info"):
            self.calls.append((path, query))
        match path:
            case "/is_paused":
                return 200, {"is_paused": self.paused}
            case "/weight_info":
                return 200, {"weight_version": self.label}
            case "/pause":
                await self.let_pause.wait()
                self.paused = True
            case "/resume":
                self.paused = False
            case "/collective_rpc":
                asked = json.loads(body)
                assert asked["method"] == "reload_weights"
                if self.fail_reload:
                    return 500, {"error": {"message": self.fail_reload}}
                assert self.paused, "weights change while it computes"
                self.weights, self.cached = asked["kwargs"]["weights_path"], True
                return 200, {"results": [None]}
            case "/reset_prefix_cache":
                if self.holding_blocks:
                    self.holding_blocks -= 1
                    return 200, {"success": False}
                self.cached = False
                return 200, {"success": True}
            case "/update_weight_version":
                self.label = json.loads(body)["new_version"]
        return 200, {"status": "ok"}

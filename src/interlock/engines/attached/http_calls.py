"""A `vllm serve` by its URL, over its development endpoints (VLLM_SERVER_DEV_MODE=1, vLLM 0.32).

Each call is one connection in a daemon thread of its own, closed when the caller is cancelled: a pause that waits for requests to end
may take minutes, and must keep neither a thread pool nor the end of this process waiting.
"""

from __future__ import annotations

import asyncio
import http.client
import re
from typing import Any
from urllib.parse import urlencode, urlsplit

import msgspec

from interlock.core.limits import ATTACH_ANSWER_BYTES_MAX, ATTACH_ANSWER_SECONDS_MAX, ATTACH_STEP_SECONDS_MAX
from interlock.engines.attached.calls import CallFailed, Described, Unreachable
from interlock.engines.base import EngineStartError, Unable
from interlock.host.threads import start_thread
from interlock.wire.fleet_messages import Load

DEV_HINT = "start the server with VLLM_SERVER_DEV_MODE=1, where nobody but you can reach it"
WORDS_MAX = 400
GAUGES = {
    "running": re.compile(rb"^vllm:num_requests_running(?:\{[^}]*\})? (\S+)", re.M),
    "waiting": re.compile(rb"^vllm:num_requests_waiting(?:\{[^}]*\})? (\S+)", re.M),
    "kv_used": re.compile(rb"^vllm:kv_cache_usage_perc(?:\{[^}]*\})? (\S+)", re.M),
}


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Paused(msgspec.Struct):
    is_paused: bool


class _Reset(msgspec.Struct):
    success: bool


class _Weights(msgspec.Struct):
    weight_version: str


class Server:
    """`Calls` on a server. Raises ValueError for what is no http or https URL."""

    def __init__(self, url: str, *, api_key: str | None = None, sleeps: bool = False) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no URL of a server: http://host:port is")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port or (443 if self._secure else 80)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._sleeps = sleeps

    @property
    def where(self) -> str:
        return f"the vLLM server at {self._host}:{self._port}"

    @property
    def name(self) -> str:
        return f"{self._host}:{self._port}"

    async def describe(self) -> Described:
        models = await self._get("/v1/models", _Models)
        if not models.data:
            raise EngineStartError(f"{self.where} serves no model")
        status, _ = await self._ask("GET", "/is_paused")
        if status == 404:
            raise EngineStartError(f"{self.where} has no development endpoints; {DEV_HINT}")
        return Described(
            model=models.data[0].id, max_model_tokens=models.data[0].max_model_len or 0, sleeps=self._sleeps
        )

    async def pause(self, mode: str) -> None:
        path = "/pause?" + urlencode({"mode": mode, "clear_cache": "false"})
        status, body = await self._ask("POST", path, seconds=ATTACH_STEP_SECONDS_MAX)
        if status == 400:
            raise Unable(f"{self.where} cannot pause with mode {mode}: {_words(body)}")
        self._check(status, body, "/pause")

    async def resume(self) -> None:
        await self._post("/resume")

    async def is_paused(self) -> bool:
        return (await self._get("/is_paused", _Paused)).is_paused

    async def reload(self, path: str) -> None:
        asked = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        await self._post("/collective_rpc", asked, seconds=ATTACH_STEP_SECONDS_MAX)

    async def drop_caches(self) -> None:
        query = urlencode({"reset_running_requests": "true", "reset_external": "true"})
        body = await self._post(f"/reset_prefix_cache?{query}")
        if not self._read(body, _Reset, "/reset_prefix_cache").success:
            raise CallFailed("vLLM says that blocks are still held")
        await self._post("/reset_mm_cache")
        await self._post("/reset_encoder_cache")

    async def name_weights(self, version: str) -> None:
        await self._post("/update_weight_version", {"new_version": version})

    async def weights_name(self) -> str:
        return (await self._get("/weight_info", _Weights)).weight_version

    async def sleep(self) -> None:
        await self._post("/sleep?" + urlencode({"level": 1, "mode": "keep"}), seconds=ATTACH_STEP_SECONDS_MAX)

    async def wake(self, what: str) -> None:
        await self._post("/wake_up?" + urlencode({"tags": what}), seconds=ATTACH_STEP_SECONDS_MAX)

    async def load(self) -> Load:
        status, body = await self._ask("GET", "/metrics")
        self._check(status, body, "/metrics")
        sums = {name: _sum(pattern, body) for name, pattern in GAUGES.items()}
        return Load(int(sums["running"]), int(sums["waiting"]), min(1.0, sums["kv_used"]))

    # --- HTTP ----------------------------------------------------------------------------------------------------

    async def _get(self, path: str, kind: type[Any]) -> Any:
        status, body = await self._ask("GET", path)
        self._check(status, body, path)
        return self._read(body, kind, path)

    async def _post(self, path: str, body: Any = None, seconds: float = ATTACH_ANSWER_SECONDS_MAX) -> bytes:
        sent = b"" if body is None else msgspec.json.encode(body)
        status, answer = await self._ask("POST", path, sent, seconds)
        self._check(status, answer, path)
        return answer

    def _check(self, status: int, body: bytes, path: str) -> None:
        if status == 404:
            raise CallFailed(f"{self.where} has no {path.partition('?')[0]}; {DEV_HINT}")
        if status >= 300:
            raise CallFailed(f"{path.partition('?')[0]} was answered {status}: {_words(body)}")

    def _read(self, body: bytes, kind: type[Any], path: str) -> Any:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise CallFailed(
                f"the answer of {path.partition('?')[0]} is none that is understood: {error}"
            ) from error

    async def _ask(
        self, method: str, path: str, body: bytes = b"", seconds: float = ATTACH_ANSWER_SECONDS_MAX
    ) -> tuple[int, bytes]:
        """(status, body). Raises `Unreachable`."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[tuple[int, bytes]] = loop.create_future()
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=seconds)
        headers = self._headers | ({"content-type": "application/json"} if body else {})

        def tell(found: tuple[int, bytes] | Exception) -> None:
            if answer.done():
                return
            if isinstance(found, Exception):
                answer.set_exception(found)
            else:
                answer.set_result(found)

        def ask() -> None:
            found: tuple[int, bytes] | Exception
            try:
                connection.request(method, self._base + path, body or None, headers)
                response = connection.getresponse()
                data = response.read(ATTACH_ANSWER_BYTES_MAX + 1)
                found = (response.status, data)
                if len(data) > ATTACH_ANSWER_BYTES_MAX:
                    found = CallFailed(f"{path} was answered by more than {ATTACH_ANSWER_BYTES_MAX} bytes")
            except (OSError, http.client.HTTPException) as error:
                found = Unreachable(f"{self.where} does not answer: {error or type(error).__name__}")
            except ValueError as error:  # a socket closed under us
                found = Unreachable(f"{self.where} was left: {error}")
            finally:
                connection.close()
            if not loop.is_closed():
                loop.call_soon_threadsafe(tell, found)

        start_thread(f"ask {self.name}", ask)
        try:
            return await answer
        except asyncio.CancelledError:
            if connection.sock is not None:
                _shut(connection.sock)
            raise


def _shut(sock: Any) -> None:
    """Wakes the thread that waits on it; closing is that thread's."""
    try:
        sock.shutdown(2)
    except OSError:
        return


def _words(body: bytes) -> str:
    return " ".join(body.decode(errors="replace").split())[:WORDS_MAX]


def _sum(pattern: re.Pattern[bytes], body: bytes) -> float:
    total = 0.0
    for value in pattern.findall(body):
        try:
            total += float(value)
        except ValueError:
            continue
    return total if total == total and total != float("inf") else 0.0

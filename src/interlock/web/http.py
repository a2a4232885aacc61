"""The HTTP ground: bodies read within bounds, answers sent with a deadline, a client that leaves noticed at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from interlock.core.limits import (
    HTTP_BODIES_BYTES_MAX,
    HTTP_BODY_BYTES_MAX,
    HTTP_BODY_SECONDS_MAX,
    HTTP_SEND_SECONDS_MAX,
    RETRY_AFTER_SECONDS,
)
from interlock.web.errors import ApiError
from interlock.web.front import Front

JSON = b"application/json"
EVENTS = b"text/event-stream; charset=utf-8"
Headers = list[tuple[bytes, bytes]]
T = TypeVar("T")


class Disconnected(Exception):  # noqa: N818
    """The client closed its connection, or takes nothing any more."""


def header(scope: Scope, name: bytes) -> str | None:
    """`name` in lower case. ASGI servers lower the names they pass on."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value).decode("latin-1")
    return None


def bearer_token(scope: Scope) -> str | None:
    """Of the authorization header; None where there is none of that scheme."""
    given = header(scope, b"authorization")
    if given is None:
        return None
    scheme, _, token = given.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


class Body:
    """A request's body, counted against the front's budget until `release`."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self.data = bytearray()

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """Raises `ApiError` 400, 408, 413 or 429, and `Disconnected`."""
        announced = header(scope, b"content-length")
        if announced is not None and announced.isdecimal() and int(announced) > HTTP_BODY_BYTES_MAX:
            raise too_large()
        try:
            async with asyncio.timeout(HTTP_BODY_SECONDS_MAX):
                while await self._take(receive):
                    pass
        except TimeoutError:
            raise ApiError(
                408, f"The body did not arrive within {HTTP_BODY_SECONDS_MAX:.0f} seconds.", code="slow_body"
            ) from None
        return bytes(self.data)

    async def _take(self, receive: Receive) -> bool:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        chunk = message.get("body", b"")
        if len(self.data) + len(chunk) > HTTP_BODY_BYTES_MAX:
            raise too_large()
        if self._front.body_bytes + len(chunk) > HTTP_BODIES_BYTES_MAX:
            raise ApiError(
                429,
                "This server holds as many request bodies as it can; ask again in a moment.",
                kind="rate_limit_error",
                code="overloaded",
                retry_after_s=RETRY_AFTER_SECONDS,
            )
        self.data += chunk
        self._front.body_bytes += len(chunk)
        return bool(message.get("more_body", False))

    def release(self) -> None:
        """It is needed no more."""
        self._front.body_bytes -= len(self.data)
        self.data = bytearray()


def too_large() -> ApiError:
    """413."""
    return ApiError(
        413,
        f"The body has more than the {HTTP_BODY_BYTES_MAX} bytes that are taken; send less.",
        code="too_large",
    )


class Reply:
    """What goes back to one client. Raises `Disconnected` when it takes nothing for HTTP_SEND_SECONDS_MAX."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False
        self.request_id: str | None = None

    async def whole(
        self, status: int, body: bytes, kind: bytes = JSON, headers: Headers | None = None
    ) -> None:
        """An answer in one piece."""
        length = [(b"content-length", str(len(body)).encode())]
        await self.start(status, kind, length + (headers or []))
        await self._emit({"type": "http.response.body", "body": body})

    async def error(self, error: ApiError) -> None:
        """An answer that says what was wrong."""
        await self.whole(error.status, error.body, headers=error.headers)

    async def start(self, status: int, kind: bytes, headers: Headers) -> None:
        """Status and headers; then `more`, then `end`."""
        self.begun = True
        own = [(b"x-request-id", self.request_id.encode())] if self.request_id else []
        await self._emit(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", kind), *own, *headers],
            }
        )

    async def more(self, data: bytes) -> None:
        """A piece of a stream."""
        await self._emit({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Of a stream."""
        await self._emit({"type": "http.response.body", "body": b""})

    async def _emit(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(HTTP_SEND_SECONDS_MAX):
                await self._send(message)
        except (TimeoutError, OSError) as error:
            raise Disconnected from error


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """`work`'s result; it is cancelled, and `Disconnected` raised when it has cleaned up, once the client is gone.

    The body must have been read: the next message of the server is then the client's leaving.
    """
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Disconnected
    finally:
        watching.cancel()
        doing.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

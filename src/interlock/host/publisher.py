"""A ZeroMQ socket that publishes, and one that answers who missed something: the form in which vLLM's routers listen.

ZeroMQ is here for nothing else: our own channels authenticate their peers and know their order (wire/). Only addresses of
this machine are bound; whoever wants them elsewhere puts a tunnel or a proxy before them that knows whom it lets in.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

SEND_QUEUE_MAX = 4096
"""Messages waiting for one slow subscriber; then his are dropped, he sees it by their numbers and asks again."""


def check_endpoint(endpoint: str) -> None:
    """Raises `ValueError` for what is no `ipc://` path or `tcp://` address of this machine alone."""
    parts = urlsplit(endpoint)
    if parts.scheme == "ipc" and parts.netloc + parts.path:
        return
    try:
        if parts.scheme == "tcp" and parts.port is not None and parts.hostname is not None:
            if parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname).is_loopback:
                return
            raise ValueError(
                f"{endpoint} can be reached by others, and nobody is asked who he is there: use 127.0.0.1 or ipc://"
            )
    except ValueError as error:
        if "reached by others" in str(error):
            raise
    raise ValueError(f"{endpoint!r} is neither tcp://127.0.0.1:PORT nor ipc:///PATH")


class Publisher:
    """One publishing socket and, with `replay`, one for questions. Used by one loop's tasks."""

    def __init__(self, endpoint: str, replay: str | None) -> None:
        """Binds. Raises `ValueError` for an address that is not allowed, `OSError` for one that cannot be had."""
        import zmq
        import zmq.asyncio

        for each in filter(None, (endpoint, replay)):
            check_endpoint(each)
        self._zmq = zmq
        self._context = zmq.asyncio.Context()
        self._sockets: list[Any] = []
        self._router: Any = None
        self.replay: str | None = None
        """Where questions are answered, as bound; None: nowhere."""
        try:
            self._pub, self.endpoint = self._bind(zmq.PUB, endpoint)
            if replay is not None:
                self._router, self.replay = self._bind(zmq.ROUTER, replay)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"{endpoint} cannot be bound: {error.strerror}") from error

    def _bind(self, kind: int, endpoint: str) -> tuple[Any, str]:
        socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.setsockopt(self._zmq.LINGER, 0)
        socket.setsockopt(self._zmq.SNDHWM, SEND_QUEUE_MAX)
        socket.setsockopt(self._zmq.RCVHWM, SEND_QUEUE_MAX)
        socket.setsockopt(self._zmq.MAXMSGSIZE, 1024)  # what we are asked is eight bytes long
        socket.bind(endpoint)
        return socket, socket.getsockopt_string(self._zmq.LAST_ENDPOINT)

    async def publish(self, frames: Sequence[bytes]) -> None:
        """To whoever listens now; never waits for one who listens slowly."""
        await self._pub.send_multipart(frames)

    async def question(self) -> list[bytes]:
        """The next question: who asks, and what."""
        assert self._router is not None
        frames: list[bytes] = await self._router.recv_multipart()
        return frames

    async def answer(self, frames: Sequence[bytes]) -> None:
        """`frames` begin with who asked. One who is gone or reads nothing is passed over."""
        assert self._router is not None
        try:
            await self._router.send_multipart(frames, self._zmq.NOBLOCK)
        except self._zmq.Again:
            return

    def close(self) -> None:
        for socket in self._sockets:
            socket.close(0)
        self._context.term()

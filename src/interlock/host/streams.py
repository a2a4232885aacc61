"""Streams that carry descriptors, and listeners, on the running loop.

Readiness comes from `loop.add_reader`/`add_writer` alone, so the same code runs on asyncio and uvloop. Asyncio's own
streams are not used: they cannot carry descriptors, and their buffers hide when a peer reads slowly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence

from interlock.core.limits import CONNECTIONS_MAX
from interlock.host.base import Peer, Stream
from interlock.host.sockets import (
    BACKLOG,
    RECEIVE_BYTES,
    broken,
    connect_unix,
    describe_peer,
    listen_unix,
    parse_address,
    peer_pidfd,
    receive,
    transmit,
)
from interlock.host.watch import ProcessWatch

_log = logging.getLogger(__name__)


class SocketStream:
    """`Stream` over one connected, non-blocking socket."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._peer = describe_peer(sock, address)
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._wanted = 0
        self._armed = False
        """Whether the loop calls `_on_readable`."""
        self._end: EOFError | ConnectionError | None = None
        """Why nothing more comes."""
        self._fds: list[int] = []
        self._sending = asyncio.Lock()
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def peer(self) -> Peer:
        return self._peer

    async def send(self, data: bytes | bytearray | memoryview, fds: Sequence[int] = ()) -> None:
        if fds and self._sock.family != socket.AF_UNIX:
            raise ValueError("only Unix sockets carry descriptors")
        async with self._sending:
            rest = memoryview(data)
            while rest:
                self._check_open()
                try:
                    taken = transmit(self._sock, rest, fds)
                except BlockingIOError:
                    await self._wait_writable()
                except OSError as error:
                    raise broken(error) from error
                else:
                    rest, fds = rest[taken:], ()

    async def receive_exactly(self, count: int) -> bytes:
        # The buffer grows with what arrived, not with what a length promised.
        while len(self._buffer) < count:
            self._check_open()
            if self._end is not None:
                raise self._end
            self._wanted = count
            if self._armed or not self._fill():
                await self._wait_readable()
        taken = bytes(memoryview(self._buffer)[:count])
        del self._buffer[:count]
        return taken

    def _fill(self) -> bool:
        """Takes what has arrived, or its end; False when nothing has."""
        wanted = max(RECEIVE_BYTES, min(self._wanted - len(self._buffer), 16 * RECEIVE_BYTES))
        try:
            data = receive(self._sock, wanted, self._fds)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end = broken(error)
        else:
            self._buffer += data
            if not data:
                self._end = EOFError(f"{self._peer.address}: the peer closed the connection")
        if self._end is not None:
            self._disarm()
        return True

    def take_fds(self) -> list[int]:
        taken, self._fds = self._fds, []
        return taken

    def watch_peer(self) -> ProcessWatch | None:
        self._check_open()
        known = peer_pidfd(self._sock, self._peer.pid)
        return ProcessWatch(*known) if known else None

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._disarm()
        self._loop.remove_writer(self._sock.fileno())
        for waiter in (self._readable, self._writable):
            if waiter is not None and not waiter.done():
                waiter.set_exception(ConnectionAbortedError("this side closed the stream"))
        for fd in self.take_fds():
            os.close(fd)
        self._sock.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionAbortedError("this side closed the stream")

    async def _wait_readable(self) -> None:
        assert self._readable is None, "one task reads a stream at a time"
        if not self._armed:
            self._armed = True
            self._loop.add_reader(self._sock.fileno(), self._on_readable)
        self._readable = waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._readable = None

    def _on_readable(self) -> None:
        """Reads here, so that a message costs no arming and disarming; ahead of its reader only up to a bound."""
        waiter = self._readable
        waited_for = waiter is not None and not waiter.done()
        # The next descriptors come only when those here were taken: each reader counts its own.
        if not waited_for and (self._fds or len(self._buffer) >= RECEIVE_BYTES):
            self._disarm()
        elif self._fill() and waited_for and (self._end is not None or len(self._buffer) >= self._wanted):
            assert waiter is not None
            waiter.set_result(None)

    def _disarm(self) -> None:
        if self._armed:
            self._armed = False
            self._loop.remove_reader(self._sock.fileno())

    async def _wait_writable(self) -> None:
        fd = self._sock.fileno()
        self._writable = waiter = self._loop.create_future()
        self._loop.add_writer(fd, _wake, waiter)
        try:
            await waiter
        finally:
            self._writable = None
            if not self._closed:
                self._loop.remove_writer(fd)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def connect_stream(address: str) -> SocketStream:
    """`Host.connect`: raises `ConnectionError` in words, `ValueError` for what is no address. A name's addresses are tried in turn."""
    kind, name, port = parse_address(address)
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            connect_unix(sock, name)
            return SocketStream(sock, address)
        except BaseException:
            sock.close()
            raise
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    failure: OSError = ConnectionRefusedError(f"{address}: no such host")
    for family, type_, protocol, _, where in found:
        sock = socket.socket(family, type_, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, where)
            return SocketStream(sock, address)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise ConnectionRefusedError(f"{address}: cannot be reached: {failure}") from failure


class SocketListener:
    """`Listener` over one listening socket; each connection is served by a task of its own."""

    def __init__(
        self, sock: socket.socket, address: str, path: str | None, serve: Callable[[Stream], Awaitable[None]]
    ) -> None:
        self._sock, self._address, self._path, self._serve = sock, address, path, serve
        self._inode = os.stat(path).st_ino if path else 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept(), name=f"accept {address}")

    @property
    def address(self) -> str:
        return self._address

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, where = await loop.sock_accept(self._sock)
            except OSError as error:  # out of descriptors, or the newcomer left: neither ends the service
                _log.warning("%s: a connection was not accepted: %s", self._address, error)
                await asyncio.sleep(0.1)
                continue
            if len(self._tasks) >= CONNECTIONS_MAX:
                _log.warning(
                    "%s: %d connections are open, one more was refused", self._address, CONNECTIONS_MAX
                )
                sock.close()
                continue
            address = self._address if self._path else f"tcp:{where[0]}:{where[1]}"
            task = asyncio.create_task(self._run(SocketStream(sock, address)), name=f"serve {address}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, stream: SocketStream) -> None:
        try:
            await self._serve(stream)
        except Exception:
            _log.exception("%s: the handler of a connection failed", self._address)
        finally:
            stream.close()

    async def close(self) -> None:
        tasks = [self._accepting, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sock.close()
        if self._path:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == self._inode:  # else a successor listens there already
                    os.unlink(self._path)


async def listen(address: str, serve: Callable[[Stream], Awaitable[None]]) -> SocketListener:
    """`Host.listen`: raises `OSError` when the address cannot be had, `ValueError` for what is none."""
    kind, name, port = parse_address(address)
    if kind == "unix":
        return SocketListener(listen_unix(name), address, name, serve)
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found = await asyncio.get_running_loop().getaddrinfo(
            name, port, family=family, type=socket.SOCK_STREAM
        )
        sock.bind(found[0][4])
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return SocketListener(sock, f"tcp:{name}:{sock.getsockname()[1]}", None, serve)

"""A fault proxy for real stream sockets: stands between two processes and delays, cuts, half-opens or slows what passes.

    async with FaultProxy("unix:/run/a.sock", "unix:/run/b.sock") as proxy:
        ...  # connect to a.sock: bytes go to b.sock and back
        proxy.cut()

It works where the kernel has no netem and where the sockets are Unix ones. Descriptors do not pass it, and behind it the kernel
sees the proxy's pid: for exits and passed memory use the sockets themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

READ_BYTES = 64 * 1024


class FaultProxy:
    """Listens on `front` and connects each connection to `back` (`unix:/path`, `tcp:host:port`). Close it, or use `async with`.

    Faults hold from when they are set, for connections that are there and for new ones.
    """

    def __init__(self, front: str, back: str) -> None:
        self._front, self._back = front, back
        self.delay_s = 0.0
        """Added to each piece, in both directions."""
        self.bytes_per_s: float | None = None
        """None: as fast as it goes."""
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._links: dict[_Link, None] = {}

    async def __aenter__(self) -> FaultProxy:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Raises `OSError` when `front` cannot be listened on."""
        kind, _, where = self._front.partition(":")
        if kind == "unix":
            self._server = await asyncio.start_unix_server(self._serve, where)
        else:
            name, _, port = where.rpartition(":")
            self._server = await asyncio.start_server(self._serve, name, int(port))

    async def close(self) -> None:
        self.heal()
        self.reset()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        for link in list(self._links):
            await link.closed.wait()

    def port(self) -> int:
        """Of a `tcp:` front: the port it got."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    # --- faults ----------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Nothing passes in either direction, nobody is told; `heal` lets it pass late."""
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    def reset(self) -> int:
        """Both ends of every connection are told of its end now; what was under way is lost. How many there were."""
        for link in list(self._links):
            link.abort(front=True, back=True)
        return len(self._links)

    def half_open(self, *, told: str) -> int:
        """One side is told that each connection is over ("front": who connected), the other never is. How many there were."""
        for link in list(self._links):
            link.void = True
            link.abort(front=told == "front", back=told == "back")
        return len(self._links)

    # --- inside ----------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        self._links[link] = None
        try:
            back_reader, back_writer = await self._connect()
            link.back = back_writer
            ways = [
                asyncio.create_task(self._carry(link, reader, back_writer)),
                asyncio.create_task(self._carry(link, back_reader, writer)),
            ]
            await asyncio.gather(*ways)
            if link.void:
                await link.released.wait()
        except OSError:
            pass  # nobody behind us: whoever connected is told by the end of the connection
        finally:
            link.abort(front=True, back=True)
            del self._links[link]
            link.closed.set()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        kind, _, where = self._back.partition(":")
        if kind == "unix":
            return await asyncio.open_unix_connection(where)
        name, _, port = where.rpartition(":")
        return await asyncio.open_connection(name, int(port))

    async def _carry(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.bytes_per_s is not None:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
                await self._open.wait()
                if link.void:
                    continue
                writer.write(data)
                await writer.drain()
            if not link.void:
                await self._open.wait()
                writer.write_eof()


class _Link:
    """One connection through the proxy."""

    def __init__(self, front: asyncio.StreamWriter) -> None:
        self.front, self.back = front, front
        self.void = False
        self.closed, self.released = asyncio.Event(), asyncio.Event()

    def abort(self, *, front: bool, back: bool) -> None:
        for writer in [self.front] * front + [self.back] * back:
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.family != socket.AF_UNIX and not writer.transport.is_closing():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
            writer.transport.abort()
        if front and back:
            self.released.set()

"""HTTP on the simulated network: the real front behind uvicorn's own protocol, and a client of it.

uvicorn speaks to an asyncio transport; `HttpTransport` is one over a simulated stream, with its flow control: a reader who takes
nothing fills the stream's window, then the transport's buffer, and then the answer waits. `ask` is the client's half, over h11.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import h11
import msgspec

from interlock.host.base import Listener, Stream
from interlock.testing.sim.host import SimHost
from interlock.testing.sim.streams import SimStream
from interlock.web.front import Front
from interlock.web.main import FrontServer

BUFFER_BYTES_MAX = 64 * 1024
"""asyncio's own high-water mark; the low one is a quarter of it."""
WRITE_BYTES_MAX = 16 * 1024
_log = logging.getLogger(__name__)


class HttpTransport(asyncio.Transport):
    """`asyncio.Transport` over one simulated stream. `run()` is its life, until the connection is lost or closed."""

    def __init__(self, stream: SimStream, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._stream, self._protocol = stream, protocol
        self._buffer = bytearray()
        self._news = asyncio.Event()
        """There is something to write, or nothing will come any more."""
        self._reads = asyncio.Event()
        self._reads.set()
        self._closing = self._full = False

    async def run(self) -> None:
        self._protocol.connection_made(self)
        halves = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        try:
            await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
            error = next(half for half in halves if half.done()).result()
        finally:
            for half in halves:
                half.cancel()
            await asyncio.gather(*halves, return_exceptions=True)
        self._closing = True
        self._stream.close()
        self._protocol.connection_lost(error)

    async def _read(self) -> Exception | None:
        try:
            while True:
                data = await self._stream.receive_exactly(1)
                data += self._stream.take(len(self._stream.buffer))
                await self._reads.wait()
                if not self._closing:
                    self._protocol.data_received(data)
        except EOFError:
            return None
        except OSError as error:
            return error

    async def _write(self) -> Exception | None:
        try:
            while self._buffer or not self._closing:
                if not self._buffer:
                    self._news.clear()
                    await self._news.wait()
                    continue
                some = bytes(self._buffer[:WRITE_BYTES_MAX])
                await self._stream.send(some)
                del self._buffer[: len(some)]
                if self._full and len(self._buffer) <= BUFFER_BYTES_MAX // 4:
                    self._full = False
                    self._protocol.resume_writing()
        except OSError as error:
            return error
        return None

    # --- what a protocol asks of a transport ------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._closing:
            return
        self._buffer += data
        self._news.set()
        if len(self._buffer) > BUFFER_BYTES_MAX and not self._full:
            self._full = True
            self._protocol.pause_writing()

    def close(self) -> None:
        """What was written still leaves."""
        self._closing = True
        self._news.set()

    def abort(self) -> None:
        self._buffer.clear()
        self.close()

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._reads.clear()

    def resume_reading(self) -> None:
        self._reads.set()


async def serve_http(host: SimHost, front: Front, address: str) -> Listener:
    """The front's application as its own process serves it, but for sockets: behind uvicorn's protocol and limits."""
    server = FrontServer(front)
    server.config.load()
    kind: Any = server.config.http_protocol_class

    async def serve(stream: Stream) -> None:
        assert isinstance(stream, SimStream)
        protocol = kind(config=server.config, server_state=server.server_state, app_state={})
        await HttpTransport(stream, protocol).run()

    return await host.listen(address, serve)


class Answered(msgspec.Struct):
    """The head of an answer."""

    status: int
    headers: dict[str, str]


async def ask(
    host: SimHost, address: str, method: str, target: str, *, body: bytes = b"", token: str = ""
) -> AsyncGenerator[Answered | bytes, None]:
    """One request on a connection of its own: the answer's head, then its bytes as they come. Leaving it closes the connection.

    Raises `OSError` or `EOFError` where the connection fails before the answer's end.
    """
    stream = await host.connect(address)
    try:
        speaker = h11.Connection(h11.CLIENT)
        headers = [("host", "front"), ("connection", "close"), ("content-length", str(len(body)))]
        if token:
            headers.append(("authorization", f"Bearer {token}"))
        said = speaker.send(h11.Request(method=method, target=target, headers=headers)) or b""
        said += (speaker.send(h11.Data(data=body)) or b"") + (speaker.send(h11.EndOfMessage()) or b"")
        await stream.send(said)
        while True:
            event = speaker.next_event()
            if event is h11.NEED_DATA:
                data = await stream.receive_exactly(1)
                speaker.receive_data(data + stream.take(len(stream.buffer)))
            elif isinstance(event, h11.Response):
                named = {name.decode(): value.decode("latin-1") for name, value in event.headers}
                yield Answered(event.status_code, named)
            elif isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise EOFError(f"{address}: the answer ended with {type(event).__name__}")
    finally:
        stream.close()


def events_in(buffer: bytearray) -> list[bytes]:
    """Takes whole server-sent events out of `buffer`, and leaves what is not whole yet."""
    *whole, rest = bytes(buffer).split(b"\n\n")
    buffer[:] = rest
    return [event.removeprefix(b"data: ") for event in whole]

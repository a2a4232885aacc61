"""A `Stream` under TLS, over any other: for control channels between hosts, with the certificates that the bytes' lanes have (`bulk_tls`).

The TLS layer never sees a socket: records are read from the stream below by the length in their header, so this works over whatever
`Stream` there is, and no byte of the next record is taken early.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence

from interlock.host.base import Peer, Stream, Watch

RECORD_HEADER_BYTES = 5
RECORD_BYTES_MAX = 16384 + 256
"""RFC 8446, 5.2: of a protected record."""
RECORD_KINDS = range(20, 25)
SEND_BYTES = 256 * 1024
READ_BYTES = 64 * 1024


class TlsStream:
    """Made by `secure`; then used like any stream. Carries no descriptors."""

    def __init__(self, plain: Stream, context: ssl.SSLContext, *, listens: bool) -> None:
        self._plain = plain
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=listens)
        self._buffer = bytearray()
        self._sending = asyncio.Lock()

    @property
    def peer(self) -> Peer:
        return self._plain.peer

    async def shake_hands(self) -> None:
        """Raises `ConnectionError` in words, `EOFError`; bounded by the caller."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._feed()
            except ssl.SSLError as error:
                await self._flush()  # the alert that tells the peer why
                raise ConnectionAbortedError(f"{self.peer.address}: TLS failed: {_words(error)}") from error
            else:
                await self._flush()
                return

    async def send(self, data: bytes | bytearray | memoryview, fds: Sequence[int] = ()) -> None:
        if fds:
            raise ValueError("no descriptor goes over TLS")
        async with self._sending:
            rest = memoryview(data)
            while rest:
                try:
                    taken = self._tls.write(rest[:SEND_BYTES])
                except ssl.SSLError as error:
                    raise ConnectionAbortedError(
                        f"{self.peer.address}: TLS failed: {_words(error)}"
                    ) from error
                rest = rest[taken:]
                await self._plain.send(self._leaving.read())

    async def receive_exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            try:
                data = self._tls.read(READ_BYTES)
            except ssl.SSLWantReadError:
                if self._leaving.pending:  # the TLS layer answers something of its own
                    await self._flush()
                await self._feed()
                continue
            except ssl.SSLZeroReturnError:
                data = b""
            except ssl.SSLError as error:
                raise ConnectionAbortedError(f"{self.peer.address}: TLS failed: {_words(error)}") from error
            if not data:
                raise EOFError(f"{self.peer.address}: the peer closed the connection")
            self._buffer += data
        taken = bytes(memoryview(self._buffer)[:count])
        del self._buffer[:count]
        return taken

    def take_fds(self) -> list[int]:
        return []

    def watch_peer(self) -> Watch | None:
        return self._plain.watch_peer()

    def close(self) -> None:
        self._plain.close()

    async def _flush(self) -> None:
        async with self._sending:
            if self._leaving.pending:
                await self._plain.send(self._leaving.read())

    async def _feed(self) -> None:
        """One record. What is none ends the connection before anything is allocated for it."""
        header = await self._plain.receive_exactly(RECORD_HEADER_BYTES)
        length = int.from_bytes(header[3:], "big")
        if header[0] not in RECORD_KINDS or header[1] != 3 or length > RECORD_BYTES_MAX:
            raise ConnectionAbortedError(f"{self.peer.address} speaks no TLS: has it certificates?")
        self._arrived.write(header + await self._plain.receive_exactly(length))


async def secure(plain: Stream, context: ssl.SSLContext, *, listens: bool) -> TlsStream:
    """Shakes hands over `plain`, which is closed when that fails.

    Raises `ConnectionError` when the peer speaks no TLS, or either side does not accept the other's certificate.
    """
    stream = TlsStream(plain, context, listens=listens)
    try:
        await stream.shake_hands()
    except EOFError:
        stream.close()
        raise ConnectionAbortedError(
            f"{plain.peer.address} closed the connection while TLS was being agreed on: has it certificates of our authority?"
        ) from None
    except BaseException:
        stream.close()
        raise
    return stream


def _words(error: ssl.SSLError) -> str:
    verify = getattr(error, "verify_message", "")
    return verify or (error.reason or str(error)).lower().replace("_", " ")

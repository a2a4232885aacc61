"""A `BulkSocket` under TLS: certificates on both sides, at the cost of a copy (Python's TLS sockets have no sendmsg: hazards x6).

The socket never blocks, for the TLS layer holds bytes that the kernel does not show; waiting is by poll, as long as a bulk call may wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import ssl
from collections.abc import Sequence
from typing import Any

import msgspec

from interlock.core.limits import BULK_PATIENCE_SECONDS
from interlock.host.bulk import BulkSocket
from interlock.host.foreign import Iovecs, view_of
from interlock.host.sockets import broken

MOVE_BYTES_MAX = 4 * 1024 * 1024
_WAITS = (ssl.SSLWantReadError, ssl.SSLWantWriteError)


class TlsFiles(msgspec.Struct, frozen=True):
    """Paths in PEM: who we are, and whose signature makes a peer one of ours."""

    certificate: str
    key: str
    authority: str

    def contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """(for who dials, for who listens); both ask for the other's certificate. Raises `OSError`, `ssl.SSLError`."""
        made = []
        for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
            context = ssl.SSLContext(protocol)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False  # the token of the handshake says which peer it is
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.authority)
            context.load_cert_chain(self.certificate, self.key)
            made.append(context)
        return made[0], made[1]


class TlsSocket(BulkSocket):
    """Made from a fresh BulkSocket, whose descriptor it takes over; then `shake_hands` before anything else."""

    def __init__(self, plain: BulkSocket, context: ssl.SSLContext, *, listens: bool) -> None:
        address = plain.peer.address
        wrapped = context.wrap_socket(plain._sock, server_side=listens, do_handshake_on_connect=False)
        super().__init__(wrapped, address)
        self._tls: Any = wrapped

    async def shake_hands(self) -> None:
        await self._on_loop(self._tls.do_handshake)

    async def say(self, data: bytes) -> None:
        """All of `data`, enciphered. Raises `ConnectionError`."""
        rest = memoryview(data)
        while rest:
            rest = rest[await self._on_loop(self._tls.send, rest) :]

    async def hear(self, count: int) -> bytes:
        heard = bytearray()
        while len(heard) < count:
            data = await self._on_loop(self._tls.recv, count - len(heard))
            if not data:
                raise EOFError(f"{self.peer.address}: the peer closed the connection")
            heard += data
        return bytes(heard)

    async def _on_loop(self, call: Any, *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        while True:
            ready = loop.create_future()
            try:
                return call(*arguments)
            except ssl.SSLWantReadError:
                loop.add_reader(self._tls.fileno(), _set, ready)
                try:
                    await ready
                finally:
                    loop.remove_reader(self._tls.fileno())
            except ssl.SSLWantWriteError:
                loop.add_writer(self._tls.fileno(), _set, ready)
                try:
                    await ready
                finally:
                    loop.remove_writer(self._tls.fileno())
            except OSError as error:
                raise broken(error) from error

    def to_threads(self) -> None:
        """It stays as it is."""

    def send(self, data: memoryview, fds: Sequence[int] = ()) -> int:
        if fds:
            raise ValueError("no descriptor goes over TLS")
        try:
            return int(self._tls.send(data[:MOVE_BYTES_MAX]))
        except _WAITS:
            return 0
        except OSError as error:
            raise broken(error) from error

    def receive(self, count: int, fds: list[int], *, patient: bool = False) -> bytes | None:
        try:
            data: bytes = self._tls.recv(count)
        except _WAITS:
            return self.receive(count, fds) if patient and self._wait(select.POLLIN) else None
        except OSError as error:
            raise broken(error) from error
        if not data:
            raise EOFError(f"{self.peer.address}: the peer closed the connection")
        return data

    def send_pieces(self, pieces: Iovecs, *, patient: bool) -> int:
        return self._shift(pieces, self._tls.send, select.POLLOUT, patient)

    def receive_pieces(self, pieces: Iovecs, *, patient: bool) -> int:
        got = self._shift(pieces, self._tls.recv_into, select.POLLIN, patient)
        if got < 0:
            raise EOFError(f"{self.peer.address}: the peer closed the connection")
        return got

    def _shift(self, pieces: Iovecs, call: Any, event: int, patient: bool) -> int:
        """Bytes moved; -1 at the end of the stream."""
        moved = 0
        for address, length in pieces.tolist():
            view, at = view_of(address, length), 0
            while at < length:
                try:
                    count = call(view[at:])
                except _WAITS:
                    if moved or not patient or not self._wait(event):
                        return moved
                    continue
                except OSError as error:
                    raise broken(error) from error
                if not count:
                    return moved or -1
                at, moved = at + count, moved + count
            if moved >= MOVE_BYTES_MAX:
                break
        return moved

    def _wait(self, event: int) -> bool:
        poll = select.poll()
        poll.register(self._tls.fileno(), event)
        return bool(poll.poll(int(BULK_PATIENCE_SECONDS * 1000)))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)

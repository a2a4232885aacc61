"""The TCP lane: reaches any host, needs nothing but sockets. Plain by default on trusted networks, TLS with certificates by option.

Scatter lists go straight between segment and socket, 1,024 pieces a call. Under TLS each byte is copied once more and encrypted; what
that costs on this machine stands in docs/transfer.md.
"""

from __future__ import annotations

from typing import Any

import msgspec

from interlock.core.errors import RemoteProtocolError
from interlock.host.bulk import BulkListener, BulkSocket, dial_bulk, listen_bulk
from interlock.host.bulk_tls import TlsFiles, TlsSocket
from interlock.transfer.lanes.base import LaneUnusable
from interlock.transfer.lanes.sockets import SocketKind


class TcpOffer(msgspec.Struct, frozen=True, array_like=True):
    """Where an owner listens, and the secret that a peer has to know."""

    host: str
    port: int
    secret: bytes
    tls: bool = False


_offers = msgspec.msgpack.Decoder(TcpOffer)


class TcpKind(SocketKind):
    """`host`: what it listens on; `reachable`: what peers dial, if that is another name of it."""

    kind = "tcp"
    rank = 2

    def __init__(
        self,
        *arguments: Any,
        host: str = "127.0.0.1",
        reachable: str = "",
        port: int = 0,
        tls: TlsFiles | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._host, self._port = host, port
        self._reachable = reachable or host
        self._port_got = port
        self._tls = tls.contexts() if tls else None

    def listen(self) -> BulkListener:
        listener = listen_bulk(f"tcp:{self._host}:{self._port}")
        self._port_got = listener.port
        return listener

    def parameters(self, secret: bytes) -> bytes:
        return msgspec.msgpack.encode(
            TcpOffer(self._reachable, self._port_got, secret, self._tls is not None)
        )

    async def reach(self, parameters: bytes) -> tuple[BulkSocket, bytes]:
        try:
            offer = _offers.decode(parameters)
        except (msgspec.MsgspecError, ValueError) as error:
            raise RemoteProtocolError(f"the peer's offer of a TCP lane is none: {error}") from error
        if offer.tls != (self._tls is not None):
            who = "the peer wants TLS, we" if offer.tls else "we want TLS, the peer"
            raise LaneUnusable(f"{who} have no certificates", hint="give both sides `tls` or neither")
        sock = await dial_bulk(f"tcp:{offer.host}:{offer.port}")
        return await self._wrapped(sock, listens=False), offer.secret

    async def received(self, sock: BulkSocket) -> BulkSocket:
        return await self._wrapped(sock, listens=True)

    async def _wrapped(self, sock: BulkSocket, *, listens: bool) -> BulkSocket:
        if self._tls is None:
            return sock
        wrapped = TlsSocket(sock, self._tls[1 if listens else 0], listens=listens)
        try:
            await wrapped.shake_hands()
        except BaseException:
            wrapped.close()
            raise
        return wrapped

"""Opening and serving channels: connections greeted in bounded time, by authenticated peers in their current life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from interlock.core.errors import (
    ChannelClosed,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    StaleError,
)
from interlock.core.limits import HELLO_BYTES_MAX, HELLO_SECONDS_MAX
from interlock.host.base import Host, Listener, Stream
from interlock.wire.conversation import Conversation
from interlock.wire.duplex import Channel, Received
from interlock.wire.envelope import Envelope, Rejected
from interlock.wire.framing import HEADER_BYTES, decode_envelope, encode_frame, frame_length
from interlock.wire.hello import check_token, check_user, hello_frame, judge_hello, read_answer, read_hello
from interlock.wire.identity import Identity, KnownPeers

__all__ = ["Channel", "Received", "Secure", "connect_channel", "serve_channels"]

Secure = Callable[[Stream], Awaitable[Stream]]
"""Puts a fresh stream under encryption (host/stream_tls). Closes it, and raises `ConnectionError`, where that fails."""

RAISES_MAX = 8
"""How often one connect raises its incarnation: more means that lives of this name start faster than we connect."""
_log = logging.getLogger(__name__)


async def connect_channel(
    host: Host,
    address: str,
    *,
    me: Identity,
    role: str,
    accept: Any,
    deadline_s: float,
    token: bytes = b"",
    known: KnownPeers | None = None,
    leased: bool = True,
    secure: Secure | None = None,
) -> Channel:
    """A channel to whoever serves `address`, greeted within `deadline_s` seconds from now.

    `leased`: it ends when the peer answers no heartbeat for SILENCE_SECONDS_MAX; without, only by what the machine says, for
    peers whose exit is seen and whose silence is judged elsewhere.

    `accept` is the union of bodies that this side understands; `known`, where given, refuses servers of an old life.
    Raises `ConnectionError` (nobody there, or it does not know us), `TimeoutError`, `StaleError` when this life is over,
    `RemoteProtocolError` when we were refused for another reason, `LocalProtocolError` for TCP without a token.
    """
    check_token(address, token)
    try:
        async with asyncio.timeout(deadline_s):
            for _ in range(RAISES_MAX):
                stream = await host.connect(address)
                if secure is not None:
                    stream = await secure(stream)
                try:
                    peer = await _greet(stream, address, me, role, token)
                    if peer is not None:
                        _refuse_old(peer, known)
                        return Channel(host, stream, Conversation(me, peer, accept, known), "", leased=leased)
                except BaseException:
                    stream.close()
                    raise
                stream.close()
    except TimeoutError:
        raise TimeoutError(f"{address} did not answer {me.name}'s Hello within {deadline_s} s") from None
    raise LocalProtocolError(
        f"{me} was refused as an old life {RAISES_MAX} times", hint="is a twin of it running?"
    )


async def _greet(stream: Stream, address: str, me: Identity, role: str, token: bytes) -> Identity | None:
    check_user(stream.peer)
    await stream.send(hello_frame(me, role, token))
    try:
        envelope = await _receive(stream)
    except EOFError:
        raise ChannelClosed(
            f"{address} closed the connection unanswered", hint="is it our token and user?"
        ) from None
    return read_answer(envelope, address, me)


def _refuse_old(peer: Identity, known: KnownPeers | None) -> None:
    if known is not None and (refusal := known.admit(peer.name, peer.incarnation, b"", None)):
        raise StaleError(f"{peer} is an old life: {refusal.reason}", highest=refusal.highest)


async def _receive(stream: Stream) -> Envelope:
    length = frame_length(await stream.receive_exactly(HEADER_BYTES), HELLO_BYTES_MAX)
    return decode_envelope(await stream.receive_exactly(length))


async def serve_channels(
    host: Host,
    address: str,
    *,
    me: Identity,
    accept: Any,
    on_channel: Callable[[Channel], Awaitable[None]],
    token: bytes = b"",
    known: KnownPeers | None = None,
    secure: Secure | None = None,
) -> Listener:
    """Runs `on_channel` for each peer that was greeted; the channel is closed when it returns.

    `known` may be shared between listeners of one process, else each listener remembers its peers' lives by itself.
    Raises `LocalProtocolError` for TCP without a token, `OSError` when the address cannot be had.
    """
    check_token(address, token)
    known = known if known is not None else KnownPeers()
    service = _Service(host, me, accept, on_channel, token, known, secure)
    return await host.listen(address, service.serve)


class _Service:
    def __init__(
        self,
        host: Host,
        me: Identity,
        accept: Any,
        on_channel: Callable[[Channel], Awaitable[None]],
        token: bytes,
        known: KnownPeers,
        secure: Secure | None,
    ) -> None:
        self._host, self._me, self._accept, self._on_channel = host, me, accept, on_channel
        self._token, self._known, self._secure = token, known, secure

    async def serve(self, stream: Stream) -> None:
        channel = await self._admit(stream)
        if channel is None:
            return
        try:
            await self._on_channel(channel)
        except (ChannelClosed, ProtocolError, StaleError) as error:
            _log.warning("the channel to %s ended: %s", channel.peer, error)
        finally:
            await channel.close()

    async def _admit(self, stream: Stream) -> Channel | None:
        try:
            async with asyncio.timeout(HELLO_SECONDS_MAX):
                check_user(stream.peer)
                if self._secure is not None:
                    stream = await self._secure(stream)
                return await self._greet(stream)
        except TimeoutError:
            _log.warning(
                "%s: no Hello within %s s; the connection was closed", stream.peer.address, HELLO_SECONDS_MAX
            )
        except (EOFError, ConnectionError) as error:
            _log.info("%s: the connection ended before its Hello: %s", stream.peer.address, error)
        except RemoteProtocolError as error:
            _log.warning("a connection was closed: %s", error)
        return None

    async def _greet(self, stream: Stream) -> Channel | None:
        envelope = await _receive(stream)
        hello = read_hello(envelope, stream.peer, self._token)
        answer = judge_hello(envelope, hello, stream.peer, self._known)
        await stream.send(encode_frame(self._me.name, self._me.incarnation, 1, 1, answer))
        if isinstance(answer, Rejected):
            _log.warning("%s@%d was refused: %s", envelope.sender, envelope.incarnation, answer.reason)
            return None
        self._me.mark_accepted()
        peer = Identity(envelope.sender, envelope.incarnation)
        return Channel(
            self._host, stream, Conversation(self._me, peer, self._accept, self._known), hello.role
        )

"""The greeting of a channel, as pure judgements shared by the asynchronous and the blocking one.

Whoever connects says Hello: protocol, role, attempt, and a token where the kernel cannot vouch for it. It is answered
Welcome or Rejected. Unauthenticated peers get no answer at all: on Unix sockets those of another user, on TCP those
without the token.
"""

from __future__ import annotations

import hmac
import os

from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.limits import NAME_CHARS_MAX
from interlock.host.base import Peer
from interlock.wire.envelope import PROTOCOL_VERSION, Envelope, Hello, Rejected, Welcome
from interlock.wire.framing import HELLO_BODIES, WELCOME_BODIES, InvalidBody, encode_frame
from interlock.wire.identity import Identity, KnownPeers


def check_token(address: str, token: bytes) -> None:
    """Raises `LocalProtocolError` for a TCP address without a token: nobody may listen or connect there unauthenticated."""
    if address.startswith("tcp:") and not token:
        raise LocalProtocolError(
            f"{address} needs a token", hint="on one machine use a unix: address instead"
        )


def check_user(peer: Peer) -> None:
    """Raises `RemoteProtocolError` when a Unix socket's peer is not of our user. TCP peers show a token instead."""
    if peer.address.startswith("unix:") and peer.uid != os.getuid():
        raise RemoteProtocolError(
            f"{peer.address}: process {peer.pid} of user {peer.uid} connected, only user {os.getuid()} may"
        )


def hello_frame(me: Identity, role: str, token: bytes) -> bytes:
    """The first frame of a connection, whole: what whoever dials sends before anything else."""
    hello = Hello(PROTOCOL_VERSION, role, me.next_attempt(), token, me.life)
    return encode_frame(me.name, me.incarnation, 1, 0, hello)


def read_hello(envelope: Envelope, peer: Peer, token: bytes) -> Hello:
    """Raises `RemoteProtocolError` when the peer gets no answer: no Hello, or a wrong token."""
    try:
        hello = HELLO_BODIES.decode(envelope.body)
    except InvalidBody as error:
        raise RemoteProtocolError(f"{peer.address}: the first message was no Hello: {error}") from error
    assert isinstance(hello, Hello)
    if peer.address.startswith("tcp:") and not hmac.compare_digest(hello.token, token):
        raise RemoteProtocolError(f"{peer.address}: the peer's token is wrong")
    if envelope.number != 1 or envelope.answers != 0 or len(hello.role) > NAME_CHARS_MAX:
        raise RemoteProtocolError(f"{peer.address}: the first message was no sound Hello")
    return hello


def judge_hello(envelope: Envelope, hello: Hello, peer: Peer, known: KnownPeers) -> Welcome | Rejected:
    """What to answer a Hello that came with the right token: the welcome, or why this life gets none."""
    if hello.protocol != PROTOCOL_VERSION:
        return Rejected(
            f"protocol {hello.protocol} was offered, {PROTOCOL_VERSION} is spoken here; run the same version"
        )
    refusal = known.admit(envelope.sender, envelope.incarnation, hello.life, peer.pid)
    return refusal or Welcome(PROTOCOL_VERSION)


def read_answer(envelope: Envelope, address: str, me: Identity) -> Identity | None:
    """Who welcomed us; None: refused as an old life, and `me` was raised above the newer one, so try again.

    Raises `StaleError` when this life is over, `RemoteProtocolError` for any other refusal.
    """
    try:
        answer = WELCOME_BODIES.decode(envelope.body)
    except InvalidBody as error:
        raise RemoteProtocolError(f"{address}: the answer to our Hello is none: {error}") from error
    if isinstance(answer, Rejected):
        if answer.highest > 0:
            me.raise_above(answer.highest, by=envelope.sender)
            return None
        raise RemoteProtocolError(f"{address} refused us: {answer.reason}", peer=envelope.sender)
    if answer.protocol != PROTOCOL_VERSION or envelope.number != 1 or envelope.answers != 1:
        raise RemoteProtocolError(
            f"{address} speaks protocol {answer.protocol}, we speak {PROTOCOL_VERSION}; run the same version"
        )
    me.mark_accepted()
    return Identity(envelope.sender, envelope.incarnation)

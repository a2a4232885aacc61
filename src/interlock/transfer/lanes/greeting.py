"""The first words on a connection of a lane, which admit it: who dials whom, in which attempts, proven by a token of the handshake.

The token came with the offer, over the authenticated control channel, and is that of one peer in one life. It never crosses the
connection: the hello carries a MAC under it over everything the hello says, both stamps included, so that it opens nothing else,
and each (lane, role, number) of a pairing is admitted once, so that a hello that is overheard opens nothing at all.

    dialler   -> Hello                      listener  -> Welcome, or why not ("again": the pairing is not known here yet)
    dialler   -> one byte: I hold it        (then the dialler's end is ready; the listener's when it hears the byte)
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec

from interlock.core.endpoint_state import Lane as LaneName
from interlock.core.endpoint_state import Stamp
from interlock.core.errors import RemoteProtocolError
from interlock.core.limits import LANE_HELLO_BYTES_MAX
from interlock.host.bulk import BulkSocket

DIALLER_READS, LISTENER_READS = "dialler reads", "listener reads"
CONFIRM = b"\x01"
_LENGTH_BYTES = 2
MAC_BYTES = 32


class LaneHello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a lane's connection says first: whose it is, and which pairing it belongs to."""

    kind: str
    sender: str
    receiver: str
    mine: Stamp
    theirs: Stamp
    role: str
    number: int
    mac: bytes = b""

    @property
    def lane(self) -> LaneName:
        return LaneName(self.kind, self.sender)

    def signed(self, secret: bytes) -> LaneHello:
        return msgspec.structs.replace(self, mac=self._mac(secret))

    def is_signed(self, secret: bytes) -> bool:
        return hmac.compare_digest(self.mac, self._mac(secret))

    def _mac(self, secret: bytes) -> bytes:
        said = msgspec.msgpack.encode(msgspec.structs.replace(self, mac=b""))
        return hashlib.blake2b(said, key=secret, digest_size=MAC_BYTES, person=b"interlock-lane").digest()


class LaneWelcome(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Whether it may come in, and why not."""

    refusal: str = ""
    again: bool = False


_hellos = msgspec.msgpack.Decoder(LaneHello)
_welcomes = msgspec.msgpack.Decoder(LaneWelcome)


async def _say(sock: BulkSocket, body: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(body)
    await sock.say(len(data).to_bytes(_LENGTH_BYTES, "big") + data)


async def _hear(sock: BulkSocket) -> bytes:
    length = int.from_bytes(await sock.hear(_LENGTH_BYTES), "big")
    if not 0 < length <= LANE_HELLO_BYTES_MAX:
        raise RemoteProtocolError(
            f"{sock.peer.address} announced {length} bytes where a greeting of {LANE_HELLO_BYTES_MAX} is allowed"
        )
    return await sock.hear(length)


async def hear_hello(sock: BulkSocket) -> LaneHello:
    """Raises `RemoteProtocolError`, `EOFError`, `ConnectionError`; bounded by the caller."""
    try:
        return _hellos.decode(await _hear(sock))
    except (msgspec.MsgspecError, ValueError) as error:
        raise RemoteProtocolError(f"{sock.peer.address} sent no greeting of a lane: {error}") from error


async def answer(sock: BulkSocket, welcome: LaneWelcome) -> None:
    """The listener's answer; after a welcome it waits for the dialler's byte."""
    await _say(sock, welcome)
    if not welcome.refusal and await sock.hear(1) != CONFIRM:
        raise RemoteProtocolError(f"{sock.peer.address} did not confirm the lane")


async def greet(sock: BulkSocket, hello: LaneHello) -> LaneWelcome:
    """The dialler's side; the connection is confirmed unless the welcome says why not."""
    await _say(sock, hello)
    try:
        welcome = _welcomes.decode(await _hear(sock))
    except (msgspec.MsgspecError, ValueError) as error:
        raise RemoteProtocolError(
            f"{sock.peer.address} answered the greeting of a lane with none: {error}"
        ) from error
    if not welcome.refusal:
        await sock.say(CONFIRM)
    return welcome

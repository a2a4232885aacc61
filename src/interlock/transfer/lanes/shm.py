"""The shared-memory lane: readers on the owner's machine copy by themselves, once, straight to where the bytes are wanted.

Three ways, the best that a segment allows:
* *mapped*: the segment lies in sealed shared memory (a slab); its owner hands a read-only descriptor over a Unix socket.
* *process_vm_readv*: the segment is ordinary memory, and the kernel lets us read that process (same user, no ptrace restriction). Probed
  once, on a number that the owner said; the reason is kept for `explain`.
* *socket*: neither; the bytes go over the lane's Unix socket, as on TCP.

Nobody asks the owner for each piece here, so its checks stand in the mapping: bounds and life are checked when it is made and before each
copy, revocation on the owner's board before and after (see transfer/segments). No writable mapping is ever given.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from interlock.core.endpoint_state import Lane as LaneName
from interlock.core.errors import RemoteProtocolError
from interlock.host.base import Host, SharedMemory
from interlock.host.bulk import BulkListener, BulkSocket, dial_bulk, listen_bulk
from interlock.host.foreign import address_of
from interlock.transfer.lanes.base import LaneUnusable, Pairing
from interlock.transfer.lanes.shm_copy import MAPPED, PROCESS
from interlock.transfer.lanes.shm_lane import (
    BOARD,
    BOARD_BYTES,
    ShmLane,
    ShmMapping,
)
from interlock.transfer.lanes.sockets import SocketKind

NONCE_BYTES = 16


class ShmOffer(msgspec.Struct, frozen=True, array_like=True):
    """What an owner says so that a peer can tell whether it is on the same machine, and where to ask."""

    boot: str
    path: str
    secret: bytes


_offers = msgspec.msgpack.Decoder(ShmOffer)


class ShmKind(SocketKind):
    """Lanes between processes of one machine: a mapped segment, else `process_vm_readv` where it is permitted."""

    kind = "shm"
    rank = 0

    def __init__(
        self,
        *arguments: Any,
        host: Host,
        directory: Path,
        maps: bool = True,
        reads_processes: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._host, self._directory = host, directory
        self._maps, self._reads_processes = maps, reads_processes
        self._path = directory / f"shm-{os.urandom(6).hex()}.sock"
        boot = host.files.read(Path("/proc/sys/kernel/random/boot_id"), 64)
        self._boot = boot.decode().strip() if boot else ""
        self._board: SharedMemory = host.create_memory("interlock-board", BOARD_BYTES)
        self._nonce = bytearray(os.urandom(NONCE_BYTES))
        self._nonce_address = address_of(memoryview(self._nonce))
        self._segments.show_on(self._board.view.cast("Q"))

    def listen(self) -> BulkListener:
        self._host.files.make_private_dir(self._directory)
        return listen_bulk(f"unix:{self._path}")

    def parameters(self, secret: bytes) -> bytes:
        return msgspec.msgpack.encode(ShmOffer(self._boot, str(self._path), secret))

    async def reach(self, parameters: bytes) -> tuple[BulkSocket, bytes]:
        try:
            offer = _offers.decode(parameters)
        except (msgspec.MsgspecError, ValueError) as error:
            raise RemoteProtocolError(f"the peer's offer of shared memory is none: {error}") from error
        if offer.boot != self._boot:
            raise LaneUnusable("the peer is on another machine")
        if not offer.path.startswith("/"):
            raise RemoteProtocolError("the peer's offer of shared memory names no path")
        try:
            sock = await dial_bulk(f"unix:{offer.path}")
        except ConnectionError as error:
            raise LaneUnusable(f"the peer's socket is not seen from here: {error}") from error
        _check_user(sock)
        return sock, offer.secret

    async def received(self, sock: BulkSocket) -> BulkSocket:
        _check_user(sock)
        return sock

    def make_lane(
        self,
        name: LaneName,
        pairing: Pairing,
        broken: Callable[[str], None],
        dial: Callable[[str, int], Awaitable[BulkSocket]] | None,
    ) -> ShmLane:
        return ShmLane(
            name,
            pairing,
            self._pool,
            self._segments,
            broken,
            mapper=self._map,
            dial=dial,
            reads_processes=self._reads_processes,
        )

    def _map(self, number: int, incarnation: int) -> tuple[bytes, int | None]:
        """What a reader must know of a segment. On a thread that serves it. Raises `PieceRefused`."""
        if number == BOARD:
            board = ShmMapping(MAPPED, BOARD_BYTES, self._nonce_address, nonce=bytes(self._nonce))
            return msgspec.msgpack.encode(board), self._board.open_read_only()
        memory = self._segments.named(number, incarnation).memory
        if memory.shared is not None and self._maps:
            fd = memory.shared.open_read_only()
            whole = memory.shared.size_bytes
            offset = memory.address - address_of(memory.shared.view)
            mapping = ShmMapping(MAPPED, memory.size_bytes, whole, offset)
            return msgspec.msgpack.encode(mapping), fd
        return msgspec.msgpack.encode(ShmMapping(PROCESS, memory.size_bytes, memory.address)), None

    async def close(self) -> None:
        await super().close()
        self._board.close()


def _check_user(sock: BulkSocket) -> None:
    if sock.peer.uid != os.getuid():
        raise LaneUnusable(f"the process at the other end is of user {sock.peer.uid}, not of ours")

"""Sockets for bulk bytes: scatter lists of up to 1,024 pieces a call, on threads, and their greeting on the loop.

While two sides greet each other the socket is the loop's; then it belongs to threads (`host/bulk_pool`), which block in the kernel for
BULK_PATIENCE_SECONDS at most: so no peer holds a thread. It is ended by `shutdown`, which wakes whoever is in a call (a mere
close would not, and would hand the number to another file: hazards x6), and closed only when nobody is.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from interlock.core.limits import BULK_PATIENCE_SECONDS, PIECES_PER_CALL_MAX
from interlock.host.base import Peer, Watch
from interlock.host.foreign import Iovecs
from interlock.host.sockets import (
    BACKLOG,
    broken,
    connect_unix,
    describe_peer,
    listen_unix,
    parse_address,
    peer_pidfd,
    transmit,
)
from interlock.host.watch import ProcessWatch

BUFFER_BYTES = 4 * 1024 * 1024
"""Asked of the kernel for each direction; it grants what it allows."""
USER_TIMEOUT_MS = 5000
"""TCP_USER_TIMEOUT: sent and not acknowledged for so long means broken."""
_libc = ctypes.CDLL(None, use_errno=True)


class _Message(ctypes.Structure):
    """struct msghdr."""

    _fields_ = [
        ("name", ctypes.c_void_p),
        ("name_bytes", ctypes.c_uint),
        ("pieces", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_bytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


for _call in (_libc.sendmsg, _libc.recvmsg):
    _call.argtypes = [ctypes.c_int, ctypes.POINTER(_Message), ctypes.c_int]
    _call.restype = ctypes.c_ssize_t
_WAIT_ALL = socket.MSG_WAITALL
_NO_SIGNAL = socket.MSG_NOSIGNAL
_NOW = socket.MSG_DONTWAIT
_AGAIN = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR)


class BulkSocket:
    """One connected socket. Calls take turns: its user sees to that, and closes it only in such a turn."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self._sock = sock
        self.peer: Peer = describe_peer(sock, address)
        sock.setblocking(False)
        self.is_unix = sock.family == socket.AF_UNIX
        if not self.is_unix:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        self._message = _Message()
        self._at = ctypes.byref(self._message)

    def fileno(self) -> int:
        """For `BulkPool.add`; -1 after `close`."""
        return self._sock.fileno()

    # --- on the loop: the greeting ---------------------------------------------------------------------------------

    async def say(self, data: bytes) -> None:
        """All of `data`. Raises `ConnectionError`."""
        try:
            await asyncio.get_running_loop().sock_sendall(self._sock, data)
        except OSError as error:
            raise broken(error) from error

    async def hear(self, count: int) -> bytes:
        """Exactly `count` bytes, and none beyond. Raises `EOFError`, `ConnectionError`."""
        heard = bytearray()
        loop = asyncio.get_running_loop()
        while len(heard) < count:
            try:
                data = await loop.sock_recv(self._sock, count - len(heard))
            except OSError as error:
                raise broken(error) from error
            if not data:
                raise EOFError(f"{self.peer.address}: the peer closed the connection")
            heard += data
        return bytes(heard)

    def to_threads(self) -> None:
        """From here on the socket is used by threads, not by the loop."""
        patience = struct.pack("ll", 0, int(BULK_PATIENCE_SECONDS * 1e6))
        self._sock.setblocking(True)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)

    # --- on threads ------------------------------------------------------------------------------------------------

    def send(self, data: memoryview, fds: Sequence[int] = ()) -> int:
        """How many bytes left without waiting; 0 when none could. Raises `ConnectionError`."""
        try:
            if fds:
                return transmit(self._sock, data, fds)
            return self._sock.send(data, _NOW | _NO_SIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise broken(error) from error

    def receive(self, count: int, fds: list[int], *, patient: bool = False) -> bytes | None:
        """Up to `count` bytes; None when there are none yet (waiting a little where patient). Raises `EOFError`, `ConnectionError`."""
        flags = 0 if patient else _NOW
        try:
            if self.is_unix:
                data, ancillary, _, _ = self._sock.recvmsg(
                    count, socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC | flags
                )
                for level, kind, payload in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        fds.extend(struct.unpack(f"{len(payload) // 4}i", payload))
            else:
                data = self._sock.recv(count, flags)
        except BlockingIOError:
            return None
        except OSError as error:
            raise broken(error) from error
        if not data:
            raise EOFError(f"{self.peer.address}: the peer closed the connection")
        return data

    def send_pieces(self, pieces: Iovecs, *, patient: bool) -> int:
        """Bytes of the first 1,024 pieces that the kernel took; 0 when it took none (waiting a little where patient)."""
        got = self._move(_libc.sendmsg, pieces, _NO_SIGNAL | (0 if patient else _NOW))
        return max(0, got)

    def receive_pieces(self, pieces: Iovecs, *, patient: bool) -> int:
        """Bytes received into the first 1,024 pieces; 0 when none came. Raises `EOFError`, `ConnectionError`."""
        got = self._move(_libc.recvmsg, pieces, _WAIT_ALL if patient else _NOW)
        if got == 0:
            raise EOFError(f"{self.peer.address}: the peer closed the connection")
        return max(0, got)

    def _move(self, call: Any, pieces: Iovecs, flags: int) -> int:
        count = min(len(pieces), PIECES_PER_CALL_MAX)
        assert pieces.flags.c_contiguous
        assert pieces.dtype == np.uint64
        self._message.pieces, self._message.count = pieces.ctypes.data, count
        moved: int = call(self._sock.fileno(), self._at, flags)
        if moved >= 0:
            return moved
        error = ctypes.get_errno()
        if error in _AGAIN:
            return -1
        raise broken(OSError(error, os.strerror(error)))

    # --- ending ----------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """From any thread: whoever is in a call, and the peer, learn that it is over. Idempotent."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def watch_peer(self) -> Watch | None:
        """Proof of exit of the process at the other end; None where it has no pid here."""
        known = peer_pidfd(self._sock, self.peer.pid)
        return ProcessWatch(*known) if known else None


class BulkListener:
    """Listens; each connection is handed to `accepted` on the loop, which owns it and must not wait."""

    def __init__(self, sock: socket.socket, address: str, path: str | None) -> None:
        self._sock, self.address, self._path = sock, address, path
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The TCP port; 0 for a Unix socket."""
        return 0 if self._path else int(self._sock.getsockname()[1])

    async def accept(self) -> BulkSocket:
        """The next connection. Raises `OSError` when there can be none now (out of descriptors)."""
        sock, where = await asyncio.get_running_loop().sock_accept(self._sock)
        return BulkSocket(sock, self.address if self._path else f"tcp:{where[0]}:{where[1]}")

    def close(self) -> None:
        self._sock.close()
        if self._path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)


def listen_bulk(address: str) -> BulkListener:
    """Raises `OSError` when the address cannot be had. Names are not resolved: a numeric host is."""
    kind, name, port = parse_address(address)
    if kind == "unix":
        return BulkListener(listen_unix(name), address, name)
    sock = socket.socket(socket.AF_INET6 if ":" in name else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((name, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return BulkListener(sock, f"tcp:{name}:{sock.getsockname()[1]}", None)


async def dial_bulk(address: str) -> BulkSocket:
    """Raises `ConnectionError`; bounded by the caller's `asyncio.timeout`."""
    kind, name, port = parse_address(address)
    sock = socket.socket(
        socket.AF_UNIX if kind == "unix" else socket.AF_INET6 if ":" in name else socket.AF_INET,
        socket.SOCK_STREAM,
    )
    try:
        sock.setblocking(False)
        if kind == "unix":
            connect_unix(sock, name)
        else:
            await asyncio.get_running_loop().sock_connect(sock, (name, port))
        return BulkSocket(sock, address)
    except OSError as error:
        sock.close()
        raise ConnectionRefusedError(f"{address}: cannot be reached: {error}") from error
    except BaseException:
        sock.close()
        raise

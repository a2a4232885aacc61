"""Sockets as the kernel has them: addresses, peers, descriptors. Nothing here waits; `streams` and `blocking` do."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence

from interlock.core.limits import FDS_PER_MESSAGE_MAX, FDS_WAITING_MAX
from interlock.host.base import Peer

RECEIVE_BYTES = 64 * 1024
UNIX_PATH_BYTES_MAX = 107
SO_PEERPIDFD = 77
"""Linux 6.5; Python 3.11 has no name for it."""
BACKLOG = 1024
_ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_PER_MESSAGE_MAX * 4)


def parse_address(address: str) -> tuple[str, str, int]:
    """("unix", path, 0) or ("tcp", host, port). Raises `ValueError` in words."""
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest.startswith("/"):
        return kind, rest, 0
    name, _, port = rest.rpartition(":")
    if kind == "tcp" and name and port.isdecimal() and int(port) < 65536:
        return kind, name.strip("[]"), int(port)
    raise ValueError(f"{address!r} is no address: write unix:/path or tcp:host:port")


@contextlib.contextmanager
def short_path(path: str) -> Iterator[str]:
    """A name of `path` that fits into a socket address: run directories may lie deeper than the 107 bytes it holds."""
    if len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def connect_unix(sock: socket.socket, path: str) -> None:
    """Raises `ConnectionError` in words. Unix sockets connect at once or not at all, so this never waits."""
    try:
        with short_path(path) as name:
            sock.connect(name)
    except BlockingIOError:
        raise ConnectionRefusedError(f"{path}: its queue of connections is full; try again") from None
    except FileNotFoundError:
        raise ConnectionRefusedError(f"{path}: nobody listens there (no such socket)") from None
    except ConnectionRefusedError:
        raise ConnectionRefusedError(f"{path}: nobody listens there any more") from None


def describe_peer(sock: socket.socket, address: str) -> Peer:
    """Who connected, by SO_PEERCRED over Unix sockets; over TCP the address alone."""
    if sock.family != socket.AF_UNIX:
        return Peer(address)
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return Peer(address, pid, uid)


def peer_pidfd(sock: socket.socket, pid: int | None) -> tuple[int, int | None] | None:
    """(pid, pidfd) of the process at the other end, pidfd None when it is gone already; None where it has no pid here."""
    if sock.family != socket.AF_UNIX or not pid:
        return None
    try:
        return pid, sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except ProcessLookupError:
        return pid, None
    except OSError:  # ENOPROTOOPT before Linux 6.5; a message of the peer must confirm it (DESIGN §5)
        pass
    try:
        return pid, os.pidfd_open(pid)
    except ProcessLookupError:
        return pid, None


def receive(sock: socket.socket, count: int, fds: list[int]) -> bytes:
    """One recvmsg; descriptors that came along are appended to `fds`. Raises as the socket does."""
    if sock.family != socket.AF_UNIX:
        return sock.recv(count)
    data, ancillary, flags, _ = sock.recvmsg(count, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
            fds.extend(numbers)
    if flags & socket.MSG_CTRUNC or len(fds) > FDS_WAITING_MAX:
        raise ConnectionAbortedError(
            f"the peer sent more descriptors than {FDS_WAITING_MAX} that nobody took"
        )
    return data


def transmit(sock: socket.socket, data: memoryview, fds: Sequence[int]) -> int:
    """One sendmsg; how many bytes the kernel took. Raises as the socket does."""
    if not fds:
        return sock.send(data)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    return sock.sendmsg([data], [rights])


def broken(error: OSError) -> ConnectionError:
    """The same failure as a `ConnectionError`, which is what callers of a stream expect."""
    return error if isinstance(error, ConnectionError) else ConnectionResetError(str(error))


def listen_unix(path: str) -> socket.socket:
    """Mode 0600 from its first moment on (bind takes the descriptor's mode); a dead predecessor's file is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)
        if os.path.exists(path):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                try:
                    connect_unix(probe, path)
                except ConnectionRefusedError:
                    os.unlink(path)
                else:
                    raise FileExistsError(
                        f"{path}: another process listens there; stop it or use another directory"
                    )
        try:
            with short_path(path) as name:
                sock.bind(name)
        except OSError as error:  # the kernel does not say which
            raise OSError(error.errno, error.strerror, path) from error
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago; only for tests and demonstrations, for another may take it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])

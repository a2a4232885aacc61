"""TCP ports for servers that are not ours (uvicorn): bound before anything else starts, so that a busy port is known at once."""

from __future__ import annotations

import errno
import os
import socket

from interlock.core.limits import HTTP_SEND_SECONDS_MAX


def bind_port(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Port 0: a free one, see `port_of`. Raises `OSError` as a sentence."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise OSError(
            error.errno, f"{host} is no address of this machine: {error.strerror}; name another host"
        ) from error
    sock = socket.socket(family, kind, protocol)
    try:
        # Connections of an earlier life may linger in TIME_WAIT; a live listener still makes bind fail.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, _why(host, port, error)) from error
    return _prepared(sock)


def adopt_port(fd: int) -> socket.socket:
    """A socket that was bound by our parent. Raises `OSError` when `fd` is no socket."""
    sock = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    return _prepared(sock)


def _prepared(sock: socket.socket) -> socket.socket:
    """Accepted connections inherit the time-out: one whose peer takes nothing is ended by the kernel. A server that closes
    it in vain would keep it, and what it buffers, for as long as the peer likes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(HTTP_SEND_SECONDS_MAX * 1000))
    sock.setblocking(False)
    return sock


def port_of(sock: socket.socket) -> int:
    """The port that a bound TCP socket has, also where 0 was asked for."""
    return int(sock.getsockname()[1])


def _why(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; stop what listens there or choose another with --port"
    if error.errno == errno.EACCES:
        return (
            f"port {port} needs privileges that this process does not have; choose one above 1023 with --port"
        )
    return f"{host}:{port} cannot be listened on: {error.strerror}; choose another with --host and --port"

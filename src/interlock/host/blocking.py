"""The synchronous twin of the host, for code that a foreign engine calls on its own threads: every wait has a deadline.

Deadlines are seconds on the monotonic clock (`monotonic_s() + timeout`), so that one budget can cover many calls.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence

from interlock.host.base import Peer
from interlock.host.files import RealFiles
from interlock.host.memory import MappedMemory, map_memory
from interlock.host.real import RealClock
from interlock.host.sockets import (
    RECEIVE_BYTES,
    broken,
    connect_unix,
    describe_peer,
    parse_address,
    peer_pidfd,
    receive,
    transmit,
)
from interlock.host.watch import ProcessWatch

__all__ = [
    "BlockingHost",
    "BlockingStream",
    "MappedMemory",
    "connect_blocking",
    "map_memory",
    "monotonic_s",
    "run_command",
    "sleep_s",
    "wall_ns",
    "watch_process",
]

monotonic_s = time.monotonic
wall_ns = time.time_ns
sleep_s = time.sleep


class BlockingHost:
    """The part of a host that never waits: clock and files. Enough for an identity (`wire.identity.load_identity`)."""

    def __init__(self) -> None:
        self.clock = RealClock()
        self.files = RealFiles()


class BlockingStream:
    """One connected byte stream for one thread at a time."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._peer = describe_peer(sock, address)
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._input, self._output = select.poll(), select.poll()
        self._input.register(sock, select.POLLIN)
        self._output.register(sock, select.POLLOUT)
        self._closed = False
        self._used = threading.Lock()

    @property
    def peer(self) -> Peer:
        return self._peer

    @property
    def buffered_bytes(self) -> int:
        """Bytes received and not taken yet."""
        return len(self._buffer)

    def send(self, data: bytes | bytearray | memoryview, deadline_s: float, fds: Sequence[int] = ()) -> None:
        """Raises `TimeoutError` (part of `data` may have left: the stream is of no more use) and `ConnectionError`."""
        rest = memoryview(data)
        with self._in_use():
            while rest:
                self._check_open()
                try:
                    taken = transmit(self._sock, rest, fds)
                except BlockingIOError:
                    self._wait(self._output, deadline_s, "to be written to")
                except OSError as error:
                    raise broken(error) from error
                else:
                    rest, fds = rest[taken:], ()

    def receive_exactly(self, count: int, deadline_s: float) -> bytes:
        """Raises `TimeoutError` (nothing is lost: ask again), `EOFError`, `ConnectionError`."""
        self._fill(count, deadline_s)
        taken = bytes(memoryview(self._buffer)[:count])
        del self._buffer[:count]
        return taken

    def receive_available(self) -> None:
        """Takes in what has arrived, without waiting. Raises `EOFError`, `ConnectionError`."""
        with self._in_use():
            while self._receive_some():
                pass

    def peek(self, count: int, deadline_s: float) -> bytes:
        """`receive_exactly` that takes nothing away."""
        self._fill(count, deadline_s)
        return bytes(memoryview(self._buffer)[:count])

    def take_fds(self) -> list[int]:
        """Descriptors received so far, owned by the caller from now on."""
        taken, self._fds = self._fds, []
        return taken

    def watch_peer(self) -> ProcessWatch | None:
        """Proof of exit of the process at the other end; `.exited` is the part of it that needs no loop."""
        self._check_open()
        known = peer_pidfd(self._sock, self._peer.pid)
        return ProcessWatch(*known) if known else None

    def close(self) -> None:
        """Also from another thread: shutdown wakes whoever waits here (a mere close would not). Idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._let_go()

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        try:
            with self._used:
                yield
        finally:
            if self._closed:
                self._let_go()

    def _let_go(self) -> None:
        """Once nobody uses it: the number is another file's at once, and a thread still in a call would wait for that."""
        if self._used.acquire(blocking=False):
            try:
                self._sock.close()
                for fd in self.take_fds():
                    os.close(fd)
            finally:
                self._used.release()

    def _fill(self, count: int, deadline_s: float) -> None:
        with self._in_use():
            while len(self._buffer) < count:
                if not self._receive_some():
                    self._wait(self._input, deadline_s, "for an answer")

    def _receive_some(self) -> bool:
        self._check_open()
        try:
            data = receive(self._sock, RECEIVE_BYTES, self._fds)
        except BlockingIOError:
            return False
        except OSError as error:
            raise broken(error) from error
        if not data:
            raise EOFError(f"{self._peer.address}: the peer closed the connection")
        self._buffer += data
        return True

    def _wait(self, poll: select.poll, deadline_s: float, purpose: str) -> None:
        left_s = deadline_s - time.monotonic()
        # poll counts whole milliseconds; rounded up, so that a deadline of less is no busy loop.
        if left_s <= 0 or not poll.poll(int(left_s * 1000) + 1):
            raise TimeoutError(f"{self._peer.address}: waited {purpose} until the deadline")

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionAbortedError("this side closed the stream")


def connect_blocking(address: str, deadline_s: float) -> BlockingStream:
    """Raises `ConnectionError`, `TimeoutError`, `ValueError` for what is no address."""
    kind, name, port = parse_address(address)
    if kind == "tcp":
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"{address}: no time was left to connect")
        try:
            return BlockingStream(socket.create_connection((name, port), timeout=left_s), address)
        except socket.gaierror as error:
            raise ConnectionRefusedError(f"{address}: no such host: {error}") from error
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        connect_unix(sock, name)
        return BlockingStream(sock, address)
    except BaseException:
        sock.close()
        raise


def watch_process(pid: int) -> ProcessWatch:
    """Raises `ProcessLookupError` when there is no such process. `.exited` and `.kill()` need no loop."""
    return ProcessWatch.of(pid)


def run_command(argv: Sequence[str], *, timeout_s: float, stdin: bytes = b"") -> str:
    """What a short command printed. Raises `RuntimeError` with its errors when it failed, `TimeoutError`."""
    try:
        done = subprocess.run(list(argv), input=stdin, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{argv[0]} did not end within {timeout_s} s") from None
    if done.returncode != 0:
        errors = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {errors}")
    return done.stdout.decode()

"""A Unix socket between one rank and the node that passes everything on (descriptors too) and can hold reports back."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

REPORT = b"Report"
"""The message's tag as it stands in its frame."""


class Gate:
    """`hold` keeps the rank's reports here, in order, until `release`; other messages on that connection wait behind."""

    def __init__(self, address: str, node: str) -> None:
        self.address, self._node = address, node.removeprefix("unix:")
        self._passing = threading.Event()
        self._passing.set()
        self.arrived = threading.Event()
        """A report came to the closed gate."""
        self.attached = threading.Event()
        """The slab's descriptor went through: the node knows this rank."""
        self.passed = 0
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address.removeprefix("unix:"))
        self._listener.listen()
        self._start(self._accept)

    def hold(self) -> None:
        self.arrived.clear()
        self._passing.clear()

    def release(self) -> None:
        self._passing.set()

    def close(self) -> None:
        self.release()
        for sock in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _start(self, target: object, *arguments: object) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()  # type: ignore[arg-type]

    def _accept(self) -> None:
        while True:
            try:
                rank, _ = self._listener.accept()
            except OSError:
                return
            node = socket.socket(socket.AF_UNIX)
            try:
                node.connect(self._node)
            except OSError:
                rank.close()
                continue
            self._sockets += [rank, node]
            self._start(self._to_node, rank, node)
            self._start(self._to_rank, node, rank)

    def _to_node(self, rank: socket.socket, node: socket.socket) -> None:
        """Frame by frame: four bytes of length, then the envelope."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                head = self._exactly(rank, 4)
                frame = self._exactly(rank, int.from_bytes(head, "big"))
                if REPORT in frame:
                    if not self._passing.is_set():
                        self.arrived.set()
                        self._passing.wait()
                    self.passed += 1
                node.sendall(head + frame)
        self._end(rank, node)

    def _to_rank(self, node: socket.socket, rank: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, fds, _, _ = socket.recv_fds(node, 1 << 16, 8)
                if not data:
                    break
                if fds:
                    sent = socket.send_fds(rank, [data], fds)
                    data = data[sent:]
                    for fd in fds:
                        os.close(fd)
                rank.sendall(data)
                if fds:
                    self.attached.set()
        self._end(rank, node)

    @staticmethod
    def _exactly(sock: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = sock.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    @staticmethod
    def _end(*sockets: socket.socket) -> None:
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

"""Hosts in network namespaces behind a router that loses, repeats, delays and reorders packets. Needs root, iproute2 and /dev/net/tun.

    with LossyNetwork(2, loss=0.05, seed=1) as network:
        ...  # processes with the prefix network.enter(0), at network.address(0)

The router is this process: each host's only interface is a TUN device whose other end is read here, so no netem, nftables or kernel module is
needed, and a seed gives the same dice (not the same run: packets come as the kernel's TCP sends them).
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time

PACKET_BYTES_MAX = 65536
_TUNSETIFF = 0x400454CA
_TUN, _PLAIN = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_LOOK_SECONDS = 0.05
_libc = ctypes.CDLL(None, use_errno=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10, capture_output=True)


class LossyNetwork:
    """`loss` and `repeat`: of packets, 0 to 1; `delay_s`: uniform between the two, so that packets overtake each other. All may be changed at any time."""

    def __init__(
        self,
        hosts: int,
        *,
        loss: float = 0.0,
        repeat: float = 0.0,
        delay_s: tuple[float, float] = (0.0, 0.0),
        seed: int = 0,
    ) -> None:
        self.loss, self.repeat, self.delay_s = loss, repeat, delay_s
        self.passed = self.lost = self.repeated = 0
        self._dice = random.Random(seed)
        self._names = [f"itln{os.getpid() % 100000}h{number}" for number in range(hosts)]
        self._tuns: dict[bytes, int] = {}
        self._late: list[tuple[float, int, int, bytes]] = []
        self._number = 0
        self._over = threading.Event()
        self._router = threading.Thread(target=self._route, name="lossy router", daemon=True)

    def address(self, number: int) -> str:
        return f"10.78.0.{number + 1}"

    def enter(self, number: int) -> list[str]:
        """What to put before a command that shall run on that host."""
        return ["ip", "netns", "exec", self._names[number]]

    def __enter__(self) -> LossyNetwork:
        try:
            for number, name in enumerate(self._names):
                _ip("netns", "add", name)
                self._tuns[bytes((10, 78, 0, number + 1))] = _open_tun(name)
                _ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth")
                _ip("-n", name, "link", "set", "eth", "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self._forget()
            raise
        self._router.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._router.join()
        self._forget()

    def _forget(self) -> None:
        for fd in self._tuns.values():
            os.close(fd)
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], timeout=10, check=False, capture_output=True)

    def _route(self) -> None:
        poll = select.poll()
        for fd in self._tuns.values():
            poll.register(fd, select.POLLIN)
        while not self._over.is_set():
            now_s = time.monotonic()
            while self._late and self._late[0][0] <= now_s:
                _, _, fd, packet = heapq.heappop(self._late)
                _write(fd, packet)
            wait_s = min(_LOOK_SECONDS, self._late[0][0] - now_s) if self._late else _LOOK_SECONDS
            for fd, _ in poll.poll(max(0.0, wait_s * 1000)):
                self._judge(os.read(fd, PACKET_BYTES_MAX))

    def _judge(self, packet: bytes) -> None:
        there = self._tuns.get(packet[16:20])
        if there is None or packet[0] >> 4 != 4:
            return
        if self._dice.random() < self.loss:
            self.lost += 1
            return
        self.passed += 1
        copies = 1
        if self._dice.random() < self.repeat:
            self.repeated += 1
            copies = 2
        for _ in range(copies):
            late_s = self._dice.uniform(*self.delay_s)
            if late_s <= 0:
                _write(there, packet)
            else:
                self._number += 1
                heapq.heappush(self._late, (time.monotonic() + late_s, self._number, there, packet))


def _write(fd: int, packet: bytes) -> None:
    try:
        os.write(fd, packet)
    except OSError:  # its interface is down, or its queue is full: a packet is lost, as packets are
        return


def _open_tun(namespace: str) -> int:
    """A TUN device `eth` in that namespace; a thread of its own goes there, for a thread's namespace is its own."""
    found: list[int] = []
    failed: list[BaseException] = []

    def go() -> None:
        try:
            where = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
            try:
                if _libc.setns(where, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"namespace {namespace} cannot be entered")
            finally:
                os.close(where)
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"eth", _TUN | _PLAIN))
            except BaseException:
                os.close(fd)
                raise
            found.append(fd)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]

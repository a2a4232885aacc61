"""One side of `transfer.py` under the interpreter that has it: a reader, with its owner in a process of its own.

    PYTHON benchmarks/transfer_sides.py memcpy|socket|tcp|shm|process|mooncake|nixl|nixl-tcp

Answers {"do": "prepare", "size": bytes, "count": pieces}, then {"do": "read", "times": n, "seconds": s} with {"seconds", "times", "cpu_seconds"} of both
processes for up to n batches of scattered pieces; {"do": "first"} with {"seconds"} from a ready reader that never spoke to the owner to its
first 4 KiB. Every read is compared, outside its time.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from harness import NotRun, answer

REGION = 128 << 20
SEED = 7


def region_bytes() -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, 256, REGION, dtype=np.uint8)


def anonymous() -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, REGION), np.uint8)


def cpu_of(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat") as stat:  # nanoseconds of the main thread only
        stat.read()
    total = 0.0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/schedstat") as stat:
                total += int(stat.read().split()[0]) / 1e9
        except OSError:
            continue
    return total


class Side:
    """Starts the owner, which prints one JSON line when it is ready, and holds the reader."""

    name = ""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(dir=os.environ.get("TRANSFER_BENCH_DIR"))
        self.here = anonymous()
        self.expected = region_bytes()
        self.owner: subprocess.Popen[str] | None = None
        self.told: dict[str, Any] = {}
        if self.name != "memcpy":
            self.owner = subprocess.Popen(
                [sys.executable, __file__, self.name, "owner", self.directory],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self.owner.stdout is not None
            while line := self.owner.stdout.readline():
                if line.startswith("{"):
                    self.told = json.loads(line)
                    break
            else:
                raise NotRun(f"the owner of {self.name} ended with {self.owner.wait()}")
        self.connect()

    def connect(self) -> None: ...

    def prepare(self, size: int, count: int) -> None:
        """Scattered on both sides: no two pieces touch."""
        self.size, self.count = size, count
        dice = np.random.default_rng(size * count)
        places = REGION // (2 * size) if size * 2 <= REGION else 1
        self.remote = dice.permutation(places)[:count].astype(np.int64) * 2 * size
        self.local = dice.permutation(places)[:count].astype(np.int64) * 2 * size
        self.plan()

    def plan(self) -> None: ...

    def read(self) -> None:
        raise NotImplementedError

    def check(self) -> None:
        for at in range(min(self.count, 64)):
            there, here, n = int(self.remote[at]), int(self.local[at]), self.size
            if not (self.here[here : here + n] == self.expected[there : there + n]).all():
                raise NotRun(f"{self.name} read other bytes than the owner has")
            self.here[here : here + n] = 0

    def first(self) -> float:
        raise NotRun("not measured")

    def __call__(self, question: dict[str, Any]) -> dict[str, Any]:
        match question["do"]:
            case "prepare":
                self.prepare(question["size"], question["count"])
                self.read()
                self.check()
                return {}
            case "read":
                owner = self.owner.pid if self.owner else None
                cpu = cpu_of(os.getpid()) + (cpu_of(owner) if owner else 0.0)
                begun = time.perf_counter()
                times = 0
                while times < question["times"] and time.perf_counter() - begun < question["seconds"]:
                    self.read()
                    times += 1
                took = time.perf_counter() - begun
                cpu = cpu_of(os.getpid()) + (cpu_of(owner) if owner else 0.0) - cpu
                self.check()
                return {"seconds": took, "times": times, "cpu_seconds": cpu}
            case "first":
                return {"seconds": self.first()}
        raise NotRun(f"cannot {question['do']}")


class Memcpy(Side):
    """memmove of each piece, both regions in this process, in memory of the kind that a slab is (shared, small pages)."""

    name = "memcpy"

    def connect(self) -> None:
        self.source = anonymous()
        self.source[:] = self.expected

    def plan(self) -> None:
        base, to = self.source.ctypes.data, self.here.ctypes.data
        self.pairs = list(zip((to + self.local).tolist(), (base + self.remote).tolist(), strict=True))

    def read(self) -> None:
        move, size = ctypes.memmove, self.size
        for to, source in self.pairs:
            move(to, source, size)


class Socket(Side):
    """Blocking sockets and nothing else: a request of 16 bytes a piece, then the pieces by sendmsg and recvmsg_into."""

    name = "socket"

    def connect(self) -> None:
        self.sock = socket.create_connection(("127.0.0.1", self.told["port"]))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def plan(self) -> None:
        rows = np.stack([self.remote, np.full(self.count, self.size)], axis=1).astype("<i8")
        self.request = struct.pack("<q", self.count) + rows.tobytes()
        view = memoryview(self.here)
        self.into = [view[at : at + self.size] for at in self.local.tolist()]

    def read(self) -> None:
        self.sock.sendall(self.request)
        at, left = 0, self.into
        while at < len(left):
            got = self.sock.recvmsg_into(left[at : at + 1024], 0, socket.MSG_WAITALL)[0]
            while at < len(left) and got >= len(left[at]):
                got -= len(left[at])
                at += 1
            if got:
                rest = left[at][got:]
                while rest:
                    rest = rest[self.sock.recv_into(rest, 0, socket.MSG_WAITALL) :]
                at += 1

    def first(self) -> float:
        begun = time.perf_counter()
        with socket.create_connection(("127.0.0.1", self.told["port"])) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(struct.pack("<qqq", 1, 0, 4096))
            sock.recv_into(memoryview(self.here)[:4096], 0, socket.MSG_WAITALL)
        return time.perf_counter() - begun


def socket_owner(_: str) -> None:
    import threading

    def leave() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=leave, daemon=True).start()
    memory = anonymous()  # as every other side's: NumPy's own array would lie on huge pages
    memory[:] = region_bytes()
    source = memoryview(memory)
    listener = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)

    def serve(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while head := sock.recv(8, socket.MSG_WAITALL):
            (count,) = struct.unpack("<q", head)
            rows = np.frombuffer(sock.recv(16 * count, socket.MSG_WAITALL), "<i8").reshape(-1, 2).tolist()
            pieces = [source[at : at + size] for at, size in rows]
            at = 0
            while at < len(pieces):
                sent = sock.sendmsg(pieces[at : at + 1024])
                while at < len(pieces) and sent >= len(pieces[at]):
                    sent -= len(pieces[at])
                    at += 1
                if sent:
                    sock.sendall(pieces[at][sent:])
                    at += 1

    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


class Ours(Side):
    """The synchronous face, with a read that is prepared once, as NIXL's handle is. `lanes`: of `LaneOptions`."""

    lanes: dict[str, Any] = {}

    def make(self, name: str) -> Any:
        from interlock.host.real import RealHost
        from interlock.membership.directory import StaticDirectory
        from interlock.transfer.blocking import BlockingTransferEngine
        from interlock.transfer.engine import LaneOptions, TransferEngine
        from interlock.wire.identity import Identity

        directory = StaticDirectory({"owner": f"unix:{self.directory}/owner.sock"})
        me = Identity(name, time.time_ns(), os.urandom(8))
        address = f"unix:{self.directory}/{name}.sock"
        options = LaneOptions(**self.lanes)
        return BlockingTransferEngine(
            lambda: TransferEngine(RealHost(), me, address, directory=directory, lanes=options)
        )

    def connect(self) -> None:
        self.engine = self.make("reader")
        (self.segment,) = self.engine.segments_of("owner", "region", 10.0)

    def plan(self) -> None:
        from interlock.transfer.engine import Part

        rows = np.stack([self.remote, self.local, np.full(self.count, self.size)], axis=1)
        self.prepared = self.engine.prepare([Part(self.segment, self.here, rows)])

    def read(self) -> None:
        self.engine.read(self.prepared, 30.0)

    def first(self) -> float:
        from interlock.transfer.engine import Part

        self.turn = getattr(self, "turn", 0) + 1
        engine = self.make(f"first{self.turn}")
        try:
            begun = time.perf_counter()
            engine.read([Part(self.segment, self.here, [(0, 0, 4096)])], 30.0)
            return time.perf_counter() - begun
        finally:
            engine.close()


class Tcp(Ours):
    name = "tcp"
    lanes = {"kinds": ("tcp",)}


class Shm(Ours):
    name = "shm"
    lanes = {"kinds": ("shm",)}


class Process(Ours):
    name = "process"
    lanes = {"kinds": ("shm",)}


def our_owner(directory: str, name: str) -> None:
    from interlock.host.memory import create_memory

    side = object.__new__(SIDES[name])
    side.directory = directory
    engine = side.make("owner")
    if name == "shm":
        memory: Any = create_memory("bench", REGION)
        np.frombuffer(memory.view, np.uint8)[:] = region_bytes()
    else:
        memory = anonymous()
        memory[:] = region_bytes()
    engine.register(memory, "region")
    print(json.dumps({}), flush=True)
    sys.stdin.read()


class Mooncake(Side):
    name = "mooncake"

    def connect(self) -> None:
        from mooncake.engine import TransferEngine

        self.make = TransferEngine
        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
            raise NotRun("mooncake's engine did not initialize")
        self.engine.register_memory(self.here.ctypes.data, REGION)

    def plan(self) -> None:
        self.to = (self.here.ctypes.data + self.local).tolist()
        self.source = (self.told["address"] + self.remote).tolist()
        self.lengths = [self.size] * self.count

    def read(self) -> None:
        if self.engine.batch_transfer_sync_read(self.told["name"], self.to, self.source, self.lengths):
            raise NotRun("mooncake's read failed")

    def first(self) -> float:
        engine = self.make()
        engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
        target = np.zeros(4096, np.uint8)
        engine.register_memory(target.ctypes.data, 4096)
        begun = time.perf_counter()
        if engine.transfer_sync_read(self.told["name"], target.ctypes.data, self.told["address"], 4096):
            raise NotRun("mooncake's read failed")
        took = time.perf_counter() - begun
        engine.unregister_memory(target.ctypes.data)
        return took


def mooncake_owner(_: str) -> None:
    from mooncake.engine import TransferEngine

    memory = anonymous()
    memory[:] = region_bytes()
    engine = TransferEngine()
    engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
    engine.register_memory(memory.ctypes.data, REGION)
    told = {"name": f"127.0.0.1:{engine.get_rpc_port()}", "address": memory.ctypes.data}
    print(json.dumps(told), flush=True)
    sys.stdin.read()


class Nixl(Side):
    name = "nixl"

    def agent(self, name: str) -> Any:
        from nixl._api import nixl_agent, nixl_agent_config

        return nixl_agent(name, nixl_agent_config(backends=["UCX"]))

    def meet(self, agent: Any) -> None:
        with open(f"{self.directory}/metadata", "rb") as file:
            agent.add_remote_agent(file.read())

    def connect(self) -> None:
        self.reader = self.agent("reader")
        self.reader.register_memory([(self.here.ctypes.data, REGION, 0, "")], "DRAM")
        self.meet(self.reader)
        self.handle = None

    def plan(self) -> None:
        """The handle is made once and used again: NIXL's best case."""
        if self.handle is not None:
            self.reader.release_xfer_handle(self.handle)
        to = [(a, self.size, 0) for a in (self.here.ctypes.data + self.local).tolist()]
        source = [(a, self.size, 0) for a in (self.told["address"] + self.remote).tolist()]
        self.handle = self.start(self.reader, to, source)

    def start(self, agent: Any, to: list[Any], source: list[Any]) -> Any:
        return agent.initialize_xfer(
            "READ", agent.get_xfer_descs(to, "DRAM"), agent.get_xfer_descs(source, "DRAM"), "owner", b""
        )

    def run(self, agent: Any, handle: Any) -> None:
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise NotRun(f"NIXL ended in {state}")

    def read(self) -> None:
        self.run(self.reader, self.handle)

    def first(self) -> float:
        self.turn = getattr(self, "turn", 0) + 1
        agent = self.agent(f"first{self.turn}")
        target = np.zeros(4096, np.uint8)
        agent.register_memory([(target.ctypes.data, 4096, 0, "")], "DRAM")
        begun = time.perf_counter()
        self.meet(agent)
        handle = self.start(agent, [(target.ctypes.data, 4096, 0)], [(self.told["address"], 4096, 0)])
        self.run(agent, handle)
        return time.perf_counter() - begun


class NixlTcp(Nixl):
    name = "nixl-tcp"


def nixl_owner(directory: str) -> None:
    side = object.__new__(Nixl)
    memory = anonymous()
    memory[:] = region_bytes()
    agent = side.agent("owner")
    agent.register_memory([(memory.ctypes.data, REGION, 0, "")], "DRAM")
    with open(f"{directory}/metadata", "wb") as file:
        file.write(agent.get_agent_metadata())
    print(json.dumps({"address": memory.ctypes.data}), flush=True)
    sys.stdin.read()


SIDES: dict[str, type[Any]] = {
    side.name: side for side in (Memcpy, Socket, Tcp, Shm, Process, Mooncake, Nixl, NixlTcp)
}


def main() -> None:
    name = sys.argv[1]
    if name == "nixl-tcp":
        os.environ["UCX_TLS"] = "tcp"
    os.environ.setdefault("UCX_MAX_RMA_RAILS", "1")
    os.environ.setdefault("MC_TCP_ENABLE_CONNECTION_POOL", "1")
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    if sys.argv[2:3] == ["owner"]:
        directory = sys.argv[3]
        if name == "socket":
            socket_owner(directory)
        elif name == "mooncake":
            mooncake_owner(directory)
        elif name.startswith("nixl"):
            nixl_owner(directory)
        else:
            our_owner(directory, name)
        return
    answer(SIDES[name])


if __name__ == "__main__":
    main()

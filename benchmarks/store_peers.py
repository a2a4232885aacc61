"""The peers of `store.py`, each in a process of its own under the interpreter that has it; see `harness.answer`.

    PEER_PYTHON benchmarks/store_peers.py mooncake|lmcache|redis [ADDRESS]

Answers {"do": "prepare", "size": bytes, "count": values}, {"do": "put"}, {"do": "get"} (and the same with "single": true, one
value a call, where the peer has calls for many) with {"seconds": …} for all values. Sources and destinations are contiguous
memory of the peer's own choice (registered where it wants that). `get` checks the first bytes of each value outside its time.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import NotRun, answer

POOL_BYTES = 1 << 30


class Peer:
    """What the peers have in common: a source, a destination, and names that were never used before."""

    def __init__(self) -> None:
        self.turn = 0
        self.names: list[str] = []

    def prepare(self, size: int, count: int) -> None:
        self.size, self.count = size, count
        random = np.random.default_rng(size)
        self.source = random.integers(0, 256, (count, size), dtype=np.uint8)
        self.into = np.zeros((count, size), dtype=np.uint8)

    def fresh(self) -> None:
        """Removes what the last round put, and names the next."""
        if self.names:
            self.remove()
        self.turn += 1
        self.names = [f"{os.getpid()}-{self.turn}-{n}" for n in range(self.count)]

    def check(self) -> None:
        if not np.array_equal(self.into[:, :64], self.source[:, :64]):
            raise NotRun("it read other bytes than were written")
        self.into[:, :64] = 0

    def remove(self) -> None: ...

    def put(self, single: bool) -> None:
        raise NotImplementedError

    def get(self, single: bool) -> None:
        raise NotImplementedError

    def __call__(self, question: dict[str, Any]) -> dict[str, Any]:
        single = bool(question.get("single"))
        match question["do"]:
            case "prepare":
                self.prepare(question["size"], question["count"])
                return {"seconds": 0.0}
            case "put":
                self.fresh()
                return {"seconds": _timed(lambda: self.put(single))}
            case "get":
                took = _timed(lambda: self.get(single))
                self.check()
                return {"seconds": took}
        raise NotRun(f"cannot {question['do']}")


def _timed(call: Callable[[], None]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


class Mooncake(Peer):
    """Mooncake Store in local mode: client and segment in this process, its master beside it; zero-copy calls."""

    def __init__(self) -> None:
        super().__init__()
        from mooncake.store import MooncakeDistributedStore

        program = os.path.join(os.path.dirname(sys.executable), "mooncake_master")
        ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        port, metrics = (one.getsockname()[1] for one in ports)
        for one in ports:
            one.close()
        self.master = subprocess.Popen(
            [
                program,
                f"--rpc_port={port}",
                "--enable_http_metadata_server=false",
                f"--metrics_port={metrics}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
        )
        self.store = MooncakeDistributedStore()
        wrong = -1
        for _ in range(50):
            if self.master.poll() is not None:
                raise NotRun("mooncake_master ended at once")
            wrong = self.store.setup(
                "127.0.0.1", "P2PHANDSHAKE", POOL_BYTES, 64 << 20, "tcp", "", f"127.0.0.1:{port}"
            )
            if wrong == 0:
                break
            time.sleep(0.1)
        if wrong:
            raise NotRun(f"setup of the Mooncake client failed with {wrong}")

    def prepare(self, size: int, count: int) -> None:
        if hasattr(self, "source"):
            for array in (self.source, self.into):
                self.store.unregister_buffer(array.ctypes.data)
        super().prepare(size, count)
        for array in (self.source, self.into):
            if self.store.register_buffer(array.ctypes.data, array.nbytes):
                raise NotRun("register_buffer failed")

    def remove(self) -> None:
        self.store.remove_all(True)

    def put(self, single: bool) -> None:
        at = [self.source.ctypes.data + n * self.size for n in range(self.count)]
        if single:
            results = [
                self.store.put_from(name, a, self.size) for name, a in zip(self.names, at, strict=True)
            ]
        else:
            results = self.store.batch_put_from(self.names, at, [self.size] * self.count)
        if any(results):
            raise NotRun(f"put failed with {set(results)}")

    def get(self, single: bool) -> None:
        at = [self.into.ctypes.data + n * self.size for n in range(self.count)]
        if single:
            results = [
                self.store.get_into(name, a, self.size) for name, a in zip(self.names, at, strict=True)
            ]
        else:
            results = self.store.batch_get_into(self.names, at, [self.size] * self.count)
        if any(result != self.size for result in results):
            raise NotRun(f"get failed with {set(results)}")


class LMCache(Peer):
    """LMCache's local CPU backend, in process as it is meant: allocate, copy a tensor in, submit; reference, copy out."""

    def __init__(self) -> None:
        super().__init__()
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_allocators.mixed_memory_allocator import MixedMemoryAllocator
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

        torch.set_num_threads(1)  # one thread copies on every side
        self.torch, self.format, self.key = torch, MemoryFormat.KV_2LTD, CacheEngineKey
        config = LMCacheEngineConfig.from_defaults(local_cpu=True, max_local_cpu_size=POOL_BYTES / 2**30)
        self.backend = LocalCPUBackend(config, None, "cpu", None, MixedMemoryAllocator(POOL_BYTES))

    def keys(self) -> list[Any]:
        return [self.key("bench", 1, 0, hash(name), self.torch.bfloat16) for name in self.names]

    def remove(self) -> None:
        for key in self.keys():
            self.backend.remove(key)

    def put(self, single: bool) -> None:
        values = self.torch.from_numpy(self.source).view(self.torch.bfloat16)
        shape = self.torch.Size([2, 1, self.size // 4 // 128, 128])
        for key, value in zip(self.keys(), values, strict=True):
            held = self.backend.allocate(shape, self.torch.bfloat16, self.format)
            if held is None:
                raise NotRun("its pool is full")
            held.tensor.view(-1).copy_(value)
            self.backend.submit_put_task(key, held)
            held.ref_count_down()

    def get(self, single: bool) -> None:
        into = self.torch.from_numpy(self.into).view(self.torch.bfloat16)
        for key, target in zip(self.keys(), into, strict=True):
            held = self.backend.get_blocking(key)
            if held is None:
                raise NotRun("a value is gone")
            target.copy_(held.tensor.view(-1))
            held.ref_count_down()


class Redis(Peer):
    """Redis on a Unix socket, with hiredis; many values in one pipeline."""

    def __init__(self, address: str) -> None:
        super().__init__()
        import hiredis  # noqa: F401  redis-py parses large values in Python without it
        import redis

        self.server = None
        path = address or f"/tmp/interlock-bench-{os.getpid()}.sock"
        if not address:
            atexit.register(lambda: os.path.exists(path) and os.unlink(path))
            self.server = subprocess.Popen(
                ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no"],
                stdout=subprocess.DEVNULL,
                preexec_fn=_die_with_parent,
            )
        self.store = redis.Redis(unix_socket_path=path)
        for _ in range(50):
            try:
                self.store.ping()
                return
            except redis.ConnectionError:
                time.sleep(0.1)
        raise NotRun("redis-server does not answer")

    def remove(self) -> None:
        self.store.flushall()

    def put(self, single: bool) -> None:
        if single:
            for name, value in zip(self.names, self.source, strict=True):
                self.store.set(name, value.data)
            return
        line = self.store.pipeline(transaction=False)
        for name, value in zip(self.names, self.source, strict=True):
            line.set(name, value.data)
        line.execute()

    def get(self, single: bool) -> None:
        found = [self.store.get(name) for name in self.names] if single else self.store.mget(self.names)
        for target, value in zip(self.into, found, strict=True):
            target[:] = np.frombuffer(value, dtype=np.uint8)


def _die_with_parent() -> None:
    """A server ends with this process, however that ends."""
    import ctypes

    ctypes.CDLL(None).prctl(1, 9)


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else ""
    made: dict[str, Callable[[], Peer]] = {
        "mooncake": Mooncake,
        "lmcache": LMCache,
        "redis": lambda: Redis(sys.argv[2] if len(sys.argv) > 2 else ""),
    }
    if kind not in made:
        raise SystemExit(f"{__doc__}")
    answer(lambda: made[kind]())


if __name__ == "__main__":
    main()

"""A process of transfer engines under orders: one JSON order a line on stdin, one JSON answer a line on stdout. For tests with real faults.

    python -m interlock.testing.transfer_peer '{"names": ["a"], "directory": "/tmp/x", "lanes": ["tcp"]}'

Each engine offers one segment, `kv`, whose bytes follow from its name and life, so that a reader knows them without being told: bytes of
another peer, of an earlier life, or torn ones do not pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from interlock.host.real import RealHost
from interlock.membership.directory import StaticDirectory
from interlock.transfer.engine import LaneOptions, Part, TransferEngine, TransferFailed
from interlock.wire.identity import Identity

SEGMENT_BYTES = 64 * 1024
TOKEN = b"transfer peers under test"


def bytes_of(name: str, incarnation: int, count: int = SEGMENT_BYTES) -> np.ndarray[Any, Any]:
    seed = hashlib.blake2b(f"{name}@{incarnation}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(seed, "big")).integers(0, 256, count, dtype=np.uint8)


class Peers:
    """The engines of this process. `addresses`: of everybody, those of this process included."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._host = RealHost()
        self._directory = StaticDirectory(config["addresses"])
        self._config = config
        self.engines: dict[str, TransferEngine] = {}

    async def start(self) -> None:
        for name in self._config["names"]:
            me = Identity(name, time.time_ns(), os.urandom(8))
            engine = TransferEngine(
                self._host,
                me,
                self._config["addresses"][name],
                directory=self._directory,
                token=TOKEN,
                lanes=LaneOptions(
                    kinds=tuple(self._config["lanes"]),
                    directory=self._config.get("directory", ""),
                    host=self._config.get("host", ""),
                ),
            )
            await engine.start()
            engine.register(bytes_of(name, me.incarnation), "kv")
            self.engines[name] = engine

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self.engines.values()))
        self._host.close()

    # --- orders ----------------------------------------------------------------------------------------------------

    async def open(self, pairs: list[list[str]], timeout_s: float, spread_s: float = 0.0) -> dict[str, Any]:
        """Each (who, peer) at once, or spread over `spread_s`. Errors by pair; and how long each took."""
        begun_s = time.monotonic()

        async def one(number: int, who: str, peer: str) -> tuple[str, str, float]:
            await asyncio.sleep(spread_s * number / max(1, len(pairs)))
            asked_s = time.monotonic()
            try:
                await self.engines[who].open(peer, timeout_s=timeout_s)
            except TransferFailed as failed:
                return who, f"{peer}: {failed}", time.monotonic() - asked_s
            return who, "", time.monotonic() - asked_s

        done = await asyncio.gather(*(one(n, who, peer) for n, (who, peer) in enumerate(pairs)))
        return {
            "errors": [f"{who} -> {error}" for who, error, _ in done if error],
            "seconds": time.monotonic() - begun_s,
            "each_s": sorted(seconds for _, _, seconds in done),
        }

    async def read(self, pairs: list[list[str]], timeout_s: float) -> dict[str, Any]:
        """Reads every peer's segment and compares. `wrong`: bytes that were not the peer's; there must never be any."""

        async def one(who: str, peer: str) -> tuple[str, str]:
            engine = self.engines[who]
            here = np.zeros(SEGMENT_BYTES, np.uint8)
            try:
                (segment,) = await engine.segments_of(peer, "kv", timeout_s=timeout_s)
                transfer = engine.read([Part(segment, here)], timeout_s=timeout_s)
                outcome = await transfer.outcome()
                await transfer.release()
                outcome.check()
            except TransferFailed as failed:
                return f"{who} -> {peer}: {failed.code}: {failed}", ""
            good = bool((here == bytes_of(peer, segment.incarnation)).all())
            return "", "" if good else f"{who} read other bytes than those of {peer}@{segment.incarnation}"

        done = await asyncio.gather(*(one(who, peer) for who, peer in pairs))
        return {
            "errors": [error for error, _ in done if error],
            "wrong": [wrong for _, wrong in done if wrong],
        }

    async def retire(self, pairs: list[list[str]]) -> dict[str, Any]:
        for who, peer in pairs:
            self.engines[who].retire(peer)
        return {}

    async def stamps(self) -> dict[str, Any]:
        """Who is connected with whom, in which lives and attempts, over how many lanes."""
        found = {}
        for name, engine in self.engines.items():
            for peer in engine.peers():
                stamps = engine.stamps(peer)
                if stamps is not None:
                    found[f"{name} {peer}"] = [str(stamps[0]), str(stamps[1])]
        return {"stamps": found}

    async def explain(self, who: str, peer: str) -> dict[str, Any]:
        return {"words": self.engines[who].explain(peer)}

    async def held(self) -> dict[str, Any]:
        """Open descriptors, in all and by kind."""
        kinds: Counter[str] = Counter()
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                kinds[re.split(r"[:\[(]", os.readlink(f"/proc/self/fd/{fd}").lstrip("/"))[0]] += 1
        return {"descriptors": kinds.total(), "kinds": kinds, "threads": threading.active_count()}


async def main() -> None:
    config = json.loads(sys.argv[1])
    peers = Peers(config)
    await peers.start()
    orders: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
        "open": peers.open,
        "read": peers.read,
        "retire": peers.retire,
        "stamps": peers.stamps,
        "explain": peers.explain,
        "held": peers.held,
    }
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps({"ready": True}), flush=True)
    while line := await reader.readline():
        order = json.loads(line)
        answer = await orders[order.pop("do")](**order)
        print(json.dumps(answer), flush=True)
    await peers.close()


if __name__ == "__main__":
    asyncio.run(main())

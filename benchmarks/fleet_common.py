"""What both sides of `fleet.py` do alike, under either interpreter: the same prompts, the same load, the same clock."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

PROMPTS = 32
VOCABULARY = 50_000
STEP_SECONDS = 0.010
"""Of an engine that is busy."""


def prompts(tokens: int, vocabulary: int = VOCABULARY) -> list[list[int]]:
    draw = random.Random(f"prompts {tokens}")
    return [[draw.randrange(vocabulary) for _ in range(tokens)] for _ in range(PROMPTS)]


def cpu_s(pid: int) -> float:
    """Seconds that the living threads of this process have run."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/schedstat") as stat:
            total += int(stat.read().split()[0])
    return total / 1e9


async def drive(
    ask: Callable[[list[int]], Awaitable[None]],
    given: Sequence[list[int]],
    in_flight: int,
    seconds: float,
    pids: dict[str, int],
) -> dict[str, Any]:
    """So many askers, each with one request at a time, for so long; what was answered within that time counts."""
    times: list[float] = []
    asked = 0
    ends = time.perf_counter() + seconds

    async def asker(number: int) -> None:
        nonlocal asked
        turn = number
        while (begun := time.perf_counter()) < ends:
            asked += 1
            await ask(given[turn % len(given)])
            if (now := time.perf_counter()) <= ends:
                times.append(now - begun)
            turn += 1

    before = {name: cpu_s(pid) for name, pid in pids.items()}
    await asyncio.gather(*(asker(number) for number in range(in_flight)))
    spent = {name: cpu_s(pid) - before[name] for name, pid in pids.items()}
    if not times:
        raise RuntimeError(f"nothing was answered within {seconds} s at {in_flight} in flight")
    ranked = sorted(times)
    return {
        "rate": len(times) / seconds,
        "p50_ms": 1e3 * statistics.median(ranked),
        "p99_ms": 1e3 * ranked[int(0.99 * len(ranked))],
        "cpu_us": {name: 1e6 * cpu / asked for name, cpu in spent.items()},
    }


async def post(
    port: int, body: bytes, connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
) -> bytes:
    """One HTTP request on a kept connection of the pool, or a new one. Raises RuntimeError unless it is answered by 200."""
    while connections:
        reader, writer = connections.pop()
        if not reader.at_eof():
            break
        writer.close()  # the server ended it meanwhile
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: b\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    header = await reader.readuntil(b"\r\n\r\n")
    length = int(header.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    answer = await reader.readexactly(length)
    if b" 200 " not in header.split(b"\r\n")[0]:
        raise RuntimeError(f"{header.split(bytes([13]))[0]!r}: {answer[:200]!r}")
    connections.append((reader, writer))
    return answer

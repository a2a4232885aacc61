"""How a group's ranks say that they have started, or why not: each one word, on the pipe that it was started with."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence

import msgspec

from interlock.engines.base import Capabilities, EngineStartError
from interlock.engines.lockstep.words import Started

STARTED_BYTES_MAX = 1 << 20


async def all_started(pipes: Sequence[int], exits: Callable[[], str]) -> Capabilities:
    """What the ranks can do, which is the same for all. Raises `EngineStartError` by the first that cannot start.

    `pipes`: the read ends, one a rank, which are closed; `exits` names the ranks that are gone, in words.
    """
    waits = [asyncio.create_task(_read_started(fd), name=f"rank {n}") for n, fd in enumerate(pipes)]
    try:
        heard: list[Started | None] = []
        for done in asyncio.as_completed(waits):
            heard.append(await done)
            if heard[-1] is None or heard[-1].error:
                break
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    last = heard[-1]
    if last is None:
        raise EngineStartError(f"{exits() or 'a rank'} ended before it had its model; its log says why")
    if last.error or last.capabilities is None:
        raise EngineStartError(last.error)
    return last.capabilities


async def _read_started(fd: int) -> Started | None:
    """What a rank says on its pipe, which is closed; None when it ends without a word."""
    loop = asyncio.get_running_loop()
    os.set_blocking(fd, False)
    parts = bytearray()
    whole: asyncio.Future[None] = loop.create_future()

    def readable() -> None:
        with contextlib.suppress(BlockingIOError):
            part = os.read(fd, 1 << 16)
            parts.extend(part)
            if (not part or len(parts) > STARTED_BYTES_MAX) and not whole.done():
                whole.set_result(None)

    loop.add_reader(fd, readable)
    try:
        await whole
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    if not parts:
        return None
    try:
        return msgspec.msgpack.decode(parts, type=Started)
    except msgspec.DecodeError as error:
        return Started(error=f"a rank said what nobody understands when it started: {error}")

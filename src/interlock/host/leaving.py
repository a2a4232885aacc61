"""How a process that serves hears that it has to leave, and waits for that beside its work."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from typing import Any


@contextlib.contextmanager
def signalled() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set. In a loop of the main thread."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, event.set)
    try:
        yield event
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def first_of(*waits: Coroutine[Any, Any, object] | asyncio.Future[Any]) -> None:
    """Until one of them is over; raises what it raised. The others are cancelled, and have ended when it returns."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

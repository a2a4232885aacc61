"""A loop in a thread of its own, for synchronous callers of asynchronous drivers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from interlock.core.errors import LocalProtocolError

T = TypeVar("T")


class LoopThread:
    """Runs from its making until `close`. Never call it from its own thread."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """What the coroutine returns or raises. Raises `TimeoutError`, and cancels it, after `timeout_s`.

        Raises `LocalProtocolError` where it could never be done: after `close`, or on the loop's own thread.
        """
        if self.loop.is_closed() or threading.current_thread() is self._thread:
            work.close()
            if self.loop.is_closed():
                raise LocalProtocolError("it was closed", hint="make another one")
            raise LocalProtocolError(
                "this is its own loop, which must not wait", hint="call it from a thread"
            )
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError(f"it was not done within {timeout_s} s") from None

    def close(self) -> None:
        """Cancels what still runs, and ends the thread. Idempotent."""
        if self.loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

"""A bell: who waits for something to happen is told that something did, and looks again."""

from __future__ import annotations

import asyncio


class Notice:
    """Rung by the node's own code between two messages; waited for by tasks of the same loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._waiting = 0

    def ring(self) -> None:
        """Costs nothing while nobody waits."""
        if self._waiting:
            self._event.set()
            self._event = asyncio.Event()

    async def wait(self, timeout_s: float) -> bool:
        """Whether it rang within `timeout_s`, from now on."""
        event = self._event
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        else:
            return True
        finally:
            self._waiting -= 1

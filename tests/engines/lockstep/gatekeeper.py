"""The test's side of `gated_rank`: which rank may take its next step, and which is inside a collective."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

GATE = "TEST_LOCKSTEP_GATE"
"""In the environment of a gated rank: the address."""
WAIT_SECONDS = 60.0


class Gatekeeper:
    """Every step passes unless its rank is held. A held rank waits before its forward: nobody of the others can finish."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: set[int] = set()
        self._waiting: dict[int, asyncio.StreamWriter] = {}
        self.at_gate: dict[int, int] = {}
        self.inside: dict[int, int] = {}
        """The step in which a rank entered its collectives last."""
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                said = json.loads(line)
                async with self._changed:
                    if said["at"] == "inside":
                        self.inside[said["rank"]] = said["step"]
                    elif said["rank"] in self._held:
                        self.at_gate[said["rank"]] = said["step"]
                        self._waiting[said["rank"]] = writer
                    else:
                        writer.write(b"!")
                    self._changed.notify_all()
        except ConnectionError:
            pass
        finally:
            writer.close()

    def reset(self) -> None:
        """Open for all; what ranks did before is forgotten."""
        for rank in list(self._held):
            self.release(rank)
        self.inside.clear()

    def hold(self, rank: int) -> None:
        """From its next step on."""
        self._held.add(rank)

    def release(self, rank: int) -> None:
        self._held.discard(rank)
        self.at_gate.pop(rank, None)
        writer = self._waiting.pop(rank, None)
        if writer is not None:
            writer.write(b"!")

    async def one_waits_inside_for(self, held: int, waiter: int) -> int:
        """Until `held` is at the gate of a step and `waiter` is in a collective of that same step; the step."""
        async with asyncio.timeout(WAIT_SECONDS), self._changed:
            await self._changed.wait_for(
                lambda: held in self.at_gate and self.inside.get(waiter) == self.at_gate[held]
            )
            return self.at_gate[held]

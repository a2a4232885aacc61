"""An `Engine` that starts at once and computes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from interlock.core.targets import Mode
from interlock.engines.base import Capabilities, Progress, Work
from interlock.wire.fleet_messages import Load


class IdleEngine:
    async def start(self) -> Capabilities:
        return Capabilities(
            kind="idle", model="m", max_model_tokens=64, pause_modes=frozenset(Mode), features=[]
        )

    async def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        yield Progress([], [], "abort", 0)

    async def abort(self, key: str) -> None: ...

    async def pause(self, mode: Mode) -> None: ...

    async def unpause(self) -> None: ...

    async def stop(self) -> None: ...

    async def died(self) -> str:
        await asyncio.get_running_loop().create_future()
        return ""

    def load(self) -> Load:
        return Load()

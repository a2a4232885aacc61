"""The processes of an engine's other ranks: started, watched, ended."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from interlock.engines.base import EngineStartError
from interlock.engines.transformers.ranks import Pipe, RankConfig, meeting_file
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.base import Child, Host
from interlock.host.processes import PARENT_FD


class RankProcesses:
    """Ranks 1 and up. They leave by themselves when this process is gone: their pipes end."""

    def __init__(self, host: Host, config: TransformersConfig, on_exit: Callable[[str], None]) -> None:
        """`on_exit` is told which rank has exited, until `end`."""
        self._host, self._config, self._on_exit = host, config, on_exit
        self.children: list[Child] = []
        self._watches: list[asyncio.Task[None]] = []

    async def start(self) -> list[Pipe]:
        """The pipes to them, which the caller owns. Raises `EngineStartError`."""
        self._host.files.remove(meeting_file(self._config))  # of a former life: its ranks would be waited for
        return [await self._start(rank) for rank in range(1, self._config.tensor_parallel)]

    async def _start(self, rank: int) -> Pipe:
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        config = RankConfig(engine=self._config, rank=rank, read_fd=down_read, write_fd=up_write)
        argv = [
            sys.executable,
            "-m",
            "interlock.engines.transformers.ranks",
            msgspec.json.encode(config).decode(),
        ]
        env = {name: value for name, value in os.environ.items() if name != PARENT_FD}
        log = Path(self._config.log) if self._config.log else None
        try:
            child = await self._host.spawn(argv, env=env, log=log, pass_fds=(down_read, up_write))
        except OSError as error:
            raise EngineStartError(f"rank {rank} cannot be started: {error}") from error
        finally:
            os.close(down_read)
            os.close(up_write)
        self.children.append(child)
        self._watches.append(asyncio.create_task(self._watch(child, rank), name=f"rank {rank}"))
        return Pipe(up_read, down_write, self._config.collective_seconds)

    async def _watch(self, child: Child, rank: int) -> None:
        self._on_exit(f"rank {rank} has exited with status {await child.wait()}")

    async def end(self, seconds: float) -> None:
        """Ends them, whatever they do, and all that they started."""
        for watch in self._watches:
            watch.cancel()
        for child in self.children:
            await child.end_tree(seconds)

"""The processes of an engine's other ranks: started, watched, ended."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from interlock.engines.base import EngineStartError
from interlock.engines.transformers.ranks import Pipe, RankConfig, meeting_file
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.base import Child, Host
from interlock.host.processes import PARENT_FD


class WatchedRanks:
    """Processes of ranks: whoever holds this hears of each exit, and ends them all with proof."""

    def __init__(self, host: Host, on_exit: Callable[[int, int], None], log: str | None) -> None:
        """`on_exit(rank, status)` is called until `end`."""
        self._host, self._on_exit = host, on_exit
        self._log = Path(log) if log else None
        self.children: dict[int, Child] = {}
        self._watches: list[asyncio.Task[None]] = []

    async def spawn(
        self, rank: int, argv: Sequence[str], *, env: Mapping[str, str], pass_fds: Sequence[int]
    ) -> None:
        """Raises `EngineStartError`."""
        try:
            child = await self._host.spawn(argv, env=env, log=self._log, pass_fds=pass_fds)
        except OSError as error:
            raise EngineStartError(f"rank {rank} cannot be started: {error}") from error
        self.children[rank] = child
        self._watches.append(asyncio.create_task(self._watch(child, rank), name=f"rank {rank}"))

    async def _watch(self, child: Child, rank: int) -> None:
        self._on_exit(rank, await child.wait())

    async def wait_exited(self) -> None:
        for child in self.children.values():
            await child.wait()

    async def end(self, seconds: float) -> list[int]:
        """Ends them, whatever they do, and all that they started; the ranks that are not proven gone by then."""
        for watch in self._watches:
            watch.cancel()
        ranks = list(self.children)
        gone = await asyncio.gather(*(self.children[rank].end_tree(seconds) for rank in ranks))
        return [rank for rank, proven in zip(ranks, gone, strict=True) if not proven]


class RankProcesses:
    """Ranks 1 and up. They leave by themselves when this process is gone: their pipes end."""

    def __init__(self, host: Host, config: TransformersConfig, on_exit: Callable[[str], None]) -> None:
        """`on_exit` is told which rank has exited, until `end`."""
        self._host, self._config = host, config
        self._ranks = WatchedRanks(
            host, lambda rank, status: on_exit(f"rank {rank} has exited with status {status}"), config.log
        )

    @property
    def children(self) -> list[Child]:
        return list(self._ranks.children.values())

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
        try:
            await self._ranks.spawn(rank, argv, env=env, pass_fds=(down_read, up_write))
        finally:
            os.close(down_read)
            os.close(up_write)
        return Pipe(up_read, down_write, self._config.collective_seconds)

    async def end(self, seconds: float) -> None:
        """Ends them, whatever they do, and all that they started."""
        await self._ranks.end(seconds)

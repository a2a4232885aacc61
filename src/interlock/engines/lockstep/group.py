"""One life of a lockstep group: its rank processes, the links to them and their leader. It is ended whole, or not at all.

A rank that is lost, or late, leaves the others inside a collective that nobody can free them from (gloo). So whatever happens to
one of them ends all: killed, with proof of each exit, before anybody is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from interlock.core.limits import (
    CHILD_GRACE_SECONDS,
    HEARTBEAT_SECONDS,
    LOCKSTEP_BEAT_SECONDS,
    LOCKSTEP_BLAME_SECONDS,
    LOCKSTEP_CALL_SECONDS_MAX,
    LOCKSTEP_SILENCE_SECONDS_MAX,
)
from interlock.engines.base import Capabilities, EngineGone, EngineStartError, Progress
from interlock.engines.lockstep.leader import Leader
from interlock.engines.lockstep.link import Audience, RankLink
from interlock.engines.lockstep.rank_config import RankConfig
from interlock.engines.lockstep.starting import all_started
from interlock.engines.lockstep.words import Hold, Leave, Said
from interlock.engines.transformers.rank_processes import WatchedRanks
from interlock.engines.transformers.setup import ExpertGroup, TransformersConfig
from interlock.host.base import Host
from interlock.host.processes import PARENT_FD, open_parent_pipe
from interlock.wire.identity import Identity

_log = logging.getLogger(__name__)
PROGRAM = (sys.executable, "-m", "interlock.engines.lockstep.rank")
MUTE_SECONDS = 1.5 * HEARTBEAT_SECONDS
"""A rank that was not heard for so long when its group is ended is named with the reason."""
SILENT_BEATS = 3
"""A rank counts as silent when it was so at as many looks: while we were frozen ourselves, its words were waiting."""


class Group(Audience):
    """`start`, then words and calls, then `end`. `on_end(why)` is called once, with no process left, unless `end` came first."""

    def __init__(
        self,
        host: Host,
        config: TransformersConfig,
        epoch: int,
        *,
        on_made: Callable[[list[tuple[str, Progress]]], None],
        on_end: Callable[[str], None],
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self._host, self._config, self._epoch, self._program = host, config, epoch, list(program)
        self._on_made, self._on_end = on_made, on_end
        self.size = config.data_parallel
        self.processes = WatchedRanks(host, self._exited, config.log)
        self.links: list[RankLink] = []
        self.leader = Leader(
            host.clock,
            epoch,
            self.size,
            say=self._say,
            on_end=self.end_whole,
            step_seconds=config.lockstep_step_seconds,
        )
        self.why = ""
        """Why it ended, once it did."""
        self._news = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._closing = False
        self._doubts: list[asyncio.TimerHandle] = []
        self._parent: tuple[int, int] | None = None

    # --- start ---------------------------------------------------------------------------------------------------

    async def start(self) -> Capabilities:
        """Every rank has its model and is fenced; no step is granted yet. Raises `EngineStartError`."""
        self._parent = open_parent_pipe()
        self._host.files.remove(Path(self._meeting))  # of a former life: its ranks would be waited for
        pipes: list[int] = []
        try:
            for rank in range(self.size):
                pipes.append(await self._spawn(rank))
        except BaseException:
            for fd in pipes:
                os.close(fd)
            raise
        capabilities = await all_started(pipes, self._exits)
        me = Identity(f"{self._config.name}-leader", self._epoch)
        for rank in range(self.size):
            try:
                link = await RankLink.open(
                    self._host, self._address(rank), rank=rank, me=me, role="leader", audience=self
                )
            except (OSError, TimeoutError) as error:
                raise EngineStartError(f"rank {rank} does not listen: {error}") from error
            self.links.append(link)
        self.leader.begin()
        try:
            await self.until(lambda: self.leader.fenced)
        except EngineGone as error:
            raise EngineStartError(str(error)) from error
        return capabilities

    @property
    def _meeting(self) -> str:
        return str(Path(self._config.scratch_dir).resolve() / f"group-{self._epoch}")

    def _socket(self, rank: int) -> str:
        return str(Path(self._config.scratch_dir).resolve() / f"r{rank}-{self._epoch}.sock")

    def _address(self, rank: int) -> str:
        return f"unix:{self._socket(rank)}"

    async def _spawn(self, rank: int) -> int:
        """The read end of the pipe on which it says `Started`."""
        read, write = os.pipe()
        assert self._parent is not None
        config = RankConfig(engine=self._rank_config(rank), address=self._address(rank), started_fd=write)
        env = {**os.environ, PARENT_FD: str(self._parent[0]), "OMP_NUM_THREADS": str(self._config.threads)}
        try:
            await self.processes.spawn(
                rank,
                [*self._program, msgspec.json.encode(config).decode()],
                env=env,
                pass_fds=(write, self._parent[0]),
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        return read

    def _rank_config(self, rank: int) -> TransformersConfig:
        """This engine's, for one of its ranks: alone with its requests, its share of memory, its own folders."""
        whole = self._config
        return msgspec.structs.replace(
            whole,
            name=f"{whole.name}-rank-{rank}",
            state_dir=str(Path(whole.state_dir) / f"rank-{rank}"),
            data_parallel=1,
            expert_group=ExpertGroup(self.size, rank, self._meeting),
            kv_bytes=whole.kv_bytes // self.size,
            snapshots=str(Path(whole.snapshots) / f"rank-{rank}") if whole.snapshots else None,
            snapshot_bytes=whole.snapshot_bytes // self.size
            if whole.snapshot_bytes
            else whole.snapshot_bytes,
        )

    def _exits(self) -> str:
        left = [
            f"rank {rank} (status {child.returncode})"
            for rank, child in self.processes.children.items()
            if child.returncode is not None
        ]
        return ", ".join(left)

    # --- what ranks say ------------------------------------------------------------------------------------------

    def said(self, rank: int, said: Said) -> None:
        self.leader.said(rank, said)
        self._news.set()

    def made(self, told: list[tuple[str, Progress]]) -> None:
        self._on_made(told)

    def lost(self, why: str) -> None:
        """Perhaps because another rank is dead: its exit is waited for a moment, so that the right one is named."""
        if self._ending is None and not self._closing:
            loop = asyncio.get_running_loop()
            self._doubts.append(loop.call_later(LOCKSTEP_BLAME_SECONDS, self.end_whole, why))

    def _exited(self, rank: int, status: int) -> None:
        self.end_whole(f"rank {rank} has exited with status {status}")

    def _say(self, rank: int, word: msgspec.Struct) -> None:
        if rank < len(self.links):
            self.links[rank].post(word)

    # --- what they are asked -------------------------------------------------------------------------------------

    async def call(
        self, rank: int, body: msgspec.Struct, timeout_s: float = LOCKSTEP_CALL_SECONDS_MAX
    ) -> Any:
        """As `RankLink.call`; a rank that does not answer ends the group. Raises what the call means, `EngineGone`."""
        try:
            return await self.links[rank].call(body, timeout_s)
        except TimeoutError:
            self.end_whole(f"rank {rank} did not answer {type(body).__name__} within {timeout_s:.0f} s")
        except EngineGone as error:
            self.lost(str(error))
        await self.until(lambda: False)
        raise AssertionError("a group that ends is waited for until it has ended")

    async def call_all(self, body: msgspec.Struct, timeout_s: float) -> list[Any]:
        """Answers and exceptions, one a rank."""
        calls = (self.call(rank, body, timeout_s) for rank in range(self.size))
        return await asyncio.gather(*calls, return_exceptions=True)

    def hold(self, number: int, mode: str) -> None:
        for link in self.links:
            link.post(Hold(number, mode))

    def stood(self, number: int) -> bool:
        return all(link.said.stood >= number for link in self.links)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until something that ranks say makes it true. Raises `EngineGone` when the group ends, which it does when a rank's
        loop is silent meanwhile: with no step running, no step's deadline would find a frozen one."""
        silent_beats = 0
        while True:
            if self.why:
                raise EngineGone(self.why)
            if condition():
                return
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOCKSTEP_BEAT_SECONDS):
                    await self._news.wait()
                    continue
            silent = self._silent(LOCKSTEP_SILENCE_SECONDS_MAX)
            silent_beats = silent_beats + 1 if silent else 0
            if silent_beats >= SILENT_BEATS:
                self.end_whole(silent)

    def _silent(self, seconds: float) -> str:
        """Which ranks were not heard for so long, in words."""
        named = [
            f"rank {link.rank} has said nothing for {link.silent_for_s:.0f} s"
            for link in self.links
            if link.silent_for_s >= seconds
        ]
        return ", ".join(named)

    # --- end -----------------------------------------------------------------------------------------------------

    def end_whole(self, why: str) -> None:
        """Something has happened to a rank: all of them end, then `on_end` is told."""
        if self._ending is None and not self._closing:
            if silent := self._silent(MUTE_SECONDS):
                why = f"{why} ({silent})" if silent not in why else why
            self._ending = asyncio.create_task(self._end_whole(why), name="end of the group")

    async def _end_whole(self, why: str) -> None:
        _log.error("the group of %s is ended whole: %s", self._config.name, why)
        self.leader.close()
        left = await self._end_processes()
        if left:
            why += f"; ranks {left} are not proven gone after {CHILD_GRACE_SECONDS:.0f} s"
        self.why = why
        self._news.set()
        self._on_end(why)

    async def end(self, leave_seconds: float = 0.0) -> None:
        """Ends it in order, within seconds: what does not leave by itself is killed. Idempotent."""
        if self.why:
            return
        if self._ending is not None:
            await asyncio.wait({self._ending})
            return
        self._closing = True
        for link in self.links if leave_seconds else []:
            link.post(Leave())
        if leave_seconds and self.links:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(leave_seconds):
                    await self.processes.wait_exited()
        self.leader.close()
        await self._end_processes()
        self.why = self.why or "the engine was stopped"
        self._news.set()

    async def _end_processes(self) -> list[int]:
        """The ranks that are not proven gone."""
        for doubt in self._doubts:
            doubt.cancel()
        left = await self.processes.end(CHILD_GRACE_SECONDS)
        await asyncio.gather(*(link.close() for link in self.links))
        if self._parent is not None:
            for fd in self._parent:
                os.close(fd)
            self._parent = None
        for left_behind in (self._meeting, *(self._socket(rank) for rank in range(self.size))):
            self._host.files.remove(Path(left_behind))
        return left

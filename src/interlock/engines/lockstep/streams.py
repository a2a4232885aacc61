"""The requests of a lockstep group: each on one rank, or waiting here while there is none."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping

from interlock.engines.base import EngineGone, Progress, RequestRejected, RequestState, Work
from interlock.engines.lockstep.group import Group
from interlock.engines.lockstep.words import Abort, Begin, PutBack


class Stream:
    """One request: on a rank, or (`rank` None) waiting."""

    def __init__(self, work: Work, state: RequestState | None = None) -> None:
        self.work, self.state = work, state
        self.queue: asyncio.Queue[Progress | Exception] = asyncio.Queue()
        self.rank: int | None = None
        self.opening: asyncio.Future[None] | None = None
        self.over = False
        """Its iterator has ended."""
        self.closed = False
        """It begins on no rank any more."""
        self.late = False
        """It came during a pause, which is none of its business."""

    @property
    def key(self) -> str:
        return self.work.key


class Streams:
    """All of them. `group`: where they run; None: they wait, and what is asked of them is answered here."""

    def __init__(self) -> None:
        self.group: Group | None = None
        self._all: dict[str, Stream] = {}

    def __getitem__(self, key: str) -> Stream:
        return self._all[key]

    @property
    def waiting(self) -> int:
        return sum(stream.rank is None for stream in self._all.values())

    async def run(self, stream: Stream) -> AsyncGenerator[Progress, None]:
        """As `Engine.generate`."""
        if stream.key in self._all:
            raise RequestRejected(f"a request named {stream.key} is here already")
        self._all[stream.key] = stream
        try:
            await self._open(stream)
            while not stream.over:
                told = await stream.queue.get()
                if isinstance(told, Exception):
                    stream.over = True
                    raise told
                stream.over = bool(told.finish)
                yield told
        except RequestRejected:
            stream.over = True
            raise
        finally:
            del self._all[stream.key]
            if not stream.over and stream.rank is not None and self.group is not None:
                self.group.links[stream.rank].post(Abort(stream.key, told=False))
            stream.over = stream.closed = True

    async def _open(self, stream: Stream) -> None:
        """Gives it to the rank that has fewest, unless there is none. Raises `RequestRejected`, `EngineGone`."""
        group = self.group
        if group is None or stream.closed:
            return
        busy = Counter(other.rank for other in self._all.values())
        rank = stream.rank = min(range(group.size), key=lambda rank: (busy[rank], rank))
        stream.opening = asyncio.get_running_loop().create_future()
        try:
            await group.call(rank, PutBack(stream.state) if stream.state else Begin(stream.work))
        except RequestRejected:
            stream.rank = None
            raise
        finally:
            stream.opening.set_result(None)

    def made(self, told: list[tuple[str, Progress]]) -> None:
        """By a rank, in one step."""
        for key, progress in told:
            stream = self._all.get(key)
            if stream is not None:
                stream.closed = stream.closed or bool(progress.finish)
                stream.queue.put_nowait(progress)

    async def abort(self, key: str) -> None:
        """As `Engine.abort`."""
        stream = self._all.get(key)
        if stream is None:
            return
        if stream.rank is not None and self.group is not None:
            await self.group.call(stream.rank, Abort(key, told=True))
        else:
            self._end_here(stream)

    def abort_waiting(self) -> None:
        """A pause that aborts, while there is no rank: what came before the pause ends."""
        for stream in self._all.values():
            if not stream.late:
                self._end_here(stream)

    @staticmethod
    def _end_here(stream: Stream) -> None:
        if not stream.closed:
            stream.closed = True
            stream.queue.put_nowait(Progress([], [], "abort", 0))

    def fail(self, why: str) -> None:
        """The engine is gone, and every request hears of it."""
        for stream in self._all.values():
            stream.queue.put_nowait(EngineGone(why))

    def unpaused(self) -> None:
        for stream in self._all.values():
            stream.late = False

    # --- from one life of the ranks to the next ------------------------------------------------------------------

    def rank_of(self, key: str) -> int:
        """Raises `KeyError` for one that is not here, or on no rank."""
        stream = self._all.get(key)
        if stream is None or stream.rank is None:
            raise KeyError(f"there is no request {key} here")
        return stream.rank

    async def opened(self) -> None:
        """Until each that was given to a rank has been answered; with `group` None no other is given to one."""
        opening = [stream.opening for stream in self._all.values() if stream.opening is not None]
        await asyncio.gather(*opening)

    def states(self) -> list[RequestState]:
        return [stream.state for stream in self._all.values() if stream.state and not stream.closed]

    def left_ranks(self, states: Mapping[str, RequestState]) -> None:
        """The ranks are gone; this is what they knew."""
        for stream in self._all.values():
            stream.rank, stream.state = None, states.get(stream.key, stream.state)

    async def go_on(self, group: Group) -> None:
        """There are ranks again: what waits is given to them, in the order in which it came. Raises `EngineGone`."""
        self.group = group
        for stream in list(self._all.values()):
            if stream.rank is not None:
                continue
            try:
                await self._open(stream)
            except RequestRejected as error:
                begun = stream.state is not None and stream.state.tokens
                stream.queue.put_nowait(Progress([], [], "error", 0, str(error)) if begun else error)

"""A lockstep group as one engine: the runner's `Engine` over several ranks, of which each serves requests of its own.

A request goes to the rank that has fewest, and stays there. The walk is taken by all of them: a pause first has every rank hold
its requests, and the leader cease to grant; it is in force when every rank stands at the same step. This process loads no
model: what a suspension gives back are the ranks' processes, whole, while requests wait here as what cannot be computed
again (prompt, tokens, random generator).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

from interlock.core.limits import ENGINE_START_SECONDS_MAX
from interlock.core.targets import KeptCache, Mode, stricter
from interlock.engines.base import (
    Capabilities,
    Engine,
    EngineGone,
    EngineStartError,
    NotStanding,
    Progress,
    RequestState,
    UpdateFailed,
    Work,
)
from interlock.engines.checkpoint import BadCheckpoint, check_data_parallel, read_shape
from interlock.engines.lockstep.group import PROGRAM, Group
from interlock.engines.lockstep.streams import Stream, Streams
from interlock.engines.lockstep.words import States, StatesPage, Take, Taken, Update
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.base import Host
from interlock.wire.fleet_messages import Load

STOP_SECONDS = 2.0


class LockstepEngine(Engine):
    """`engines.base.Engine` over `config.data_parallel` ranks. `program`: what a rank's process is started as."""

    def __init__(self, host: Host, config: TransformersConfig, *, program: Sequence[str] = PROGRAM) -> None:
        self._host, self._config, self._program = host, config, program
        self._epoch = 0
        self._group: Group | None = None
        self._living: set[Group] = set()
        """With processes: the one that computes, and one that is on its way up or down."""
        self._streams = Streams()
        self._death: asyncio.Future[str] | None = None
        self._stopping = False
        self._held: Mode | None = None
        self._holds = 0
        self._released = 0
        """The last hold that was an unpause."""
        self._whole_weights = True
        self._updated: tuple[str, str] | None = None
        """Path and version of the last update, for ranks that start anew."""
        self._counted: Counter[str] = Counter()
        """By ranks that are no more."""

    # --- start and end -------------------------------------------------------------------------------------------

    async def start(self) -> Capabilities:
        self._check()
        self._death = asyncio.get_running_loop().create_future()
        self._group, capabilities = await self._start_group()
        self._streams.group = self._group
        self._group.leader.proceed()
        return capabilities

    def _check(self) -> None:
        """What can be said before a rank's process loads anything. Raises `EngineStartError`."""
        if self._config.tensor_parallel > 1:
            raise EngineStartError(
                f"--tp {self._config.tensor_parallel}: a rank of a lockstep group is whole but for the experts, and is not "
                "split further; leave --tp out"
            )
        try:
            check_data_parallel(read_shape(self._config.model), self._config.data_parallel)
        except BadCheckpoint as error:
            raise EngineStartError(str(error)) from error

    async def _start_group(self) -> tuple[Group, Capabilities]:
        """A new life of the ranks, which stand before their first step. Raises `EngineStartError`, `EngineGone` by a stop."""
        self._epoch += 1
        group = Group(
            self._host,
            self._config,
            self._epoch,
            on_made=self._streams.made,
            on_end=lambda why: self._died(group, why),
            program=self._program,
        )
        self._living.add(group)
        try:
            capabilities = await group.start()
        except BaseException:
            await self._end(group)
            self._alive()
            raise
        return group, capabilities

    async def _end(self, group: Group, leave_seconds: float = 0.0) -> None:
        await group.end(leave_seconds)
        self._living.discard(group)

    def _died(self, group: Group, why: str) -> None:
        """The group has ended by itself; no process of it is left. One that is on its way up or down is no death."""
        if self._stopping or group is not self._group:
            return
        if self._death is not None and not self._death.done():
            self._death.set_result(why)
        self._streams.fail(why)

    async def stop(self) -> None:
        self._stopping = True
        self._streams.fail("the engine was stopped")
        await asyncio.gather(*(self._end(group, STOP_SECONDS) for group in list(self._living)))

    async def died(self) -> str:
        if self._death is None:
            raise EngineGone("the engine was not started")
        why = await asyncio.shield(self._death)
        if self._stopping:
            await asyncio.get_running_loop().create_future()
        return why

    def _alive(self) -> None:
        if self._death is None or self._stopping:
            raise EngineGone("the engine was stopped" if self._stopping else "the engine was not started")
        if self._death.done():
            raise EngineGone(self._death.result())

    @property
    def group(self) -> Group:
        """Raises `EngineGone`, and `NotStanding` while suspended."""
        self._alive()
        if self._group is None:
            raise NotStanding("this engine is suspended; resume it first")
        return self._group

    # --- requests ------------------------------------------------------------------------------------------------

    async def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        async for progress in self._run(Stream(work)):
            yield progress

    async def put(self, state: RequestState) -> AsyncGenerator[Progress, None]:
        async for progress in self._run(Stream(state.work, state)):
            yield progress

    def _run(self, stream: Stream) -> AsyncGenerator[Progress, None]:
        self._alive()
        stream.late = self._held is not None
        return self._streams.run(stream)

    async def abort(self, key: str) -> None:
        self._alive()
        await self._streams.abort(key)

    async def take(self, key: str) -> RequestState:
        group = self.group
        self._demand_standing("taking a request out")
        taken: Taken = await group.call(self._streams.rank_of(key), Take(key))
        return taken.state

    async def states(self) -> list[RequestState]:
        self._alive()
        self._demand_standing("copying the requests' states")
        return self._streams.states() if self._group is None else await self._states_in(self._group)

    async def _states_in(self, group: Group) -> list[RequestState]:
        shares = await asyncio.gather(*(self._states_of(group, rank) for rank in range(group.size)))
        return [state for share in shares for state in share]

    @staticmethod
    async def _states_of(group: Group, rank: int) -> list[RequestState]:
        states: list[RequestState] = []
        while True:
            page: StatesPage = await group.call(rank, States(len(states)))
            states += page.states
            if not page.more:
                return states

    # --- the walk ------------------------------------------------------------------------------------------------

    async def pause(self, mode: Mode) -> None:
        self._alive()
        group = self._group
        if stricter(mode, self._held):
            self._held = mode
        assert self._held is not None
        if group is None:
            if mode is Mode.ABORT:
                self._streams.abort_waiting()
            return
        self._holds += 1
        number = self._holds
        group.hold(number, self._held)

        def released() -> bool:  # by a stricter pause that overtook this one, and an unpause after it
            return self._released > number

        if self._held is Mode.WAIT:
            await group.until(lambda: released() or group.stood(number))
        if not released():
            group.leader.pause()
        await group.until(lambda: released() or (group.leader.paused and group.stood(number)))

    def _demand_standing(self, what: str) -> None:
        group = self._group
        if self._held is None or (
            group is not None and not (group.leader.paused and group.stood(self._holds))
        ):
            raise NotStanding(f"{what} needs a paused engine; this one runs")

    async def unpause(self) -> None:
        self._alive()
        if self._held is None:
            return
        if self._group is None:
            raise NotStanding("a suspended engine must be resumed before it runs")
        if not self._whole_weights:
            raise UpdateFailed("the engine has no whole weights; update them again, or stop it")
        group = self._group
        self._holds += 1
        number = self._holds
        group.hold(number, "")
        await group.until(lambda: group.stood(number))
        self._held, self._released = None, number
        self._streams.unpaused()
        group.leader.proceed()

    async def update_weights(
        self,
        path: Path,
        version: str,
        kv: KeptCache = KeptCache.RECOMPUTE,
    ) -> None:
        self._demand_standing("an update of weights")
        if self._group is None:
            raise NotStanding("an update of weights needs a resumed engine; this one is suspended")
        self._whole_weights = False
        await self._update(self._group, str(path), version, kv)
        self._whole_weights, self._updated = True, (str(path), version)

    async def _update(self, group: Group, path: str, version: str, kv: KeptCache) -> None:
        """On every rank, or the group has no weights. Raises `UpdateFailed`, `EngineGone`."""
        answers = await group.call_all(Update(path, version, kv), ENGINE_START_SECONDS_MAX)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        for failure in failures:
            if isinstance(failure, EngineGone):
                raise failure
        if failures:
            named = "; ".join(
                f"rank {rank}: {answer}"
                for rank, answer in enumerate(answers)
                if isinstance(answer, BaseException)
            )
            raise UpdateFailed(f"the group has no weights that all its ranks share: {named}") from failures[0]

    async def suspend(self) -> None:
        self._alive()
        self._demand_standing("a suspension")
        if self._group is None:
            return
        group, self._streams.group = self._group, None
        try:
            await self._streams.opened()
            states = {state.work.key: state for state in await self._states_in(group)}
        except BaseException:  # it is paused as before
            await self._streams.go_on(group)
            raise
        self._group = None
        await self._end(group, STOP_SECONDS)
        self._streams.left_ranks(states)
        for link in group.links:
            self._counted.update(link.counts)

    async def resume(self) -> None:
        self._alive()
        if self._group is not None:
            return
        group, _ = await self._start_group()
        try:
            assert self._held is not None
            self._holds += 1
            number = self._holds
            group.hold(number, self._held)
            await group.until(lambda: group.leader.paused and group.stood(number))
            if self._updated is not None and self._whole_weights:
                await self._update(group, *self._updated, KeptCache.RECOMPUTE)
        except BaseException as error:
            await self._end(group)
            self._alive()
            if isinstance(error, EngineGone | UpdateFailed):
                raise EngineStartError(str(error)) from error
            raise
        self._group = group
        await self._streams.go_on(group)

    # --- what it is ----------------------------------------------------------------------------------------------

    def load(self) -> Load:
        waiting = self._streams.waiting
        if self._group is None:
            return Load(waiting=waiting)
        said = [link.said for link in self._group.links]
        running, queued = sum(one.running for one in said), sum(one.waiting for one in said)
        share = max((one.kv_used_share for one in said), default=0.0)
        if self._held is not None:
            return Load(waiting=waiting + running + queued, kv_used_share=share)
        return Load(running=running, waiting=waiting + queued, kv_used_share=share)

    def counts(self) -> Mapping[str, int]:
        counts = Counter(self._counted)
        for link in self._group.links if self._group is not None else []:
            counts.update(link.counts)
        return counts


def rank_states(engine: LockstepEngine) -> list[tuple[int, int]]:
    """(granted, reached) of each rank, as it said last."""
    return [(link.said.report.granted, link.said.report.reached) for link in engine.group.links]

"""The process that speaks for one engine: starts it, serves fronts at its desk, is a member of the fleet, and ends it.

    supervisor ──pipe──► runner ──► engine core ──► workers        one process group, one tree
                          │  └─ member ──► coordinator             target in, reports out
                          └─ desk ◄── fronts                       dispatches in, tokens out

It ends when its target is STOPPED (status 0), when the engine dies, when it is told to by a signal, or when the supervisor
is gone. Whatever the reason, no process of its tree is left: what does not leave by itself is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from interlock.core.lifecycle import MemberState
from interlock.core.limits import CHILD_GRACE_SECONDS, ENGINE_START_SECONDS_MAX
from interlock.core.targets import State
from interlock.engines.base import Capabilities, Engine, EngineStartError
from interlock.engines.desk import Desk
from interlock.engines.keeping import RequestsFile
from interlock.engines.member import Member
from interlock.host.base import Host, Listener
from interlock.wire.channel import Channel, serve_channels
from interlock.wire.engine_messages import FromFront
from interlock.wire.fleet_messages import EngineFacts
from interlock.wire.identity import Identity, load_identity

_log = logging.getLogger(__name__)

STATUS_STOPPED = 0
STATUS_FAILED = 1
STATUS_TOLD = 143
"""Ended by a signal or with its supervisor: not by its own decision, so a supervisor that lives starts it again."""
STOP_SECONDS_MAX = CHILD_GRACE_SECONDS / 2


class RunnerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a runner needs to know besides its engine."""

    name: str
    address: str
    """Where it listens for fronts, `unix:/path`."""
    coordinator: str
    state_dir: Path
    """A private directory of its own; its incarnation is kept there."""
    version: str
    """Of the weights that the engine loads at start."""
    weights: str = ""
    """The checkpoint it loads them from."""


class DeskKeeper:
    """The desk's requests in their file (`member.Keeper`)."""

    def __init__(self, desk: Desk, file: RequestsFile) -> None:
        self._desk, self._file = desk, file

    async def keep(self) -> None:
        await self._file.save(await self._desk.kept())

    async def go_on(self) -> None:
        await self._file.empty()
        self._desk.go_on()

    def abort(self) -> None:
        self._desk.abort_waiting()

    async def end(self) -> None:
        await self._file.empty()


class Runner:
    """`run` is the whole life; `stop` ends it from outside."""

    def __init__(
        self,
        host: Host,
        engine: Engine,
        config: RunnerConfig,
        *,
        measure: Callable[[], int] | None = None,
    ) -> None:
        """`measure` says how many bytes are resident in all processes of this engine, and may block."""
        self._host, self._engine, self._config = host, engine, config
        self._measure = measure
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._member: Member | None = None
        self.desk: Desk | None = None

    @property
    def member_state(self) -> MemberState:
        return self._member.state if self._member is not None else MemberState()

    def stop(self, why: str, status: int = STATUS_TOLD) -> None:
        """Ends `run` with this status; the first call counts."""
        if not self._end.done():
            _log.info("leaving: %s", why)
            self._end.set_result(status)

    async def run(self) -> int:
        """The exit status. Raises `EngineStartError` when the engine cannot start."""
        self._host.files.make_private_dir(self._config.state_dir)
        me = load_identity(self._host, self._config.state_dir, self._config.name)
        try:
            capabilities = await self._start_engine()
            if capabilities is None:
                return await self._end
            await self._serve(me, capabilities)
            return await self._end
        finally:
            await self._bounded(self._engine.stop(), "the engine's stop")

    async def _start_engine(self) -> Capabilities | None:
        """None when told to end meanwhile."""
        starting = asyncio.create_task(self._engine.start(), name="engine start")
        waits: set[asyncio.Future[Any]] = {starting, self._end}
        done, _ = await asyncio.wait(
            waits, timeout=ENGINE_START_SECONDS_MAX, return_when=asyncio.FIRST_COMPLETED
        )
        if starting in done:
            return starting.result()
        starting.cancel()
        if not done:
            raise EngineStartError(
                f"the engine did not start within {ENGINE_START_SECONDS_MAX:.0f} s; "
                "its log says how far it came"
            )
        return None

    async def _serve(self, me: Identity, capabilities: Capabilities) -> None:
        facts = EngineFacts(
            address=self._config.address,
            model=capabilities.model,
            max_model_tokens=capabilities.max_model_tokens,
            engine=capabilities.kind,
            capabilities=[*capabilities.features, *capabilities.abilities],
            pid=os.getpid(),
        )
        self._member = Member(
            self._host,
            me,
            self._engine,
            coordinator=self._config.coordinator,
            facts=facts,
            weights=self._config.weights,
            leave=self._leave,
            measure=self._measure,
        )
        self.desk = Desk(
            self._host.clock,
            self._engine,
            self._member.judge,
            self._lost,
            lambda: self.member_state.version,
            computes=lambda: self.member_state.state is State.RUNNING,
            moves_requests=capabilities.moves_requests,
            max_model_tokens=capabilities.max_model_tokens,
        )
        file = RequestsFile(self._host, self._config.state_dir, self._config.name)
        self.desk.restore(await self._host.in_thread(file.load))
        self._member.keeper = DeskKeeper(self.desk, file)
        listener = await serve_channels(
            self._host, self._config.address, me=me, accept=FromFront, on_channel=self._on_channel
        )
        death = asyncio.create_task(self._watch_engine(), name="engine death")
        self._member.begin(self._config.version)
        _log.info("%s serves at %s", me, self._config.address)
        try:
            await asyncio.shield(self._end)
        finally:
            death.cancel()
            await self._close(listener)

    async def _on_channel(self, channel: Channel) -> None:
        assert self.desk is not None
        if channel.peer_role != "front":
            _log.warning("%s came as %r; only fronts are served here", channel.peer, channel.peer_role)
            return
        await self.desk.serve(channel)

    async def _watch_engine(self) -> None:
        self._died(await self._engine.died())

    def _lost(self, why: str) -> None:
        """A request has heard that its engine is gone. Where that is being stopped, it is the stop, which ends by itself."""
        if self.member_state.state not in (State.STOPPING, State.STOPPED):
            self._died(why)

    def _died(self, why: str) -> None:
        self.stop(f"the engine has died: {why}", STATUS_FAILED)

    def _leave(self, why: str, in_order: bool) -> None:
        self.stop(why, STATUS_STOPPED if in_order else STATUS_FAILED)

    async def _close(self, listener: Listener) -> None:
        assert self.desk is not None
        assert self._member is not None
        await self._bounded(self._member.close(), "the last report")
        await self._bounded(self.desk.close(), "the desk")
        await self._bounded(listener.close(), "the listener")

    async def _bounded(self, work: Awaitable[object], what: str) -> None:
        """Leaving takes a bounded time, whatever hangs."""
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(work, STOP_SECONDS_MAX)
        except TimeoutError:
            _log.warning("%s took more than %s s; going on without", what, STOP_SECONDS_MAX)
        except Exception as error:
            _log.warning("%s failed: %s", what, error)

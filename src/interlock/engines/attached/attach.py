"""`interlock.attach`: an engine that somebody else runs becomes a member of a fleet, for as long as the attachment lives.

    async with await interlock.attach(engine, coordinator=8000) as attached: ...      an AsyncLLM of this process
    async with await interlock.attach("http://10.0.0.7:8000") as attached: ...        a vllm serve, by its URL

The attachment speaks for the engine: it hears targets and walks the engine to them, reports what it is, and looks once a second whether
it still is so. What cannot be guaranteed for such an engine stands in `lacks`. Joining pauses the engine for a moment: a newcomer stands
before it runs, with the fleet's weights.

    life ──► walking ──► another life ...     it was started anew, a step failed, it was away too long: it joins again, as a newcomer
                    └──► ended                detached, STOPPED, dead, or its name has a newer life
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Any

from interlock.core.errors import InterlockError
from interlock.core.limits import (
    HEARTBEAT_SECONDS,
    HELLO_SECONDS_MAX,
    RECONNECT_SECONDS_MAX,
    SILENCE_SECONDS_MAX,
)
from interlock.core.targets import State
from interlock.engines.attached.calls import CallFailed, Calls, Unreachable, not_attached
from interlock.engines.attached.engine import AnotherLife, AttachedEngine, Update
from interlock.engines.attached.http_calls import Server
from interlock.engines.attached.in_process import InProcess
from interlock.engines.attached.lacks import LACKS, capabilities
from interlock.engines.base import EngineGone, EngineStartError
from interlock.engines.member import Member
from interlock.host.base import Host
from interlock.host.real import RealHost
from interlock.wire import fleet_messages as say
from interlock.wire.channel import connect_channel
from interlock.wire.identity import Identity, passing_identity

_log = logging.getLogger(__name__)


class Life(Identity):
    """One life of an attached engine. It has no state directory: the wall clock, and what a refuser knows, put it above the last."""

    def __init__(self, name: str, incarnation: int) -> None:
        super().__init__(name, incarnation, os.urandom(16))
        self.newest = incarnation
        """The newest life of this name that anybody told of."""

    def raise_above(self, highest: int, by: str) -> None:
        if self._accepted:
            self.newest = max(self.newest, highest)
            super().raise_above(highest, by)
        self._incarnation = self.newest = highest + 1

    def outlived(self, highest: int) -> None:
        self.newest = max(self.newest, highest)


class Attachment:
    """One attached engine. Made by `attach`; `detach`, or leave its `async with`, ends it."""

    lacks = LACKS
    """What cannot be guaranteed, by name, each with a sentence."""

    def __init__(
        self,
        host: Host,
        calls: Calls,
        *,
        name: str,
        coordinator: str,
        version: str,
        weights: str,
        update: Update | None,
    ) -> None:
        self.name = name
        self._host, self._calls, self._coordinator = host, calls, coordinator
        self._version, self._weights, self._update = version, weights, update
        self._me: Life | None = None
        self._engine: AttachedEngine | None = None
        self._member: Member | None = None
        self._drifts = 0
        self._left: asyncio.Future[tuple[str, bool]] | None = None
        self._task: asyncio.Task[str] | None = None

    # --- what it is -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The member's word of itself; STOPPED when the attachment has ended."""
        return self._member.state.state if self._member is not None else State.STOPPED

    @property
    def version(self) -> str | None:
        """Of its weights; None: unknown, after a failed update."""
        return self._member.state.version if self._member is not None else None

    @property
    def drifts(self) -> int:
        """How often somebody resumed it past us while it should have stood."""
        return self._drifts + (self._engine.drifts if self._engine is not None else 0)

    async def joined(self, timeout_s: float) -> None:
        """Returns once it stands where the coordinator told it to. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            while self._member is None or self._member.state.standing is None:
                await self._host.clock.sleep_s(HEARTBEAT_SECONDS / 10)

    async def ended(self) -> str:
        """Waits until the attachment has ended by itself, and says why: the engine is dead, or the fleet was STOPPED."""
        assert self._task is not None
        return await asyncio.shield(self._task)

    async def __aenter__(self) -> Attachment:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.detach()

    # --- its life -------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Raises `EngineStartError` for an engine that cannot be attached; then nothing has changed."""
        await self._new_life()
        self._task = asyncio.create_task(self._live(), name=f"attached {self.name}")

    async def detach(self) -> None:
        """The fleet counts it no more: neither waited for nor updated. It stays as it is, paused where the fleet is paused.

        A coordinator that is away is told nothing, and counts it SUSPECT until `interlock ctl forget` or its next attachment.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._end_life()
        await self._tell_gone()

    async def _live(self) -> str:
        while True:
            why, final = await self._watch()
            await self._end_life()
            if final:
                await self._tell_gone()
                _log.warning("%s is attached no more: %s", self.name, why)
                return why
            _log.warning("%s joins anew: %s", self.name, why)
            while True:
                await self._host.clock.sleep_s(RECONNECT_SECONDS_MAX)
                try:
                    await self._new_life()
                except EngineStartError as error:
                    _log.debug("%s: %s", self.name, error)
                except EngineGone as gone:
                    return str(gone)
                else:
                    break

    async def _new_life(self) -> None:
        self._engine = AttachedEngine(self._host, self._calls, self._update)
        found = await self._engine.describe()
        try:
            version = await self._engine.version()
        except (Unreachable, CallFailed) as error:
            raise not_attached(self._calls.where, error) from error
        last = self._me.incarnation if self._me is not None else 0
        self._me = Life(self.name, max(last + 1, self._host.clock.wall_ns()))
        self._left = asyncio.get_running_loop().create_future()
        facts = say.EngineFacts(
            address="",
            model=f"attached:{found.model}",
            max_model_tokens=found.max_model_tokens,
            engine="vllm",
            capabilities=capabilities(updates=True, suspends=found.sleeps),
            pid=found.pid,
        )
        self._member = Member(
            self._host,
            self._me,
            self._engine,
            coordinator=self._coordinator,
            facts=facts,
            weights=self._weights,
            leave=self._leave,
        )
        self._member.begin(version or self._version)

    def _leave(self, why: str, in_order: bool) -> None:
        assert self._left is not None
        if not self._left.done():
            self._left.set_result((why, in_order))

    async def _watch(self) -> tuple[str, bool]:
        """Until this life is over: why, and whether no other shall follow."""
        assert self._engine is not None
        assert self._me is not None
        assert self._left is not None
        seen_s = self._host.clock.monotonic_s()
        while True:
            done, _ = await asyncio.wait({self._left}, timeout=HEARTBEAT_SECONDS)
            if done:
                why, in_order = self._left.result()
                return (
                    why,
                    in_order or self._me.newest > self._me.incarnation,
                )  # another attachment has its name
            try:
                await self._engine.look()
                seen_s = self._host.clock.monotonic_s()
            except EngineGone as gone:
                return str(gone), True
            except AnotherLife as error:
                return str(error), False
            except (Unreachable, CallFailed) as error:
                silent_s = self._host.clock.monotonic_s() - seen_s
                if silent_s > SILENCE_SECONDS_MAX and not self._stepping:
                    return f"it was away for {silent_s:.0f} s: {error}", False

    @property
    def _stepping(self) -> bool:
        """A step asks by itself until the engine answers, and decides itself when that is over."""
        assert self._member is not None
        return self._member.state.state not in (State.RUNNING, State.PAUSED, State.SUSPENDED)

    async def _end_life(self) -> None:
        member, self._member = self._member, None
        if self._engine is not None:
            self._drifts += self._engine.drifts
            self._engine = None
        if member is not None:
            await member.close()

    async def _tell_gone(self) -> None:
        """To the coordinator, once: nobody is to wait for this member any more."""
        if self._me is None:
            return
        with contextlib.suppress(OSError, TimeoutError, InterlockError):
            channel = await connect_channel(
                self._host,
                self._coordinator,
                me=passing_identity(self._host, "detach"),
                role="admin",
                accept=say.Membership,
                deadline_s=HELLO_SECONDS_MAX,
            )
            try:
                await channel.request(say.MemberGone(self.name, self._me.incarnation), HELLO_SECONDS_MAX)
            finally:
                await channel.close()


async def attach(
    engine: Any,
    *,
    coordinator: str,
    name: str | None = None,
    version: str = "0",
    weights: str | Path = "",
    update: Update | None = None,
    api_key: str | None = None,
    sleeps: bool = False,
    host: Host | None = None,
) -> Attachment:
    """Makes `engine` a member of the fleet whose coordinator is at `coordinator`.

    `engine`: a vLLM `AsyncLLM` on this loop, or the URL of a server with its development endpoints. `name`: what the member is called;
    no two have the same. `version`, `weights`: what its weights are called and where their checkpoint lies, unless vLLM itself names
    them. `update`: how it gets new weights (checkpoint directory, version), where vLLM's `reload_weights` is not how. `api_key` and
    `sleeps` (it was started with --enable-sleep-mode) are for a server by URL.

    A coordinator that is away is waited for, in the background. Raises `EngineStartError` for an engine that cannot be attached, and
    TypeError or ValueError for what is neither an engine nor a URL.
    """
    host = host or RealHost()
    calls: Calls
    if isinstance(engine, str):
        server = Server(engine, api_key=api_key, sleeps=sleeps)
        calls, default = server, server.name
    elif callable(getattr(engine, "pause_generation", None)):
        calls, default = InProcess(engine), f"attached-{os.getpid()}"
    else:
        raise TypeError(
            f"{type(engine).__name__} can not be attached: give a vLLM AsyncLLM, or the URL of a vLLM server"
        )
    attachment = Attachment(
        host,
        calls,
        name=name or default,
        coordinator=coordinator,
        version=version,
        weights=str(weights),
        update=update,
    )
    await attachment.begin()
    return attachment

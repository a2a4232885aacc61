"""The engine as a member of the fleet: hears targets, walks to them by `core.lifecycle`, and reports what it is.

The protocol is core's; here its effects become calls to the engine and words to the coordinator. A coordinator that is away
changes nothing: the member stays what it is and keeps trying to connect, for ever, at most once a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from interlock.core import lifecycle, targets
from interlock.core.errors import InterlockError, ProtocolError, StaleError
from interlock.core.identity import Epoch
from interlock.core.lifecycle import (
    Admission,
    AnswerHigher,
    Begin,
    Leave,
    MemberEvent,
    MemberState,
    Report,
    StepFailed,
    StepFinished,
    TargetHeard,
    TryAgain,
)
from interlock.core.limits import (
    FACT_CHARS_MAX,
    HEARTBEAT_SECONDS,
    HELLO_SECONDS_MAX,
    RECONNECT_SECONDS_MAX,
    RECONNECT_SECONDS_MIN,
    STEP_RETRY_SECONDS_MAX,
    STEP_RETRY_SECONDS_MIN,
)
from interlock.core.targets import Mode, State, Step
from interlock.engines.base import Engine, EngineGone, EngineStartError, Unable, UpdateFailed
from interlock.engines.keeping import KeepFailed
from interlock.host.base import Host
from interlock.wire import fleet_messages as wire
from interlock.wire.channel import Channel, connect_channel
from interlock.wire.identity import Identity

_log = logging.getLogger(__name__)


class Keeper(Protocol):
    """Who keeps the engine's requests when its memory is given up."""

    async def keep(self) -> None:
        """They are on disk. Raises `KeepFailed`."""
        ...

    async def go_on(self) -> None:
        """Before the engine steps: what is on disk is true no more, and is taken back. Raises `KeepFailed`."""
        ...

    def abort(self) -> None:
        """A pause that aborts has begun."""
        ...

    async def end(self) -> None:
        """The engine stops, and its requests with it: no later life shall find them. Raises `KeepFailed`."""
        ...


class Member:
    """One life of one engine. `leave` is called once, with the reason, when this process shall end."""

    def __init__(
        self,
        host: Host,
        me: Identity,
        engine: Engine,
        *,
        coordinator: str,
        facts: wire.EngineFacts,
        weights: str = "",
        leave: Callable[[str, bool], None],
        measure: Callable[[], int] | None = None,
    ) -> None:
        self._host, self._me, self._engine = host, me, engine
        self._coordinator, self._facts, self._leave = coordinator, facts, leave
        self._weights = weights  # what the engine was started with
        self._measure = measure  # bytes resident in all processes of the engine; blocks
        self.keeper: Keeper | None = None
        self.memory: wire.Memory | None = None
        self.state = MemberState()
        self._changed = asyncio.Event()
        self._step: asyncio.Task[None] | None = None
        self._retry_s = STEP_RETRY_SECONDS_MIN
        self._closing = False
        self._link: asyncio.Task[None] | None = None
        self._channel: Channel | None = None

    def begin(self, version: str) -> None:
        """The engine has started, with the weights of `version`: join the fleet."""
        self._apply(StepFinished(self.state.attempt, version))
        self._link = asyncio.create_task(self._keep_connected(), name="coordinator link")
        self._link.add_done_callback(self._on_end)

    async def close(self) -> None:
        """Says what we are for the last time, if anybody listens, and stops listening."""
        self._closing = True
        if self._channel is not None:
            with contextlib.suppress(ConnectionError):
                await self._channel.send(self.report())
            await self._channel.close()
        tasks = [task for task in (self._link, self._step) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def judge(self, epoch: Epoch) -> tuple[Admission, Epoch, str]:
        """For the desk: whether work of this epoch may begin now."""
        return lifecycle.admission(self.state, epoch), self.state.epoch, self.state.state.value

    # --- the walk ------------------------------------------------------------------------------------------------

    def _apply(self, event: MemberEvent) -> None:
        before = self.state.state
        self.state, effects = lifecycle.transition(self.state, event)
        if self.state.state is not before:
            _log.info("%s -> %s at epoch %s", before, self.state.state, self.state.epoch)
        for effect in effects:
            match effect:
                case Begin():
                    self._begin_step(effect)
                case (
                    Report() | AnswerHigher()
                ):  # a report carries the highest target heard, so it answers both
                    self._changed.set()
                case Leave(why):
                    self._changed.set()
                    self._leave(why, self.state.failed is None)

    def _begin_step(self, begin: Begin) -> None:
        if self._step is not None and self._step is not asyncio.current_task():
            self._step.cancel()  # by core's leave: for a stricter pause, or one that failed and waits to be tried again
        self._step = asyncio.create_task(self._take(begin), name=f"step {begin.step}")
        self._step.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """A defect of ours: better a new life of this engine than one that nobody hears or that stands half way."""
        if task.cancelled():
            if (
                task is self._step and not self._closing
            ):  # by whoever is below us: nobody else would end this step
                self._leave(f"{task.get_name()} was cancelled in the engine", False)
        elif (error := task.exception()) is not None:
            _log.error("%s failed", task.get_name(), exc_info=error)
            self._leave(f"{task.get_name()} failed: {type(error).__name__}: {error}", False)

    async def _take(self, begin: Begin) -> None:
        try:
            version = await self._perform(begin)
        except NotImplementedError as error:
            self._apply(StepFailed(begin.attempt, str(error), unchanged=True))
        except EngineGone as error:
            self._leave(str(error), False)
        except UpdateFailed as error:
            self._apply(StepFailed(begin.attempt, str(error)))
        except (KeepFailed, EngineStartError) as error:  # the latter in a resume: it is still suspended
            self._apply(StepFailed(begin.attempt, str(error), unchanged=True, may_pass=True))
            await self._try_again_later(begin.attempt)
        except Exception as error:
            _log.exception("%s failed", begin.step)
            self._apply(StepFailed(begin.attempt, f"{begin.step} failed: {type(error).__name__}: {error}"))
        else:
            self._retry_s = STEP_RETRY_SECONDS_MIN
            self._apply(StepFinished(begin.attempt, version))

    async def _try_again_later(self, attempt: int) -> None:
        """A full disk, no memory: such things pass, and nobody else would ask for the step again."""
        if not self.state.waits:
            return  # the walk goes on by another way
        retry_s, self._retry_s = self._retry_s, min(2 * self._retry_s, STEP_RETRY_SECONDS_MAX)
        await self._host.clock.sleep_s(retry_s)
        self._apply(TryAgain(attempt))

    async def _perform(self, begin: Begin) -> str | None:
        """Takes the step; which weights the engine has then."""
        engine = self._engine
        keeper = self.keeper
        match begin.step:
            case Step.PAUSE:
                if keeper is not None and begin.mode is Mode.ABORT:
                    keeper.abort()
                await engine.pause(begin.mode)
            case Step.UNPAUSE:
                if keeper is not None:
                    await keeper.go_on()
                await engine.unpause()
            case Step.UPDATE:
                await engine.update_weights(self._checkpoint(begin), begin.version, begin.kv)
                return begin.version
            case Step.SUSPEND:
                await self._suspend()
            case Step.RESUME:
                await engine.resume()
                self.memory = wire.Memory(await self._resident_bytes())
            case Step.STOP:
                if keeper is not None:
                    with contextlib.suppress(
                        KeepFailed
                    ):  # a later life finds them; their front has ended them by then
                        await keeper.end()
                with contextlib.suppress(EngineGone):  # it is what was asked for
                    await engine.stop()
                return None
            case _:
                raise NotImplementedError(f"{begin.step} is no step that a member takes")
        return self.state.version

    async def _suspend(self) -> None:
        before = await self._resident_bytes()
        if self.keeper is not None:
            await self.keeper.keep()
        await self._engine.suspend()
        after = await self._resident_bytes()
        self.memory = wire.Memory(after, max(0, before - after))
        if before:
            _log.info("suspended: %d of %d MiB given back", (before - after) >> 20, before >> 20)

    async def _resident_bytes(self) -> int:
        return await self._host.in_thread(self._measure) if self._measure is not None else 0

    def _checkpoint(self, begin: Begin) -> Path:
        where = begin.weights or self._weights
        if not where:
            raise Unable(
                f"nobody says where the weights of version {begin.version!r} lie: name their checkpoint"
            )
        return Path(where)

    # --- the coordinator -----------------------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        pause_s = RECONNECT_SECONDS_MIN
        while True:
            try:
                channel = await connect_channel(
                    self._host,
                    self._coordinator,
                    me=self._me,
                    role="engine",
                    accept=wire.Target,
                    deadline_s=HELLO_SECONDS_MAX,
                )
            except StaleError as error:
                self._leave(str(error), False)
                return
            except (OSError, TimeoutError, InterlockError) as error:
                _log.debug("the coordinator cannot be reached: %s", error)
            else:
                pause_s = RECONNECT_SECONDS_MIN
                try:
                    await self._converse(channel)
                except StaleError as error:
                    self._leave(str(error), False)
                    return
                except (OSError, InterlockError) as error:
                    _log.warning("the channel to the coordinator ended: %s", error)
                finally:
                    await channel.close()
            # Jitter: after a coordinator's restart a thousand engines come back, not all in one moment.
            await self._host.clock.sleep_s(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, RECONNECT_SECONDS_MAX)

    async def _converse(self, channel: Channel) -> None:
        self._channel = channel
        reporter = asyncio.create_task(self._report(channel), name="reports")
        reporter.add_done_callback(self._on_end)
        try:
            async for received in channel.messages():
                if isinstance(received.body, wire.Target):
                    self._hear(received.body)
        finally:
            self._channel = None
            reporter.cancel()
            await asyncio.gather(reporter, return_exceptions=True)

    def _hear(self, told: wire.Target) -> None:
        try:
            self._apply(TargetHeard(_heard(told)))
        except (ValueError, ProtocolError) as error:
            _log.error("the coordinator's target is refused: %s", error)

    async def _report(self, channel: Channel) -> None:
        """On every change and at every heartbeat; the first one registers us."""
        with contextlib.suppress(ConnectionError):
            while True:
                self._changed.clear()
                await channel.send(self.report())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await self._changed.wait()

    def report(self) -> wire.MemberReport:
        state = self.state
        return wire.MemberReport(
            facts=self._facts,
            state=state.state.value,
            epoch=state.epoch,
            standing=state.standing,
            version=state.version,
            load=self._engine.load(),
            heard=_told(state.heard) if state.heard is not None else None,
            failed=state.failed and state.failed[:FACT_CHARS_MAX],
            memory=self.memory,
        )


def _heard(told: wire.Target) -> targets.Target:
    """Raises `ValueError` for words that are no state, no mode, or no state that can be a target."""
    state = State(told.state)
    if state not in targets.TARGETS:
        raise ValueError(f"{state} cannot be a target")
    holds = tuple(targets.Hold(h.owner, Mode(h.mode), h.deadline_s) for h in told.holds)
    return targets.Target(
        told.epoch,
        state,
        Mode(told.mode),
        told.version,
        holds,
        told.weights,
        targets.KeptCache(told.kv),
    )


def _told(target: targets.Target) -> wire.Target:
    holds = [wire.Hold(h.owner, h.mode.value, h.deadline_s) for h in target.holds]
    return wire.Target(
        target.epoch,
        target.state.value,
        target.mode.value,
        target.version,
        holds,
        target.weights,
        target.kv.value,
    )

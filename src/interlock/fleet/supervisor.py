"""`interlock serve`: starts a fleet's processes on this machine, starts again what dies, and ends them all.

It has no state and no port; nobody asks it anything. What it knows it sees: exits of its children. A dead engine's whole tree
is ended and proven gone before the coordinator hears `MemberGone` and a new life begins, at most a few times a minute. Its
own death is seen by its children (a pipe ends), who then leave; the last of them removes the run directory.

    starting ──► ready ◄──► stopped          every engine STOPPED by the fleet's target; START, by its target as well
                   └───────────┴──► leaving  a signal, a start that failed, or the end of a stopped fleet asked for

A fleet that is stopped keeps its coordinator, front and store: somebody must hear START. The supervisor looks at the target
once in a while then, and starts the engines when it is STOPPED no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from interlock.core.limits import (
    CHILD_GRACE_SECONDS,
    ENGINE_RESTARTS_PER_MINUTE_MAX,
    ENGINE_START_SECONDS_MAX,
    PART_START_SECONDS_MAX,
)
from interlock.core.targets import State
from interlock.fleet.client import FleetClient
from interlock.fleet.ended_lives import EndedLives
from interlock.fleet.launchers.local import LocalLauncher, Part
from interlock.fleet.plan import FleetPlan
from interlock.fleet.probes import PROBE_ANSWER_SECONDS_MAX, Probe, Probes
from interlock.host.base import Child, Host

_log = logging.getLogger(__name__)

PROBE_SECONDS = 0.25
STILL_SECONDS = 15.0
"""How often a part that takes long is said to be still on its way."""
MINUTE_SECONDS = 60.0
LAST_ANSWER_SECONDS = 0.5
"""After the last engine was reported gone: the coordinator tells whoever asked for the STOP that it is done."""
FRONT_DRAIN_SECONDS = 2.0

Say = Callable[[str], None]


class StartFailed(Exception):  # noqa: N818 - says what is, as the others do
    """A part did not come up; the message is for the operator."""


class _Kept:
    """One part and its current life."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.child: Child | None = None
        self.starts: deque[float] = deque(maxlen=ENGINE_RESTARTS_PER_MINUTE_MAX)
        self.stopped = False
        self.up = False
        """It was seen to be up since the fleet began to start."""
        self.task: asyncio.Task[None] | None = None


class Supervisor:
    """`run` starts the plan and returns the exit status; `leave` ends it."""

    def __init__(self, host: Host, launcher: LocalLauncher, plan: FleetPlan, say: Say) -> None:
        self._host, self._launcher, self._plan, self._say = host, launcher, plan, say
        self._client = FleetClient(host, plan.coordinator_address)
        self._probes = Probes(host, plan, self._client)
        self._kept = {part.name: _Kept(part) for part in plan.parts}
        self._engines = [self._kept[part.name] for part in plan.engines]
        self._ready = False
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._ended = EndedLives(host, self._client, plan.states)
        self._aside: set[asyncio.Task[None]] = set()
        """What else is under way beside the parts' own tasks."""
        self._leaving = asyncio.Event()
        self._resting: asyncio.Task[None] | None = None

    def leave(self, why: str, status: int = 0) -> None:
        """Ends `run` with this status; the first call counts."""
        if not self._end.done():
            self._say(why)
            self._end.set_result(status)

    async def run(self) -> int:
        """Until told to leave, until every engine is STOPPED, or until the start has failed (status 1)."""
        started_s = self._host.clock.monotonic_s()
        start = asyncio.create_task(self._start(), name="start")
        try:
            waits: set[asyncio.Future[Any]] = {start, self._end}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                start.cancel()
            elif (error := start.exception()) is not None:
                if not isinstance(error, StartFailed):
                    raise error
                self.leave(str(error), 1)
            else:
                self._ready = True
                self._announce(self._host.clock.monotonic_s() - started_s)
            return await self._end
        finally:
            start.cancel()  # also where this task was cancelled: a Ctrl-C before `serve` has its handlers
            await asyncio.gather(start, return_exceptions=True)
            await self._leave_in_order()

    # --- starting ------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        plan, probes = self._plan, self._probes
        self._say("starting " + ", ".join(self._kept))
        for kept in self._kept.values():
            if kept not in self._engines:
                self._begin(kept)
        if plan.outlives:
            await self._coordinator_up()
            if await probes.target() == State.STOPPED:
                await self._front_up()
                for kept in self._engines:
                    kept.stopped = True
                self._say("the fleet is STOPPED, as it was left; `interlock ctl start` starts its engines")
                self._rest()
                return
        waits = [self._front_up()]
        if not plan.outlives:
            waits.append(self._coordinator_up())
        if plan.store is not None:
            waits.append(self._up(plan.store.name, probes.store, PART_START_SECONDS_MAX))
        for kept in self._engines:
            self._begin(kept)
            name = kept.part.name
            waits.append(self._up(name, probes.member(name), ENGINE_START_SECONDS_MAX))
        tasks = [asyncio.create_task(wait) for wait in waits]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _coordinator_up(self) -> None:
        await self._up(self._plan.coordinator.name, self._probes.coordinator, PART_START_SECONDS_MAX)

    async def _front_up(self) -> None:
        await self._up(self._plan.front.name, self._probes.front, PART_START_SECONDS_MAX)

    def _begin(self, kept: _Kept) -> None:
        kept.stopped = kept.up = False
        kept.child = None
        kept.task = asyncio.create_task(self._keep(kept), name=f"keep {kept.part.name}")
        kept.task.add_done_callback(self._on_end)

    async def _up(self, name: str, probe: Probe, seconds_max: float) -> None:
        """Says when the part is up. Raises `StartFailed` when it died or took too long."""
        begun_s = said_s = self._host.clock.monotonic_s()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_ANSWER_SECONDS_MAX):
                    if await probe():
                        break
            now = self._host.clock.monotonic_s()
            if now - said_s >= STILL_SECONDS:
                said_s = now
                self._say(f"  {name:<12} starting, {now - begun_s:.0f} s so far")
            child = self._kept[name].child
            if child is not None and child.returncode is not None:
                raise StartFailed(f"{name} could not start: {self._launcher.last_words(name)}")
            if self._host.clock.monotonic_s() - begun_s > seconds_max:
                raise StartFailed(
                    f"{name} was not up after {seconds_max:.0f} s: {self._launcher.last_words(name)}"
                )
            await self._host.clock.sleep_s(PROBE_SECONDS)
        self._kept[name].up = True
        self._say(f"  {name:<12} up after {self._host.clock.monotonic_s() - begun_s:5.1f} s")

    def _announce(self, seconds: float) -> None:
        host = self._plan.reachable_host
        host = f"[{host}]" if ":" in host else host
        url = f"http://{host}:{self._plan.http_port}"
        self._say(f"ready in {seconds:.1f} s: {url}/v1  (Ctrl-C ends it)")
        if self._plan.outlives:
            self._beside(self._say_target(), "say the target")
        if self._plan.example:
            self._say(self._plan.example.format(url=url))

    async def _say_target(self) -> None:
        """What it was left in, where that is not RUNNING."""
        target = await self._probes.target()
        if target not in (None, State.RUNNING, State.STOPPED):
            self._say(f"the fleet is {target}, as it was left; `interlock ctl status` says who holds it")

    # --- keeping -------------------------------------------------------------------------------------------------

    async def _keep(self, kept: _Kept) -> None:
        """Starts the part, again and again, until the fleet leaves or the part is STOPPED."""
        part, clock = kept.part, self._host.clock
        while not self._leaving.is_set():
            await clock.sleep_s(self._pause_s(kept))
            if self._leaving.is_set():
                return  # who is started now is in nobody's list of what has to be ended
            kept.starts.append(clock.monotonic_s())
            self._ended.next_begins(part.name)
            try:
                kept.child = await self._launcher.start(part)
            except OSError as error:
                self.leave(f"{part.name} cannot be started: {error}", 1)
                return
            status = await kept.child.wait()
            if self._leaving.is_set():
                return
            if not await self._launcher.end(part, kept.child):
                self._say(f"{part.name}: a process of its tree cannot be ended; it is not started again")
                return
            if part.kind == "engine":
                self._ended.tell(part.name)
                if status == 0:
                    await self._engine_stopped(kept)
                    return
            if not self._ready:
                if kept.up:  # else `_up` says so, with its last words
                    words = self._launcher.last_words(part.name)
                    self.leave(f"{part.name} died while the fleet was starting ({_how(status)}): {words}", 1)
                return
            if part.kind == "engine" and await self._probes.target() == State.STOPPED:
                await self._engine_stopped(
                    kept
                )  # it died on its way there: a new life would only be stopped again
                return
            pause_s = self._pause_s(kept)
            again = f"in {pause_s:.0f} s" if pause_s else "now"
            self._say(f"{part.name} died ({_how(status)}); it is started again {again}")
            _log.info("%s: %s", part.name, self._launcher.last_words(part.name))

    def _beside(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)
        task.add_done_callback(self._on_end)
        return task

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """A defect of ours: a part that nobody starts again must not be missing in silence."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s failed", task.get_name(), exc_info=error)
            self.leave(f"the supervisor failed at `{task.get_name()}`: {type(error).__name__}: {error}", 1)

    def _pause_s(self, kept: _Kept) -> float:
        """So many starts a minute at most; a part that dies at every start must not take the machine."""
        if len(kept.starts) < ENGINE_RESTARTS_PER_MINUTE_MAX:
            return 0.0
        return max(0.0, kept.starts[0] + MINUTE_SECONDS - self._host.clock.monotonic_s())

    async def _engine_stopped(self, kept: _Kept) -> None:
        kept.stopped = True
        self._say(f"{kept.part.name} is stopped")
        if self._plan.stays:
            self._rest()
        if not self._all_stopped:
            return
        if self._plan.stays:
            self._say(
                "the fleet is stopped; `interlock ctl start` starts its engines again, Ctrl-C ends the rest"
            )
            return
        await self._ended.all_told(CHILD_GRACE_SECONDS)
        await self._host.clock.sleep_s(LAST_ANSWER_SECONDS)
        self.leave("the fleet is stopped")

    # --- stopped -------------------------------------------------------------------------------------------------

    @property
    def _all_stopped(self) -> bool:
        return all(kept.stopped for kept in self._engines)

    def _rest(self) -> None:
        if self._resting is None or self._resting.done():
            self._resting = self._beside(self._await_start(), "wait for START")

    async def _await_start(self) -> None:
        """Until no engine is stopped, for the target is STOPPED no more; or the end of what is left is asked for."""
        while stopped := [kept for kept in self._engines if kept.stopped]:
            target = await self._probes.target()
            if target not in (None, State.STOPPED):
                names = [kept.part.name for kept in stopped]
                self._say(f"the fleet shall be {target}: starting {', '.join(names)}")
                for kept in stopped:
                    self._begin(kept)
                self._beside(self._say_when_up(names), "started")
            elif self._all_stopped and self._launcher.told_to_leave:
                await self._host.clock.sleep_s(LAST_ANSWER_SECONDS)
                self.leave("the fleet is stopped and its end was asked for")
                return
            await self._host.clock.sleep_s(PROBE_SECONDS)

    async def _say_when_up(self, names: list[str]) -> None:
        """Nobody waits for this: an engine may be stopped again, and begun again, before another is up."""
        begun_s = self._host.clock.monotonic_s()
        ups = [self._up(name, self._probes.member(name), ENGINE_START_SECONDS_MAX) for name in names]
        failures = [up for up in await asyncio.gather(*ups, return_exceptions=True) if up is not None]
        for failure in failures:
            if not isinstance(failure, StartFailed):
                raise failure
            self._say(str(failure))  # it is started again like any that died; START says who did not come
        if not failures:
            self._say(f"started in {self._host.clock.monotonic_s() - begun_s:.1f} s")

    # --- leaving -------------------------------------------------------------------------------------------------

    async def _leave_in_order(self) -> None:
        """The front first, so that no request comes any more; then everything else at once."""
        self._leaving.set()
        begun_s = self._host.clock.monotonic_s()
        self._ended.close()
        for task in self._aside:
            task.cancel()
        front = self._kept[self._plan.front.name]
        others = [kept for kept in self._kept.values() if kept is not front]
        await self._end_parts([front], FRONT_DRAIN_SECONDS)
        await self._end_parts(others, CHILD_GRACE_SECONDS)
        for kept in self._kept.values():
            if kept.task is not None:
                kept.task.cancel()
        await asyncio.gather(*(k.task for k in self._kept.values() if k.task), return_exceptions=True)
        self._say(f"all processes are gone after {self._host.clock.monotonic_s() - begun_s:.1f} s")

    async def _end_parts(self, parts: list[_Kept], patience_s: float) -> None:
        running = [kept for kept in parts if kept.child is not None]
        waits = []
        for kept in running:
            assert kept.child is not None
            kept.child.terminate()
            waits.append(asyncio.create_task(kept.child.wait()))
        if waits:
            _, late = await asyncio.wait(waits, timeout=patience_s)
            for wait in late:
                wait.cancel()
        ends = [self._launcher.end(kept.part, kept.child) for kept in running if kept.child is not None]
        for kept, gone in zip(running, await asyncio.gather(*ends), strict=True):
            if not gone:
                self._say(f"{kept.part.name}: a process of its tree could not be ended")


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"

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
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from interlock.core.errors import InterlockError
from interlock.core.limits import (
    CHILD_GRACE_SECONDS,
    ENGINE_RESTARTS_PER_MINUTE_MAX,
    ENGINE_START_SECONDS_MAX,
    PART_START_SECONDS_MAX,
)
from interlock.core.targets import State
from interlock.fleet.client import FleetClient
from interlock.fleet.launchers.local import LocalLauncher, Part
from interlock.host.base import Child, Host
from interlock.wire.identity import incarnation_in

_log = logging.getLogger(__name__)

PROBE_SECONDS = 0.25
STILL_SECONDS = 15.0
"""How often a part that takes long is said to be still on its way."""
PROBE_ANSWER_SECONDS_MAX = 2.0
MINUTE_SECONDS = 60.0
LAST_ANSWER_SECONDS = 0.5
"""After the last engine was reported gone: the coordinator tells whoever asked for the STOP that it is done."""
FRONT_DRAIN_SECONDS = 2.0
IDENTITY_BYTES_MAX = 4096

Probe = Callable[[], Awaitable[bool]]
Say = Callable[[str], None]


class FleetPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to run, and how to see that it does."""

    coordinator: Part
    store: Part | None
    engines: list[Part]
    front: Part
    coordinator_address: str
    store_address: str
    http_host: str
    http_port: int
    example: str = ""
    """Said once the fleet is up: how to ask it something."""
    stays: bool = True
    """A fleet whose engines are all STOPPED waits for START; else it leaves."""
    outlives: bool = False
    """`states` outlive the supervisor: what was commanded last is asked for before any engine starts."""
    states: Path
    """Where each engine keeps its identity: `<states>/<name>/identity.json`."""


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
        self._kept = {part.name: _Kept(part) for part in self._parts()}
        self._ready = False
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._tellers: set[asyncio.Task[None]] = set()
        self._leaving = asyncio.Event()
        self._resting: asyncio.Task[None] | None = None
        self._told: asyncio.Task[None] | None = None

    def _parts(self) -> list[Part]:
        plan = self._plan
        store = [plan.store] if plan.store is not None else []
        return [plan.coordinator, *store, *plan.engines, plan.front]

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
            await asyncio.gather(start, return_exceptions=True)
            await self._leave_in_order()

    # --- starting ------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        plan = self._plan
        engines = {part.name for part in plan.engines}
        others = [kept for name, kept in self._kept.items() if name not in engines]
        self._say("starting " + ", ".join(self._kept))
        for kept in others:
            self._begin(kept)
        if plan.outlives:
            await self._up(plan.coordinator.name, self._coordinator_answers, PART_START_SECONDS_MAX)
            if await self._target() == State.STOPPED:
                await self._up(plan.front.name, self._front_answers, PART_START_SECONDS_MAX)
                for name in engines:
                    self._kept[name].stopped = True
                self._say("the fleet is STOPPED, as it was left; `interlock ctl start` starts its engines")
                self._rest()
                return
        for name in engines:
            self._begin(self._kept[name])
        waits = []
        if not plan.outlives:
            waits.append(self._up(plan.coordinator.name, self._coordinator_answers, PART_START_SECONDS_MAX))
        if plan.store is not None:
            waits.append(self._up(plan.store.name, self._store_listens, PART_START_SECONDS_MAX))
        for part in plan.engines:
            waits.append(self._up(part.name, self._member_runs(part.name), ENGINE_START_SECONDS_MAX))
        waits.append(self._up(plan.front.name, self._front_answers, PART_START_SECONDS_MAX))
        tasks = [asyncio.create_task(wait) for wait in waits]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

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

    async def _coordinator_answers(self) -> bool:
        try:
            await self._client.status(PROBE_ANSWER_SECONDS_MAX)
        except (OSError, InterlockError) as error:
            return getattr(error, "code", "") == "recovering"
        return True

    async def _target(self) -> str | None:
        """The state that the fleet shall be in; None while nobody can say."""
        try:
            return (await self._client.status(PROBE_ANSWER_SECONDS_MAX)).target
        except (OSError, InterlockError, TimeoutError):
            return None

    def _member_runs(self, name: str) -> Probe:
        async def probe() -> bool:
            try:
                fleet = await self._client.status(PROBE_ANSWER_SECONDS_MAX)
            except (OSError, InterlockError):
                return False
            return any(m.name == name and m.state == fleet.target and m.standing for m in fleet.members)

        return probe

    async def _store_listens(self) -> bool:
        return await self._listens(self._plan.store_address)

    async def _listens(self, address: str) -> bool:
        try:
            stream = await self._host.connect(address)
        except OSError:
            return False
        stream.close()
        return True

    async def _front_answers(self) -> bool:
        """Its health page answers; whatever it says, HTTP is served."""
        try:
            stream = await self._host.connect(f"tcp:{self._probe_host}:{self._plan.http_port}")
        except OSError:
            return False
        try:
            await stream.send(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
            return (await stream.receive_exactly(5)) == b"HTTP/"
        except (OSError, EOFError):
            return False
        finally:
            stream.close()

    @property
    def _probe_host(self) -> str:
        host = self._plan.http_host
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)

    def _announce(self, seconds: float) -> None:
        host = f"[{self._probe_host}]" if ":" in self._probe_host else self._probe_host
        url = f"http://{host}:{self._plan.http_port}"
        self._say(f"ready in {seconds:.1f} s: {url}/v1  (Ctrl-C ends it)")
        if self._plan.outlives:
            self._told = asyncio.create_task(self._say_target(), name="target")
        if self._plan.example:
            self._say(self._plan.example.format(url=url))

    async def _say_target(self) -> None:
        """What it was left in, where that is not RUNNING."""
        target = await self._target()
        if target not in (None, State.RUNNING, State.STOPPED):
            self._say(f"the fleet is {target}, as it was left; `interlock ctl status` says who holds it")

    # --- keeping -------------------------------------------------------------------------------------------------

    async def _keep(self, kept: _Kept) -> None:
        """Starts the part, again and again, until the fleet leaves or the part is STOPPED."""
        part, clock = kept.part, self._host.clock
        while not self._leaving.is_set():
            kept.starts.append(clock.monotonic_s())
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
                self._tell_gone(part.name)
                if status == 0:
                    await self._engine_stopped(kept)
                    return
            if not self._ready:
                if kept.up:  # else `_up` says so, with its last words
                    words = self._launcher.last_words(part.name)
                    self.leave(f"{part.name} died while the fleet was starting ({_how(status)}): {words}", 1)
                return
            pause_s = self._pause_s(kept)
            again = f"in {pause_s:.0f} s" if pause_s else "now"
            self._say(f"{part.name} died ({_how(status)}); it is started again {again}")
            _log.info("%s: %s", part.name, self._launcher.last_words(part.name))
            await clock.sleep_s(pause_s)

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

    def _tell_gone(self, name: str) -> None:
        """Reads which life it was before a next one begins, and tells the coordinator until that has heard it."""
        try:
            data = self._host.files.read(self._plan.states / name / "identity.json", IDENTITY_BYTES_MAX)
        except (OSError, ValueError):
            data = None
        incarnation = incarnation_in(data)
        if not incarnation:
            return  # it had not begun a life
        task = asyncio.create_task(self._repeat_gone(name, incarnation), name=f"gone {name}")
        self._tellers.add(task)
        task.add_done_callback(self._tellers.discard)

    async def _repeat_gone(self, name: str, incarnation: int) -> None:
        while True:
            try:
                await self._client.member_gone(name, incarnation, PROBE_ANSWER_SECONDS_MAX)
                return
            except (OSError, InterlockError, TimeoutError) as error:
                _log.debug("MemberGone %s was not heard: %s", name, error)
            await self._host.clock.sleep_s(PROBE_SECONDS)

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
        if self._tellers:
            await asyncio.wait(set(self._tellers), timeout=CHILD_GRACE_SECONDS)
        await self._host.clock.sleep_s(LAST_ANSWER_SECONDS)
        self.leave("the fleet is stopped")

    # --- stopped -------------------------------------------------------------------------------------------------

    @property
    def _all_stopped(self) -> bool:
        return all(self._kept[part.name].stopped for part in self._plan.engines)

    def _rest(self) -> None:
        if self._resting is None or self._resting.done():
            self._resting = asyncio.create_task(self._await_start(), name="wait for START")
            self._resting.add_done_callback(self._on_end)

    async def _await_start(self) -> None:
        """Until the target is STOPPED no more, or the end of what is left is asked for."""
        while (target := await self._target()) in (None, State.STOPPED):
            if self._all_stopped and self._launcher.told_to_leave:
                await self._host.clock.sleep_s(LAST_ANSWER_SECONDS)
                self.leave("the fleet is stopped and its end was asked for")
                return
            await self._host.clock.sleep_s(PROBE_SECONDS)
        begun_s = self._host.clock.monotonic_s()
        stopped = [part.name for part in self._plan.engines if self._kept[part.name].stopped]
        self._say(f"the fleet shall be {target}: starting {', '.join(stopped)}")
        for name in stopped:
            self._begin(self._kept[name])
        ups = [self._up(name, self._member_runs(name), ENGINE_START_SECONDS_MAX) for name in stopped]
        for up in await asyncio.gather(*ups, return_exceptions=True):
            if isinstance(up, StartFailed):
                self._say(str(up))  # it is started again like any that died; START says who did not come
            elif isinstance(up, BaseException):
                raise up
        self._say(f"started in {self._host.clock.monotonic_s() - begun_s:.1f} s")
        if any(self._kept[part.name].stopped for part in self._plan.engines):
            self._resting = None
            self._rest()

    # --- leaving -------------------------------------------------------------------------------------------------

    async def _leave_in_order(self) -> None:
        """The front first, so that no request comes any more; then everything else at once."""
        self._leaving.set()
        begun_s = self._host.clock.monotonic_s()
        for teller in [*self._tellers, *(task for task in (self._resting, self._told) if task is not None)]:
            teller.cancel()
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

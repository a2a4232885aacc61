"""An event loop in virtual time whose scheduler is a seed: the same seed runs the same steps in the same order.

All simulated processes share this loop; every callback carries its process in its context, so that a frozen process takes
no step (its timers fire late, as after SIGCONT) and a dead one none at all, not even its `finally` blocks.

What is shuffled: among callbacks that are ready, one is drawn at random. What is kept: the order of one task's steps, the
order of one Future's callbacks, and the order of plain callbacks of one process among each other (`call_soon`). Nothing here
depends on addresses of objects: tasks and futures hash by serial number, so sets of them iterate alike in every run.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from interlock.testing.sim.schedule import Schedule

STEPS_PER_MOMENT_MAX = 20_000
"""More steps than that without time passing is a livelock, and no simulated second would ever come."""


CALM_EVERY = 4


class Wedged(Exception):  # noqa: N818 - says what is, as elsewhere
    """Nothing can ever happen again, or everything happens in one moment."""


class Owner(Protocol):
    """A simulated process, as the loop sees it."""

    @property
    def dead(self) -> bool: ...

    @property
    def frozen(self) -> bool: ...

    held: list[asyncio.Handle]

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Keeps a task from being collected: collecting a dead process's task would run its `finally`."""
        ...


PROCESS: contextvars.ContextVar[Any] = contextvars.ContextVar("simulated process", default=None)
"""Whose code runs now; None is the simulator's own."""


class SimTask(asyncio.Task[Any]):
    """A task that hashes by serial number."""

    def __init__(self, coro: Coroutine[Any, Any, Any], *, loop: SimLoop, **more: Any) -> None:
        self.serial = loop.next_serial()
        more["name"] = more.get("name") or f"task {self.serial}"
        super().__init__(coro, loop=loop, **more)

    def __hash__(self) -> int:
        return self.serial


class SimFuture(asyncio.Future[Any]):
    """A future that hashes by serial number."""

    def __init__(self, *, loop: SimLoop) -> None:
        self.serial = loop.next_serial()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.serial


class SimLoop(asyncio.BaseEventLoop):
    """`run_until_complete` as usual; time moves only when nothing is ready. Raises `Wedged`."""

    def __init__(
        self, rng: random.Random, *, shuffle: bool = True, fixed: Mapping[int, int] | None = None
    ) -> None:
        """`fixed`: a recorded schedule instead of one from `rng`."""
        super().__init__()
        self.schedule = Schedule(rng, fixed if shuffle or fixed is not None else {})
        self._now = 0.0
        self._serial = self._advances = 0
        self.on_calm: Callable[[], None] | None = None
        """Called now and then when nothing is ready: whoever has something to do then has missed it."""
        self._sequence = 0
        self._moment_steps = 0
        self._runnable: list[asyncio.Handle] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self.steps = 0
        self.give_up = ""
        """Said by whoever watches the run: the next step raises it as `Wedged`."""
        self.set_task_factory(self._make_task)
        self.kernel = contextvars.Context()
        """For the simulator's own callbacks: they belong to no process."""

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    # --- asyncio's own calls ---------------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def create_future(self) -> SimFuture:
        return SimFuture(loop=self)

    def _make_task(self, _: Any, coro: Any, **more: Any) -> Any:
        task = SimTask(coro, loop=self, **more)
        owner = PROCESS.get() if more.get("context") is None else more["context"].get(PROCESS)
        if owner is not None:
            owner.adopt(task)
        return task

    def _call_soon(self, callback: Any, args: Any, context: contextvars.Context | None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._runnable.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass  # it is dropped when its time comes

    def _write_to_self(self) -> None:
        pass  # nobody sleeps in a selector

    # --- the simulator's -------------------------------------------------------------------------------------------

    def later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """A callback of the simulator's own, whoever asks for it."""
        return self.call_at(self._now + delay_s, callback, *args, context=self.kernel.copy())

    def release(self, owner: Owner) -> None:
        """A process thaws: what it missed runs now."""
        self._runnable += owner.held
        owner.held.clear()

    def _run_once(self) -> None:
        handle = self._next()
        if handle is None:
            raise Wedged("nothing is ready and no timer runs: everybody waits for ever")
        self.steps += 1
        self._moment_steps += 1
        if self._moment_steps > STEPS_PER_MOMENT_MAX:
            raise Wedged(f"{STEPS_PER_MOMENT_MAX} steps were taken at {self._now:.3f} s; the last: {handle}")
        if self.give_up:
            raise Wedged(self.give_up)
        handle._run()

    def _next(self) -> asyncio.Handle | None:
        while True:
            while self._runnable:
                handle = self._runnable.pop(self._pick())
                if handle.cancelled():
                    continue
                owner = handle._context.get(PROCESS)  # type: ignore[attr-defined]
                if owner is None or not (owner.dead or owner.frozen):
                    return handle
                if owner.frozen and not owner.dead:
                    owner.held.append(handle)
            if not self._timers:
                return None
            self._advance()

    def _advance(self) -> None:
        self._advances += 1
        if self.on_calm is not None and self._advances % CALM_EVERY == 0:
            self.on_calm()
        when = self._timers[0][0]
        if when > self._now:
            self._now, self._moment_steps = when, 0
        while self._timers and self._timers[0][0] <= self._now:
            timer = heapq.heappop(self._timers)[2]
            if not timer.cancelled():
                self._runnable.append(timer)

    def _pick(self) -> int:
        """Any callback that no earlier one must precede."""
        ready = self._runnable
        if len(ready) == 1:
            return 0
        chosen = self.schedule.draw(len(ready))
        if not chosen:
            return 0
        keys = _strands(ready[chosen])
        for index in range(chosen - 1, -1, -1):
            others = _strands(ready[index])
            if any(key is other for key in keys for other in others):
                chosen, keys = index, others
        self.schedule.take(
            chosen, lambda: f"{self._now:10.4f}  {_name(ready[chosen])} before {_name(ready[0])}"
        )
        return chosen


def _name(handle: asyncio.Handle) -> str:
    """Whose step it is, and which."""
    callback = handle._callback  # type: ignore[attr-defined]
    owner = handle._context.get(PROCESS)  # type: ignore[attr-defined]
    task = getattr(callback, "__self__", None)
    what = task.get_name() if isinstance(task, SimTask) else getattr(callback, "__qualname__", "a callback")
    return f"{owner or 'the simulator'}: {what}"


def _strands(handle: asyncio.Handle) -> tuple[Any, ...]:
    """What orders this callback: its task, the Future it was added to, its process where it is plain."""
    callback, args = handle._callback, handle._args  # type: ignore[attr-defined]
    task = getattr(callback, "__self__", None)
    future = args[0] if args and isinstance(args[0], asyncio.Future) else None
    if isinstance(task, SimTask):
        return (task,) if future is None else (task, future)
    owner = handle._context.get(PROCESS)  # type: ignore[attr-defined]
    plain = owner if owner is not None else SimLoop
    return (plain,) if future is None else (plain, future)

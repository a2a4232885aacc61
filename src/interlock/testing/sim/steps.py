"""Threads that run one at a time, by a schedule: `ThreadHost` for explicit interleavings and for seeds.

Each task is a real thread that parks at every file call and whenever it takes a mutex; somebody (a test, or a seeded choice) says
who goes on. Time is virtual and moves when nobody can run. A file call made while a mutex is held is an error by itself. The idea
is frontrun's and loom's; the seam makes it need no tracing.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from interlock.testing.sim.folders import SimStorage, SimTree

STEP_SECONDS_MAX = 30.0
"""Real time in which a task must park or end; longer means that it waits for something outside the schedule."""


class TaskEnded(BaseException):
    """The simulated process of this task was killed."""


class Task:
    """One thread of the schedule. `at` says before which call it stands; `result` and `error` how it ended."""

    def __init__(self, name: str, function: Callable[[], Any], steps: Steps) -> None:
        self.name, self.at = name, "start"
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self.ready: Callable[[], bool] | None = None
        """What it waits for; None: it can run."""
        self.deadline_s: float | None = None
        self.gate = threading.Semaphore(0)
        self._function, self._steps = function, steps
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.gate.acquire()
        try:
            if not self._steps.is_dead:
                self.result = self._function()
        except TaskEnded:
            pass
        except BaseException as error:
            self.error = error
        self.is_done = True
        self._steps.turn.release()

    # RunningThread of the seam
    def is_alive(self) -> bool:
        return not self.is_done

    def join(self, timeout: float | None = None) -> None:
        self._steps.block(lambda: self.is_done, timeout, f"join {self.name}")


class Steps:
    """One simulated process's threads."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self.rng = rng or random.Random(0)
        self.now_s = 0.0
        self.tasks: list[Task] = []
        self.turn = threading.Semaphore(0)
        self.current: Task | None = None
        self.is_dead = False
        self.mutexes_held = 0
        self.count = 0

    # --- called by tasks -------------------------------------------------------------------------------------------

    def park(self, at: str) -> None:
        """Before each call that others may see. Outside any task (a test's own thread) it is nothing."""
        task = self.current
        if task is None or threading.current_thread() is not task.thread:
            return
        assert not self.mutexes_held or at == "mutex", f"{task.name} calls {at} while it holds a mutex"
        task.at = at
        self.turn.release()
        task.gate.acquire()
        if self.is_dead:
            raise TaskEnded

    def block(self, ready: Callable[[], bool], timeout_s: float | None, at: str) -> bool:
        """Until `ready`, or so long."""
        task = self.current
        assert task is not None, f"{at} would wait, and it is called outside any task"
        task.ready = ready
        task.deadline_s = None if timeout_s is None else self.now_s + timeout_s
        try:
            self.park(at)
        finally:
            task.ready = task.deadline_s = None
        return ready()

    # --- called by the schedule ------------------------------------------------------------------------------------

    def spawn(self, name: str, function: Callable[[], Any]) -> Task:
        task = Task(name, function, self)
        self.tasks.append(task)
        return task

    def find(self, name: str) -> Task:
        """The living task whose name begins so."""
        return next(task for task in self.tasks if task.name.startswith(name) and not task.is_done)

    def can_run(self, task: Task) -> bool:
        if task.is_done:
            return False
        is_late = task.deadline_s is not None and self.now_s >= task.deadline_s
        return task.ready is None or is_late or task.ready()

    def step(self, task: Task) -> None:
        """Lets it go on to its next call, or its end."""
        assert self.can_run(task), f"{task.name} waits at {task.at}"
        self.count += 1
        self.current = task
        task.gate.release()
        assert self.turn.acquire(timeout=STEP_SECONDS_MAX), f"{task.name} left the schedule after {task.at}"
        self.current = None

    def until(self, task: Task, at: str) -> None:
        """Until it stands before a call that begins so; an error if it ends first."""
        while not task.at.startswith(at):
            self.step(task)
            assert not task.is_done, f"{task.name} ended and never came to {at}: {task.error}"

    def finish(self, task: Task) -> Any:
        """To its end, alone. Returns its result; raises its error."""
        while not task.is_done:
            self.step(task)
        if task.error is not None:
            raise task.error
        return task.result

    def call(self, function: Callable[[], Any]) -> Any:
        """`function` in a task of its own, alone to its end."""
        return self.finish(self.spawn("call", function))

    def settle(self, *waiting: Task) -> None:
        """Everybody who can run runs, in seeded order, until `waiting` are done (or nobody can run). Time moves for `waiting` only."""
        while True:
            able = [task for task in self.tasks if self.can_run(task)]
            if waiting and all(task.is_done for task in waiting):
                return
            if able:
                self.step(self.rng.choice(able))
            elif not waiting:
                return
            else:
                self.pass_time()

    def pass_time(self) -> None:
        """To the next deadline of anybody."""
        deadlines = [t.deadline_s for t in self.tasks if not t.is_done and t.deadline_s is not None]
        assert deadlines, f"nobody can run: {[(t.name, t.at) for t in self.tasks if not t.is_done]}"
        self.now_s = max(self.now_s, min(deadlines))

    def kill(self) -> None:
        """The process ends here: no task makes another call."""
        self.is_dead = True
        for task in self.tasks:
            while not task.is_done:
                self.current = task
                task.gate.release()
                assert self.turn.acquire(timeout=STEP_SECONDS_MAX)
        self.current = None


class StepChanges:
    """`Changes` of the seam."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._owner: Task | None = None
        self._depth = 0
        self._wakes = 0

    def __enter__(self) -> bool:
        task = self._steps.current
        if self._owner is None or self._owner is not task:
            self._steps.park("mutex")
            assert self._owner is None or self._steps.is_dead, "a mutex is held by a task that does not run"
            self._owner = self._steps.current
        self._depth += 1
        self._steps.mutexes_held += 1
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        self._steps.mutexes_held -= 1
        if self._depth == 0:
            self._owner = None

    def wait(self, timeout: float | None = None) -> bool:
        seen, depth, owner = self._wakes, self._depth, self._owner
        self._owner, self._depth = None, 0
        self._steps.mutexes_held -= depth
        try:
            return self._steps.block(lambda: self._wakes != seen, timeout, "wait")
        finally:
            self._owner, self._depth = owner, depth
            self._steps.mutexes_held += depth

    def notify_all(self) -> None:
        self._wakes += 1


class StepHost:
    """`ThreadHost` of the seam, for one simulated process on `storage`."""

    def __init__(self, steps: Steps, storage: SimStorage) -> None:
        self.steps, self.storage = steps, storage

    def monotonic_s(self) -> float:
        return self.steps.now_s

    def wall_ns(self) -> int:
        return self.storage.next_wall_ns()

    def changes(self) -> StepChanges:
        return StepChanges(self.steps)

    def start_thread(self, name: str, function: Callable[[], None]) -> Task:
        return self.steps.spawn(name, function)

    def open_tree(self, path: Path, owner: str) -> SimTree:
        del path  # one tree a storage
        return SimTree(self.storage, self.steps.park, owner, lambda: self.steps.is_dead)

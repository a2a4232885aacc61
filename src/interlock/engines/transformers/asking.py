"""A thread that is asked for things: functions that others hand it, run between two of its steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from interlock.engines.base import EngineGone, RequestRejected
from interlock.host.threads import Condition, start_thread

T = TypeVar("T")
ASKED_MAX = 8192
"""Functions waiting for the end of a step; a step takes seconds at most, and a front may send thousands of requests."""


def promised() -> Future[Any]:
    """A future that whoever waits for it cannot cancel: what it stands for is done all the same, and answered."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


class AskedThread:
    """What others use of the thread, and how it serves them. A subclass says when there is a step to take."""

    def __init__(self) -> None:
        self._asked: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = Condition()
        self._ending = False
        self._why_gone = ""
        self._thread: Any = None

    # --- from other threads --------------------------------------------------------------------------------------

    def ask(self, function: Callable[[], T]) -> Future[T]:
        """Runs `function` between two steps. The future fails with `EngineGone` when there is no engine any more."""
        future: Future[T] = promised()
        with self._changed:
            if self._why_gone or self._ending:
                future.set_exception(EngineGone(self._why_gone or "the engine was stopped"))
            elif len(self._asked) >= ASKED_MAX:
                future.set_exception(
                    RequestRejected(f"{ASKED_MAX} calls wait for the end of a step; try again later")
                )
            else:
                self._asked.append((future, function))
                self._changed.notify()
        return future

    def end(self) -> None:
        """No step is begun any more; the thread ends after the one under way."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    def join(self, seconds: float) -> bool:
        """Whether the thread has ended."""
        if self._thread is None:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- in the thread -------------------------------------------------------------------------------------------

    def _start(self, function: Callable[[], None]) -> None:
        self._thread = start_thread("engine steps", function)

    def _seconds_to_step(self) -> float | None:
        """Until a step may be taken, 0: now; None: not before something is asked for."""
        raise NotImplementedError

    def _may_step(self) -> bool:
        return self._seconds_to_step() == 0

    def _settle(self) -> None:
        """After what was asked for was done."""

    def _gone(self, why: str) -> None:
        """From now on nothing can be asked for; what waits is told why."""
        with self._changed:
            self._why_gone = why
            asked, self._asked = list(self._asked), deque()
        for future, _ in asked:
            future.set_exception(EngineGone(why))

    def _serve_asked(self) -> bool:
        """Runs what was asked for; waits for something when there is nothing to step. False: the end.

        What is asked meanwhile comes after the next step: whoever asks without end stops no step.
        """
        while True:
            with self._changed:
                while not self._asked and not self._ending and (seconds := self._seconds_to_step()) != 0:
                    self._changed.wait(seconds)
                waiting = len(self._asked)
            for _ in range(waiting):
                with self._changed:
                    if self._ending:
                        return False
                    future, function = self._asked.popleft()
                self._answer(future, function)
            self._settle()
            if self._ending or self._may_step():
                return not self._ending

    def _answer(self, future: Future[Any], function: Callable[[], Any]) -> None:
        try:
            future.set_result(function())
        except EngineGone as error:
            future.set_exception(error)
            raise
        except Exception as error:
            future.set_exception(error)

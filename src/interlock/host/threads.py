"""Threads and their clock, for the code that runs inside a foreign engine's own threads (vLLM's scheduler and workers).

Everything else is asyncio on a `Host`. This module exists so that the ban on `threading` and `time` outside `host/` has
one door, and one place to look at.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

Condition = threading.Condition
Event = threading.Event
Local = threading.local
Lock = threading.Lock
Thread = threading.Thread


def monotonic_s() -> float:
    """Seconds on a clock that never steps back; its zero means nothing."""
    return time.monotonic()


def start_thread(name: str, function: Callable[[], None]) -> threading.Thread:
    """Runs `function` in a daemon thread: it never keeps an engine from leaving."""
    thread = threading.Thread(target=function, name=name, daemon=True)
    thread.start()
    return thread


class WorkerBusyError(Exception):
    """The worker's queue is full or it is closed: the work was not taken and will not be done."""


class Worker:
    """One named daemon thread that does what it is given in order, from a queue of bounded length."""

    def __init__(self, name: str, queue_max: int) -> None:
        self._name, self._queue_max = name, queue_max
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = Condition()
        self._closed = False
        self._thread = start_thread(name, self._run)

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Raises `WorkerBusyError` at once rather than wait. What `function` raises is raised by the future's `result`."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed or len(self._jobs) >= self._queue_max:
                reason = "is closed" if self._closed else f"has {self._queue_max} jobs waiting"
                raise WorkerBusyError(f"the worker {self._name} {reason}")
            self._jobs.append((future, functools.partial(function, *args)))
            self._changed.notify()
        return future

    def close(self, timeout_s: float) -> bool:
        """Takes no more, does what was taken, and ends; False when that is not done within `timeout_s`.

        Jobs not begun by then are cancelled. Idempotent.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        with self._changed:
            left, self._jobs = self._jobs, deque()
        for future, _ in left:
            future.cancel()
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if not self._jobs:
                    return
                future, job = self._jobs.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as error:  # the thread lives on: the error is the caller's
                future.set_exception(error)

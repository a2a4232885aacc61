"""Threads that move bulk bytes: a few for a whole process, whatever the number of connections.

Each connection is a handler that is called by one thread at a time when its socket is ready, moves what it can, and says what it waits
for next (epoll with EPOLLONESHOT). It waits inside a call for BULK_PATIENCE_SECONDS at most, so that peers who stand still hold no
thread: with a thread for each connection a thousand peers would be a thousand threads, with blocking ones eight slow peers a standstill.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable

from interlock.core.limits import BULK_THREADS_MAX

READABLE = select.EPOLLIN | select.EPOLLRDHUP
WRITABLE = select.EPOLLOUT
HANGUP = select.EPOLLRDHUP
"""Its end alone: bytes wake nobody."""
NOTHING = 0
Ready = Callable[[], None]
"""Called when the socket is ready; it arms its descriptor again, by `arm`."""
_log = logging.getLogger(__name__)


class BulkPool:
    """One a process; see `borrow_pool`."""

    def __init__(self, threads: int) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Ready] = {}
        self._stop_r, self._stop_w = os.pipe()
        self._epoll.register(self._stop_r, select.EPOLLIN)
        self._jobs: deque[Callable[[], object]] = deque()
        self._jobs_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self._epoll.register(self._jobs_fd, select.EPOLLIN)
        self._threads = [
            threading.Thread(target=self._run, name=f"bulk-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, fd: int, ready: Ready) -> None:
        """Waits for nothing until `arm`."""
        self._handlers[fd] = ready
        self._epoll.register(fd, select.EPOLLONESHOT)

    def arm(self, fd: int, events: int) -> None:
        """Calls the handler of `fd` once, on one of the threads, when one of `events` (epoll's) is there."""
        self._epoll.modify(fd, events | select.EPOLLONESHOT)

    def remove(self, fd: int) -> None:
        """Before the descriptor is closed. Its handler may be called once more, by a thread that was woken already."""
        self._handlers.pop(fd, None)
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    def run(self, job: Callable[[], object]) -> None:
        """On one of the threads, soon. A job that must wait for long gives its thread back and comes again."""
        self._jobs.append(job)
        os.eventfd_write(self._jobs_fd, 1)

    def close(self) -> None:
        os.write(self._stop_w, b"x")
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._epoll.close()
        os.close(self._stop_r)
        os.close(self._stop_w)
        os.close(self._jobs_fd)

    def _run(self) -> None:
        while True:
            try:
                events = self._epoll.poll(maxevents=1)
            except InterruptedError:
                continue
            for fd, _ in events:
                if fd == self._stop_r:
                    return
                if fd == self._jobs_fd:
                    self._run_job()
                    continue
                ready = self._handlers.get(fd)
                if ready is not None:
                    self._serve(ready)

    def _run_job(self) -> None:
        try:
            os.eventfd_read(self._jobs_fd)
            job = self._jobs.popleft()
        except (BlockingIOError, IndexError):  # another thread was quicker
            return
        try:
            job()
        except Exception:
            _log.exception("a job of bulk bytes failed")

    def _serve(self, ready: Ready) -> None:
        try:
            ready()
        except Exception:  # a defect of ours must not end a thread that others need
            _log.exception("a handler of bulk bytes failed")


_lock = threading.Lock()
_shared: BulkPool | None = None
_users = 0


def borrow_pool() -> BulkPool:
    """The process's pool, started by its first user. To be given back with `return_pool`."""
    global _shared, _users
    with _lock:
        if _shared is None:
            _shared = BulkPool(min(BULK_THREADS_MAX, 2 + 2 * (os.cpu_count() or 1)))
        _users += 1
        return _shared


def return_pool() -> None:
    """The last user's return ends the threads."""
    global _shared, _users
    with _lock:
        _users -= 1
        last, _shared = (_shared, None) if _users == 0 else (None, _shared)
    if last is not None:
        last.close()

"""Proof that a process is gone, by pidfd: not by its number, which is reused, nor by a connection, which a fork keeps open."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal


class ProcessWatch:
    """`Watch` by pidfd, which it owns; without one the process was gone already when it was asked for."""

    def __init__(self, pid: int, pidfd: int | None) -> None:
        self._pid, self._pidfd = pid, pidfd
        self._exited = pidfd is None
        self._waiters: set[asyncio.Future[None]] = set()

    @classmethod
    def of(cls, pid: int) -> ProcessWatch:
        """Raises `ProcessLookupError` when there is no such process."""
        return cls(pid, os.pidfd_open(pid))

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def exited(self) -> bool:
        if not self._exited and self._pidfd is not None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            self._exited = bool(poll.poll(0))
        return self._exited

    async def wait_exited(self) -> None:
        """Raises `ConnectionAbortedError` when the watch is closed before the exit was seen."""
        if self.exited:
            return
        if self._pidfd is None:
            raise ConnectionAbortedError(f"the watch of process {self._pid} is closed")
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        if not self._waiters:
            loop.add_reader(self._pidfd, self._on_exit)
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
            if not self._waiters and self._pidfd is not None:
                loop.remove_reader(self._pidfd)

    def _on_exit(self) -> None:
        self._exited = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def kill(self) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        if self._pidfd is None:
            return
        if self._waiters:
            asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = None
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(ConnectionAbortedError(f"the watch of process {self._pid} was closed"))

    def __del__(self) -> None:
        # A watch lives as long as anybody holds it (waiters do, through the loop); the descriptor must not outlive it.
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

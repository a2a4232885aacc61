"""End this process when the one it works for is gone: the guard of processes that a foreign engine spawned.

vLLM's core and workers are grandchildren of the process that runs the engine. When that one is killed nobody tells
them; they would go on holding memory, and a rank could go on writing into slots of an engine that is reported gone. A
pidfd tells at once, and cannot be fooled by a pid that was used again.
"""

from __future__ import annotations

import os
import select
import signal

from interlock.host.threads import start_thread

_guarded: set[int] = set()


def end_with(owner_pid: int) -> None:
    """SIGKILL to this process as soon as `owner_pid` has exited (at once if it has already). Idempotent.

    Raises `ValueError` for what is no other process's id.
    """
    if owner_pid <= 0:
        raise ValueError(f"owner_pid {owner_pid} is no process id; name the process that owns this engine")
    if owner_pid == os.getpid() or owner_pid in _guarded:
        return
    _guarded.add(owner_pid)
    try:
        descriptor = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    start_thread(f"interlock-owner-{owner_pid}", lambda: _wait_and_end(descriptor))


def _wait_and_end(descriptor: int) -> None:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    while not poller.poll():
        pass  # a signal handler interrupted the wait
    # No clean-up: whatever this process would still do, it would do for an owner that is gone.
    os.kill(os.getpid(), signal.SIGKILL)

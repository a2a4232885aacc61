"""What a dead process has left: found by evidence, removed, and nothing else touched."""

from __future__ import annotations

import multiprocessing
import multiprocessing.shared_memory
import os
import secrets
import signal
import subprocess
import sys

from interlock.host.processes import TREE_MARK
from interlock.host.sweep import (
    SHARED_MEMORY,
    end_marked,
    own_mark,
    parent_pipe_ended,
    remove_shared_memory,
    shared_memory_of,
)

HOLDER = """
import multiprocessing, multiprocessing.shared_memory, sys, time
memory = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
lock = multiprocessing.get_context("spawn").Lock()
print("ready", flush=True)
time.sleep(600)
"""


def test_segments_and_semaphores_of_a_tree_are_found_and_removed_after_it_was_killed() -> None:
    mine = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, start_new_session=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        names = shared_memory_of(holder.pid)
        os.killpg(holder.pid, signal.SIGKILL)
    assert sorted(name[:4] for name in names) == ["psm_", "sem."]
    assert all((SHARED_MEMORY / name).exists() for name in names)
    remove_shared_memory(names)
    assert not any((SHARED_MEMORY / name).exists() for name in names)
    assert (SHARED_MEMORY / mine.name.lstrip("/")).exists()
    mine.close()
    mine.unlink()


async def test_everything_that_carries_a_mark_is_ended_whatever_session_it_is_in() -> None:
    mark = secrets.token_hex(8)
    sleeper = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"]
    marked = [
        subprocess.Popen(
            sleeper, env=os.environ | {TREE_MARK: path}, stdout=subprocess.PIPE, start_new_session=True
        )
        for path in (mark, f"outer/{mark}", f"{mark}/inner")
    ]
    other = subprocess.Popen(sleeper, env=os.environ | {TREE_MARK: "another"}, stdout=subprocess.PIPE)
    for process in (*marked, other):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    assert await end_marked(mark, 10.0)
    assert [process.wait(5) for process in marked] == [-signal.SIGKILL] * 3
    assert other.poll() is None
    other.kill()
    for process in (*marked, other):
        process.communicate()


def test_the_own_mark_is_the_innermost() -> None:
    assert own_mark({TREE_MARK: "fleet/engine"}) == "engine"
    assert own_mark({}) is None


def test_the_end_of_the_supervisor_is_seen_on_its_pipe() -> None:
    read, write = os.pipe()
    env = {"INTERLOCK_PARENT_FD": str(read)}
    assert not parent_pipe_ended(env)
    os.close(write)
    assert parent_pipe_ended(env)
    os.close(read)
    assert not parent_pipe_ended({})

"""Shared memory: sealed, backed, not inherited, and refused when it is anything else."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from interlock.host import memory
from interlock.host.memory import create_memory, map_memory

SIZE = 1 << 20


def test_no_holder_can_truncate_grow_or_reseal_it() -> None:
    shared = create_memory("test", SIZE)
    for size in (0, SIZE // 2, SIZE * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(shared.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(shared.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    shared.view[SIZE - 1] = 7
    shared.close()


def test_all_of_it_is_backed_before_anybody_gets_it() -> None:
    shared = create_memory("test", SIZE)
    assert os.fstat(shared.fd).st_blocks * 512 >= SIZE
    shared.close()


def test_writers_and_readers_see_one_memory_and_readers_cannot_write() -> None:
    shared = create_memory("test", SIZE)
    writer = map_memory(os.dup(shared.fd), SIZE, writable=True)
    read_only = shared.open_read_only()
    with pytest.raises(PermissionError):
        mmap.mmap(read_only, SIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    reader = map_memory(read_only, SIZE, writable=False)
    writer.view[5:10] = b"hello"
    assert bytes(reader.view[5:10]) == bytes(shared.view[5:10]) == b"hello"
    assert reader.view.readonly
    for each in (shared, writer, reader):
        each.close()


FORK = """
import mmap, os
from interlock.host.memory import create_memory
shared = create_memory("test", 1 << 20)
plain = mmap.mmap(-1, 4096)
def child_touching(memory):
    pid = os.fork()
    if pid == 0:
        memory[0]
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(child_touching(shared.view), child_touching(plain))
"""


def test_a_forked_child_cannot_touch_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=30, check=True
    )
    shared, plain = map(int, done.stdout.split())
    assert shared == -signal.SIGSEGV
    assert plain == 0, "the test itself must be able to tell"


def test_memory_that_is_not_sealed_or_too_small_is_not_mapped_and_its_descriptor_is_closed() -> None:
    loose = os.memfd_create("loose")
    os.ftruncate(loose, SIZE)
    shared = create_memory("test", SIZE)
    pipe, other = os.pipe()
    for fd, size in ((loose, SIZE), (os.dup(shared.fd), SIZE + 1), (os.dup(shared.fd), 0), (pipe, SIZE)):
        with pytest.raises(ValueError):
            map_memory(fd, size, writable=True)
        with pytest.raises(OSError):
            os.fstat(fd)
    os.close(other)
    shared.close()


def test_more_than_the_machine_has_is_refused_in_words_and_nothing_is_left(
    descriptors: Callable[[], set[str]],
) -> None:
    before = descriptors()
    with pytest.raises(MemoryError, match=r"test.*GiB.*smaller"):
        create_memory("test", memory.available_bytes() + (1 << 34))
    with pytest.raises(ValueError):
        create_memory("test", 0)
    assert descriptors() == before


def test_closing_leaves_a_slice_that_somebody_still_holds() -> None:
    shared = create_memory("test", SIZE)
    held = shared.view[:4]
    held[:] = b"held"
    shared.close()
    shared.close()
    assert bytes(held) == b"held"
    with pytest.raises(ValueError):
        shared.open_read_only()

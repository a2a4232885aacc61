"""The run directory: one fleet a port, and the last process takes it away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from interlock.fleet.launchers.rundir import ChildMark, RunDir, RunDirBusy, forget_shared_memory
from interlock.host.real import RealHost
from interlock.host.sweep import SHARED_MEMORY, FileLock


async def claim(base: Path, port: int = 8000) -> RunDir:
    return await RunDir.claim(RealHost(), port, "mark", base)


async def test_a_port_has_one_fleet_and_other_ports_have_others(tmp_path: Path) -> None:
    first = await claim(tmp_path / "b")
    with pytest.raises(RunDirBusy, match="port 8000"):
        await claim(tmp_path / "b")
    second = await claim(tmp_path / "b", 8001)
    first.remove()
    (await claim(tmp_path / "b")).remove()
    second.remove()
    assert not (tmp_path / "b").exists()


async def test_the_directory_is_for_its_owner_alone(tmp_path: Path) -> None:
    run = await claim(tmp_path / "b")
    assert run.path.stat().st_mode & 0o777 == 0o700
    run.remove()
    (tmp_path / "c").mkdir(mode=0o755)
    with pytest.raises(PermissionError):
        await claim(tmp_path / "c")


async def test_only_the_last_child_of_a_dead_supervisor_removes_it(tmp_path: Path) -> None:
    run = await claim(tmp_path / "b")
    children = [ChildMark(run.path), ChildMark(run.path)]
    run._lock.release()  # as the kernel does for a killed supervisor
    children[0].leave(supervisor_gone=True)
    assert run.path.exists()
    children[1].leave(supervisor_gone=True)
    assert not (tmp_path / "b").exists()


async def test_children_leave_everything_to_a_living_supervisor(tmp_path: Path) -> None:
    run = await claim(tmp_path / "b")
    ChildMark(run.path).leave(supervisor_gone=False)
    assert run.path.exists()
    ChildMark(run.path).leave(supervisor_gone=True)  # a new fleet holds the port already
    assert run.path.exists()
    run.remove()


def test_a_lock_on_a_file_that_was_removed_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = FileLock.take(path)
    assert first is not None
    assert FileLock.take(path) is None
    first.release(remove=True)
    second = FileLock.take(path)
    assert second is not None
    assert os.stat(path).st_ino
    assert FileLock.take(path, shared=True) is None
    second.release()


def test_recorded_shared_memory_is_removed_and_nothing_else(tmp_path: Path) -> None:
    ours = SHARED_MEMORY / f"psm_interlock_test_{os.getpid()}"
    ours.touch()
    victim = tmp_path / "victim"
    victim.touch()
    record = tmp_path / "engine-0.shm"
    record.write_text(f"{ours.name}\n../../{victim}\n..\npsm_never_there\n")
    forget_shared_memory(record)
    assert not ours.exists()
    assert victim.exists()
    assert not record.exists()

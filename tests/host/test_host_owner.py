"""A process that a foreign engine spawned does not outlive the one it works for."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from interlock.host.owner import end_with

GUARDED = (
    "import sys, threading; from interlock.host.owner import end_with; end_with(int(sys.argv[1])); "
    "print('guarded', flush=True); threading.Event().wait(60)"
)


def guarded(owner: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", GUARDED, str(owner)], stdout=subprocess.PIPE, text=True)


def test_a_guarded_process_ends_when_its_owner_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait(60)"])
    with guarded(owner.pid) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "guarded\n"
            assert child.poll() is None
            owner.kill()
            assert child.wait(5) == -signal.SIGKILL
        finally:
            owner.kill()
            owner.wait(5)
            child.kill()


def test_a_process_whose_owner_is_gone_already_ends_at_once() -> None:
    owner = subprocess.Popen([sys.executable, "-c", ""])
    owner.wait(30)
    with guarded(owner.pid) as child:
        assert child.wait(30) == -signal.SIGKILL


def test_what_is_no_process_id_is_refused() -> None:
    with pytest.raises(ValueError, match="owner_pid"):
        end_with(0)

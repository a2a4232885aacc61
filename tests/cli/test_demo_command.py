"""`interlock demo` when it does not go as planned: nothing of it outlives it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from interlock.engines.demo_model import build_demo_model
from interlock.host.blocking import watch_process
from interlock.host.sweep import descendants


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_who_ends_the_demo_ends_its_reference_run_too(number: signal.Signals, status: int) -> None:
    argv = [sys.executable, "-m", "interlock", "demo", str(build_demo_model()), "--engine", "transformers"]
    demo = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert demo.stdout is not None
        assert demo.stdout.readline().startswith("0. The reference")
        while not (plain := descendants(demo.pid)):
            assert demo.poll() is None
        watches = [watch_process(pid) for pid in plain]
        demo.send_signal(number)
        _, errors = demo.communicate(timeout=20)
        assert (demo.returncode, "Traceback" in errors) == (status, False)
        assert all(watch.exited for watch in watches)
        for watch in watches:
            watch.close()
    finally:
        demo.kill()
        demo.wait()

"""A part of a fleet, as far as its supervisor can see: it listens, answers health, dies, leaves descendants behind.

Run as `stand_in.py KIND NAME RUN_DIR`, with the behaviour in the file of its configuration. The coordinator is the real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from interlock.cli.processes import run_process
from interlock.fleet.launchers.rundir import ChildMark
from interlock.host.sweep import end_marked_now, own_mark, parent_pipe_ended, wait_parent_pipe_ended

SLEEPER = "import time; time.sleep(600)"


def main() -> None:
    kind, name, folder = sys.argv[1:4]
    if kind == "coordinator":
        run_process([kind, name, folder])
    run_dir = Path(folder)
    behaviour = json.loads((run_dir / f"{name}.json").read_text())
    mark = ChildMark(run_dir)
    starts = count(run_dir / f"{name}.starts")
    if behaviour.get("fail"):
        (run_dir / f"{name}.failure").write_text(behaviour["fail"])
        sys.exit(1)
    if behaviour.get("grandchild"):
        escaped = subprocess.Popen([sys.executable, "-c", SLEEPER], start_new_session=True)
        (run_dir / f"{name}.grandchild").write_text(str(escaped.pid))
    (run_dir / f"{name}.pid.new").write_text(str(os.getpid()))
    (run_dir / f"{name}.pid.new").rename(run_dir / f"{name}.pid")
    hangs = behaviour.get("hang") or starts >= behaviour.get("hang_from_start", 1 << 30)
    if kind == "engine" and not hangs:
        start_engine(name, run_dir, dies_when_stopped=behaviour.get("die_when_stopped", False))
    if kind == "front":
        start_http(behaviour["port"])
    if kind == "store":
        start_listening(run_dir)
    signal.signal(signal.SIGTERM, lambda *_: leave(mark, 143))
    threading.Thread(target=leave_with_supervisor, args=(mark,), daemon=True).start()
    threading.Event().wait()


def count(path: Path) -> int:
    with path.open("a") as file:
        file.write(f"{time.monotonic()}\n")
    return len(path.read_text().splitlines())


def leave_with_supervisor(mark: ChildMark) -> None:
    wait_parent_pipe_ended()
    leave(mark, 143)


def leave(mark: ChildMark, status: int) -> None:
    tree = own_mark()
    assert tree is not None
    end_marked_now(tree)
    mark.leave(supervisor_gone=parent_pipe_ended())
    os._exit(status)


def start_engine(name: str, run_dir: Path, *, dies_when_stopped: bool) -> None:
    """A real runner with an engine that does nothing, so that the coordinator sees a real member."""
    import asyncio

    from idle_engine import IdleEngine

    from interlock.engines.runner import Runner, RunnerConfig
    from interlock.host.real import RealHost

    class Dies(IdleEngine):
        async def stop(self) -> None:
            leave(ChildMark(run_dir), 9)

    async def run() -> int:
        config = RunnerConfig(
            name=name,
            address=f"unix:{run_dir}/{name}.sock",
            coordinator=f"unix:{run_dir}/coordinator.sock",
            state_dir=run_dir / "state" / name,
            version="0",
        )
        return await Runner(RealHost(), Dies() if dies_when_stopped else IdleEngine(), config).run()

    def end_with_status() -> None:
        status = asyncio.run(run())
        leave(ChildMark(run_dir), status)

    threading.Thread(target=end_with_status, daemon=True).start()


def start_http(port: int) -> None:
    import http.server

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def start_listening(run_dir: Path) -> None:
    import socket

    listener = socket.socket(socket.AF_UNIX)
    path = run_dir / "store.sock"
    path.unlink(missing_ok=True)
    listener.bind(str(path))
    listener.listen()
    globals()["listener"] = listener


if __name__ == "__main__":
    main()

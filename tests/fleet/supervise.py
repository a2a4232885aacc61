"""A supervisor over stand-in parts, as a process of its own, so that it can be killed. `supervise.py PORT BASE BEHAVIOUR`."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
from pathlib import Path

from interlock.cli.processes import encode_config
from interlock.fleet.coordinator import CoordinatorConfig
from interlock.fleet.launchers.local import LocalLauncher, Part
from interlock.fleet.launchers.rundir import RunDir, RunDirBusy
from interlock.fleet.plan import FleetPlan
from interlock.fleet.supervisor import Supervisor
from interlock.host.real import RealHost

STAND_IN = Path(__file__).parent / "stand_in.py"


async def supervise(port: int, base: Path, behaviour: dict[str, dict[str, object]]) -> int:
    host = RealHost()
    mark = secrets.token_hex(16)
    run_dir = await RunDir.claim(host, port, mark, base)
    run = run_dir.path
    states = run / "state"
    states.mkdir()

    def part(kind: str, name: str) -> Part:
        return Part(
            name=name, kind=kind, config=json.dumps({"port": port} | behaviour.get(name, {})).encode()
        )

    coordinator = f"unix:{run}/coordinator.sock"
    config = CoordinatorConfig(
        address=coordinator,
        state_dir=states / "coordinator",
        expected=["engine-0", "engine-1"],
        launches=True,
    )
    plan = FleetPlan(
        coordinator=Part(name="coordinator", kind="coordinator", config=encode_config(config)),
        store=part("store", "store"),
        engines=[part("engine", "engine-0"), part("engine", "engine-1")],
        front=part("front", "front"),
        coordinator_address=coordinator,
        store_address=f"unix:{run}/store.sock",
        http_host="127.0.0.1",
        http_port=port,
        states=states,
    )
    launcher = LocalLauncher(host, run, mark, [sys.executable, str(STAND_IN)])
    supervisor = Supervisor(host, launcher, plan, lambda line: print(line, flush=True))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, supervisor.leave, "got SIGTERM", 0)
    try:
        return await supervisor.run()
    finally:
        launcher.close()
        run_dir.remove()


if __name__ == "__main__":
    # A shell without job control starts its background jobs, a test run among them, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(asyncio.run(supervise(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))))
    except RunDirBusy as error:
        print(error, flush=True)
        sys.exit(1)

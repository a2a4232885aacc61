"""`interlock attach URL` as a process: it speaks for a server until it is told to end, and takes its leave."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "engines" / "attached"))

from stand_in_vllm import StandInVllm

from interlock.cli.main import main
from interlock.fleet.client import FleetClient
from interlock.fleet.coordinator import Coordinator, CoordinatorConfig
from interlock.fleet.launchers.rundir import coordinator_address
from interlock.host.real import RealHost
from interlock.wire.identity import load_identity

PORT = 4712


async def test_a_server_is_a_member_for_as_long_as_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    host, address = RealHost(), coordinator_address(PORT)
    run = Path(address.removeprefix("unix:")).parent
    run.mkdir(parents=True)
    host.files.make_private_dir(run / "state")
    coordinator = Coordinator(
        host,
        load_identity(host, run / "state", "coordinator"),
        CoordinatorConfig(address=address, state_dir=run / "state", recovering_s=0.1),
    )
    await coordinator.start()
    leading = asyncio.create_task(coordinator.run())
    client = FleetClient(host, address)
    while coordinator.fleet.phase != "LEADING":
        await asyncio.sleep(0.01)
    async with StandInVllm() as server:
        argv = [
            sys.executable,
            "-m",
            "interlock",
            "attach",
            server.url,
            "--port",
            str(PORT),
            "--name",
            "theirs",
        ]
        child = await host.spawn(argv, env=dict(os.environ), log=tmp_path / "log")
        try:
            async with asyncio.timeout(40):
                while not any(m.state == "RUNNING" for m in (await client.status()).members):
                    assert child.returncode is None, (tmp_path / "log").read_text()
                    await asyncio.sleep(0.05)
                async with client.paused():
                    assert server.paused
                child.terminate()
                assert await child.wait() == 0
            (member,) = (await client.status()).members
            assert (member.name, member.state) == ("theirs", "LOST")
            said = (tmp_path / "log").read_text()
            assert "theirs is attached to the fleet on port 4712. Without:" in said
            assert "exit_proof" in said
            assert "theirs is detached" in said
        finally:
            await child.end_tree(5.0)
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)
            await coordinator.close()


def test_a_server_that_cannot_be_attached_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attach", "localhost:8000"]) == 1
    assert "no URL of a server: http://host:port is" in capsys.readouterr().err

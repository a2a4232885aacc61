"""The front as a process of its own: its port, its model, and that it leaves when it is told or its supervisor is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from interlock.core.limits import CHILD_GRACE_SECONDS
from interlock.host.ports import bind_port, port_of
from interlock.host.processes import PARENT_FD
from interlock.testing.text_files import write_text_files

SCRIPT = """
import asyncio, sys
from pathlib import Path
from interlock.host.real import RealHost
from interlock.web.main import FrontConfig, run_front
run, port, fd = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
config = FrontConfig(
    coordinator_address=f"unix:{run}/coordinator.sock", model_dir=run / "model", served_model_name="tiny",
    state_dir=run / "front", port=port, listen_fd=int(fd) if fd else None, admin_token_file=run / "token",
)
try:
    asyncio.run(run_front(RealHost(), config, on_ready=lambda port: print(port, flush=True)))
except (OSError, ValueError) as error:
    sys.exit(str(error))
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    write_text_files(tmp_path / "model")
    (tmp_path / "token").write_text("t0k\n")
    return tmp_path


async def start(run_dir: Path, port: int = 0, fd: int | None = None, parent: int | None = None) -> Any:
    env = dict(os.environ) | ({} if parent is None else {PARENT_FD: str(parent)})
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, str(run_dir), str(port), "" if fd is None else str(fd),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env,
        pass_fds=[f for f in (fd, parent) if f is not None],
    )  # fmt: skip


async def ready(child: Any) -> int:
    async with asyncio.timeout(30):
        line = await child.stdout.readline()
    assert line, (await child.stderr.read()).decode()
    return int(line)


async def left(child: Any) -> int:
    async with asyncio.timeout(CHILD_GRACE_SECONDS):
        return int(await child.wait())


async def test_a_front_without_a_coordinator_says_so_and_leaves_on_sigterm(run_dir: Path) -> None:
    child = await start(run_dir)
    port = await ready(child)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
        health = await client.get("/health")
        assert (health.status_code, health.json()["coordinator"]) == (503, "away")
        answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_engine")
        assert (await client.get("/interlock/status")).status_code == 401
        status = await client.get("/interlock/status", headers={"authorization": "Bearer t0k"})
        assert (status.status_code, status.json()["error"]["code"]) == (503, "no_coordinator")
        child.send_signal(signal.SIGTERM)
        assert await left(child) == 0, (await child.stderr.read()).decode()


async def test_a_front_leaves_when_its_supervisor_is_gone(run_dir: Path) -> None:
    reading, writing = os.pipe()
    child = await start(run_dir, parent=reading)
    await ready(child)
    os.close(reading)
    os.close(writing)
    assert await left(child) == 0


async def test_a_busy_port_is_a_sentence_that_names_it(run_dir: Path) -> None:
    with bind_port("127.0.0.1", 0) as taken:
        taken.listen()
        port = port_of(taken)
        child = await start(run_dir, port)
        _, said = await child.communicate()
    assert child.returncode == 1
    assert f"port {port} of 127.0.0.1 is in use; stop what listens there" in said.decode()


async def test_a_port_bound_by_the_parent_is_served(run_dir: Path) -> None:
    with bind_port("127.0.0.1", 0) as bound:
        child = await start(run_dir, fd=bound.fileno())
        assert await ready(child) == port_of(bound)
        async with httpx.AsyncClient(timeout=10) as client:
            assert (await client.get(f"http://127.0.0.1:{port_of(bound)}/health")).status_code == 503
    child.terminate()
    assert await left(child) == 0


async def test_an_empty_token_file_is_an_error_not_an_open_door(run_dir: Path) -> None:
    (run_dir / "token").write_text("\n")
    child = await start(run_dir)
    _, said = await child.communicate()
    assert child.returncode == 1
    assert "holds no admin token" in said.decode()


async def test_an_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(OSError, match="choose another"):
        bind_port("192.0.2.1", 0)
    with pytest.raises(OSError, match="no address"):
        bind_port("no such host.invalid", 0)

"""The processes that the supervisor starts, one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.cli import processes
from interlock.fleet.coordinator_main import CoordinatorConfig
from interlock.host.real import RealHost
from interlock.host.sweep import FileLock


async def test_a_coordinator_does_not_begin_while_another_may_write_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor was killed, and the next fleet of its state directory, on another port, begins within the children's grace."""
    monkeypatch.setattr(processes, "CHILD_GRACE_SECONDS", 0.05)
    state = tmp_path / "coordinator"
    state.mkdir(mode=0o700)
    other = FileLock.take(state / "lock")
    assert other is not None
    config = CoordinatorConfig(address=f"unix:{tmp_path}/c.sock", state_dir=state)
    host = RealHost()
    with pytest.raises(OSError, match="in use by another coordinator"):
        await processes._coordinator(host, processes.encode_config(config))
    assert [file.name for file in state.iterdir()] == ["lock"], "it has written nothing"
    other.release()
    host.close()

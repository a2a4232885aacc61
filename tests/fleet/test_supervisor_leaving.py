"""A fleet that leaves starts nobody any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.fleet.launchers.local import Part
from interlock.fleet.plan import FleetPlan
from interlock.fleet.supervisor import Supervisor
from interlock.host.real import RealHost


class Launcher:
    def __init__(self) -> None:
        self.started: list[str] = []

    async def start(self, part: Part) -> None:
        self.started.append(part.name)
        raise OSError("not here")


def part(name: str, kind: str) -> Part:
    return Part(name=name, kind=kind, config=b"{}")


async def test_who_waits_to_be_started_again_is_not_started_once_the_fleet_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be in nobody's list of what is to be ended."""
    host, launcher = RealHost(), Launcher()
    plan = FleetPlan(
        coordinator=part("coordinator", "coordinator"),
        store=None,
        engines=[part("engine-0", "engine")],
        front=part("front", "front"),
        coordinator_address=f"unix:{tmp_path}/coordinator.sock",
        store_address="",
        http_host="127.0.0.1",
        http_port=1,
        states=tmp_path,
    )
    supervisor = Supervisor(host, launcher, plan, lambda _: None)  # type: ignore[arg-type]

    def pause_s(_: object) -> float:
        supervisor._leaving.set()  # meanwhile
        return 0.0

    monkeypatch.setattr(supervisor, "_pause_s", pause_s)
    await supervisor._keep(supervisor._kept["engine-0"])
    assert launcher.started == []
    host.close()

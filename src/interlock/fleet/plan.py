"""What a fleet on one machine consists of: its processes, and where each is seen to be up."""

from __future__ import annotations

from pathlib import Path

import msgspec

from interlock.fleet.launchers.local import Part


class FleetPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to run, and how to see that it does."""

    coordinator: Part
    store: Part | None
    engines: list[Part]
    front: Part
    coordinator_address: str
    store_address: str
    http_host: str
    http_port: int
    example: str = ""
    """Said once the fleet is up: how to ask it something."""
    stays: bool = True
    """A fleet whose engines are all STOPPED waits for START; else it leaves."""
    outlives: bool = False
    """`states` outlive the supervisor: what was commanded last is asked for before any engine starts."""
    states: Path
    """Where each engine keeps its identity: `<states>/<name>/identity.json`."""

    @property
    def parts(self) -> list[Part]:
        """In the order in which they are started."""
        store = [self.store] if self.store is not None else []
        return [self.coordinator, *store, *self.engines, self.front]

    @property
    def reachable_host(self) -> str:
        """Where this machine itself reaches the front."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.http_host, self.http_host)

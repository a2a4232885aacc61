"""A client of the fleet on this machine, by the port that names it: `interlock.connect` and `interlock.connect_blocking`."""

from __future__ import annotations

from interlock.fleet.blocking_client import BlockingFleetClient
from interlock.fleet.client import FleetClient
from interlock.fleet.launchers.rundir import coordinator_address
from interlock.host.real import RealHost

PORT_DEFAULT = 8000


def address_of(fleet: int | str) -> str:
    """The coordinator's address: that of the fleet on this port, or the address itself (`unix:/path`).

    Raises ValueError for what is neither.
    """
    if isinstance(fleet, int):
        return coordinator_address(fleet)
    if fleet.isdecimal():
        return coordinator_address(int(fleet))
    if not fleet.startswith("unix:/"):
        raise ValueError(
            f"{fleet!r} names no fleet: give the HTTP port of one on this machine, or its coordinator's unix:/path"
        )
    return fleet


def connect(fleet: int | str = PORT_DEFAULT) -> FleetClient:
    """A client of the fleet on that HTTP port (or of the coordinator at that address). Connects at each call, not here."""
    return FleetClient(RealHost(), address_of(fleet))


def connect_blocking(fleet: int | str = PORT_DEFAULT) -> BlockingFleetClient:
    """The same, for a thread without an event loop."""
    return BlockingFleetClient(RealHost(), address_of(fleet))

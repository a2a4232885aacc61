"""Interlock runs a fleet of LLM inference engines as one service.

    interlock.connect(port)           a fleet's client, for code with an event loop (`FleetClient`)
    interlock.connect_blocking(port)  its synchronous twin, for a trainer's plain thread (`BlockingFleetClient`)
    interlock.attach(engine)          a vLLM engine that somebody else runs becomes a member of the fleet

Nothing is imported before it is used: `import interlock` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from interlock.attaching import attach
    from interlock.core.errors import ChannelFault, InterlockError
    from interlock.engines.attached.attach import Attachment
    from interlock.fleet.blocking_client import BlockingFleetClient
    from interlock.fleet.client import CommandFailed, FleetClient
    from interlock.fleet.connecting import connect, connect_blocking
    from interlock.fleet.pausing import HoldLeft

__all__ = [
    "Attachment",
    "BlockingFleetClient",
    "ChannelFault",
    "CommandFailed",
    "FleetClient",
    "HoldLeft",
    "InterlockError",
    "attach",
    "connect",
    "connect_blocking",
]

_PLACES = {
    "Attachment": "interlock.engines.attached.attach",
    "BlockingFleetClient": "interlock.fleet.blocking_client",
    "ChannelFault": "interlock.core.errors",
    "CommandFailed": "interlock.fleet.client",
    "FleetClient": "interlock.fleet.client",
    "HoldLeft": "interlock.fleet.pausing",
    "InterlockError": "interlock.core.errors",
    "attach": "interlock.attaching",
    "connect": "interlock.fleet.connecting",
    "connect_blocking": "interlock.fleet.connecting",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'interlock' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])

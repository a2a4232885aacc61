"""The coordinator as a process: one life, from its incarnation on disk to its last message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from interlock.fleet.coordinator import Coordinator, CoordinatorConfig, Deposed
from interlock.host.base import Host
from interlock.telemetry.events import EventLog
from interlock.wire.identity import load_identity

__all__ = ["CoordinatorConfig", "Deposed", "run_coordinator"]


async def run_coordinator(
    host: Host,
    config: CoordinatorConfig,
    *,
    name: str = "coordinator",
    events: EventLog | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Coordinates until it is cancelled; `on_ready` is called once members and administrators can connect.

    Raises `Deposed` when a higher epoch exists, `OSError` when its address or its state directory cannot be had,
    `StaleError` when a newer life of it was accepted somewhere.
    """
    host.files.make_private_dir(config.state_dir)
    me = load_identity(host, config.state_dir, name)
    coordinator = Coordinator(host, me, config, events)
    try:
        await coordinator.start()
        on_ready()
        await coordinator.run()
    finally:
        # In a task of its own: whoever cancels us must not leave a socket behind.
        await asyncio.shield(asyncio.ensure_future(coordinator.close()))

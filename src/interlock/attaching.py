"""`interlock.attach`: the fleet may be named by its port, as everywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interlock.engines.attached.attach import Attachment
from interlock.engines.attached.attach import attach as attach_at
from interlock.engines.attached.engine import Update
from interlock.fleet.connecting import PORT_DEFAULT, address_of


async def attach(
    engine: Any,
    *,
    coordinator: int | str = PORT_DEFAULT,
    name: str | None = None,
    version: str = "0",
    weights: str | Path = "",
    update: Update | None = None,
    api_key: str | None = None,
    sleeps: bool = False,
) -> Attachment:
    """Makes an engine that you run a member of a fleet: paused, updated and watched with it, neither started nor ended by it.

    An engine of this process is spoken for by this event loop: while a training step blocks it, the fleet hears nothing. One that stands
    paused may be silent; one that should run is SUSPECT after five seconds, and no command that needs it ends meanwhile.

    `engine`: a vLLM `AsyncLLM` on this event loop, or the URL of a `vllm serve` with VLLM_SERVER_DEV_MODE=1. `coordinator`: the HTTP
    port of a fleet on this machine, or its coordinator's `unix:/path`. The rest, and what it raises, stands in
    `interlock.engines.attached.attach`; what cannot be guaranteed in `Attachment.lacks`.
    """
    return await attach_at(
        engine,
        coordinator=address_of(coordinator),
        name=name,
        version=version,
        weights=weights,
        update=update,
        api_key=api_key,
        sleeps=sleeps,
    )

"""The front as a process: its port, its life, and how it leaves without breaking a stream in silence."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from interlock.core.limits import CHILD_GRACE_SECONDS, HTTP_CONNECTIONS_MAX
from interlock.fleet.client import FleetClient
from interlock.fleet.dispatcher import Dispatcher
from interlock.host.base import Host
from interlock.host.leaving import first_of, signalled
from interlock.host.ports import adopt_port, bind_port, port_of
from interlock.host.processes import parent_gone
from interlock.telemetry.events import EventLog
from interlock.text.model import TextModel
from interlock.web.app import make_app
from interlock.web.front import Access, Front
from interlock.wire.identity import load_identity

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
TOKEN_FILE_BYTES_MAX = 4096
FAREWELL_SECONDS = 1.0
"""What the last error events, and then idle connections, get to leave."""


class FrontConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a front needs to know."""

    coordinator_address: str
    model_dir: Path
    served_model_name: str
    state_dir: Path
    """A private directory of its own; its incarnation is kept there."""
    host: str = "127.0.0.1"
    port: int = 8000
    listen_fd: int | None = None
    """A socket that the parent has bound; `host` and `port` are then not used."""
    name: str = "front"
    api_key: str | None = None
    """Asked of everybody, health excepted. None: anybody who reaches the port may use the model."""
    admin_token_file: Path | None = None
    """Whoever knows its content may command the fleet."""
    drain_seconds: float = CHILD_GRACE_SECONDS - 2 * FAREWELL_SECONDS
    """What streams get to end by themselves once the front has to leave."""


async def run_front(
    host: Host,
    config: FrontConfig,
    *,
    events: EventLog | None = None,
    on_ready: Callable[[int], None] = lambda _: None,
) -> None:
    """Serves until SIGTERM or SIGINT, or until the supervisor is gone (`INTERLOCK_PARENT_FD`); `on_ready` gets the port.

    Raises `ModelFilesError` for a model whose text cannot be served, `OSError` when the port is taken, `ValueError` for an
    admin token file that is empty, and `StaleError` when a newer life of this front was accepted somewhere.
    """
    text = await host.in_thread(TextModel.load, config.model_dir)
    access = Access(config.api_key or None, read_token(host, config.admin_token_file))
    host.files.make_private_dir(config.state_dir)
    me = load_identity(host, config.state_dir, config.name)
    sock = bind_port(config.host, config.port) if config.listen_fd is None else adopt_port(config.listen_fd)
    with contextlib.closing(sock), signalled() as stop:
        async with Dispatcher(
            host, me, config.coordinator_address, events=events, keep_in=config.state_dir
        ) as fleet:
            coordinator = FleetClient(host, config.coordinator_address)
            front = Front(
                host, fleet, coordinator, text, served_model_name=config.served_model_name, access=access
            )
            server = FrontServer(front)
            serving = asyncio.create_task(server.serve(sockets=[sock]), name="http")
            try:
                await first_of(server.listening.wait(), asyncio.shield(serving))
                log.info("front %s serves %s on port %d", me.name, config.served_model_name, port_of(sock))
                on_ready(port_of(sock))
                assert fleet.stale is not None
                await first_of(
                    stop.wait(), parent_gone(), asyncio.shield(fleet.stale), asyncio.shield(serving)
                )
            finally:
                await leave(front, fleet, server, serving, config.drain_seconds)
            if fleet.stale.done():
                raise fleet.stale.result()


def read_token(host: Host, path: Path | None) -> str | None:
    """Raises `ValueError` where a token was promised and there is none: commands would be refused for no visible reason."""
    if path is None:
        return None
    token = (host.files.read(path, TOKEN_FILE_BYTES_MAX) or b"").decode(errors="replace").strip()
    if not token:
        raise ValueError(f"{path} holds no admin token; write one there or leave it out")
    return token


class FrontServer(uvicorn.Server):
    """uvicorn on a socket that is bound already, without signal handlers of its own."""

    def __init__(self, front: Front) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(front),
                http="httptools",
                ws="none",
                lifespan="off",
                loop="none",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=HTTP_CONNECTIONS_MAX,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        self.listening.set()


async def leave(
    front: Front, fleet: Dispatcher, server: FrontServer, serving: asyncio.Task[None], drain_seconds: float
) -> None:
    """Nothing new; streams may end by themselves; then each is told that it was cut; then connections close."""
    front.leaving = True
    server.should_exit = True
    done, _ = await asyncio.wait((serving,), timeout=drain_seconds)
    if not done:
        await fleet.close()  # every request left ends by a named error
        done, _ = await asyncio.wait((serving,), timeout=FAREWELL_SECONDS)
    if not done:
        log.warning("%d connections did not end in time and are closed", len(server.server_state.connections))
        server.force_exit = True
        for task in list(server.server_state.tasks):
            task.cancel()
        serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)

"""A fleet in one process, over real sockets: a real coordinator, scripted engines, a dispatcher."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

sys.path.append(str(Path(__file__).parent))

from scripted_engine import ScriptedEngine

from interlock.core.sampling import Sampling
from interlock.fleet.client import FleetClient
from interlock.fleet.coordinator import Coordinator, CoordinatorConfig
from interlock.fleet.dispatcher import Dispatcher
from interlock.fleet.generation import Generation
from interlock.fleet.ledger import GenerationRequest
from interlock.host.base import Child
from interlock.host.real import RealHost
from interlock.wire.fleet_messages import Member
from interlock.wire.identity import load_identity, passing_identity

WAIT_SECONDS = 10.0


class Fleet:
    """What one test needs. Everything started here is closed at the end, in reverse."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.host = directory, RealHost()
        self.address = f"unix:{directory}/coordinator.sock"
        self.stack = contextlib.AsyncExitStack()
        self.coordinator: Coordinator | None = None
        self.running: asyncio.Task[None] | None = None
        self.dispatcher: Dispatcher | None = None
        self.client = FleetClient(self.host, self.address)
        self._ids = 0

    # --- parts ----------------------------------------------------------------------------------------------------

    async def start_coordinator(self, **config: object) -> Coordinator:
        state = self.directory / "coordinator"
        self.host.files.make_private_dir(state)
        settings = {"recovering_s": 0.3, "exit_is_proof": True} | config
        self.coordinator = Coordinator(
            self.host,
            load_identity(self.host, state, "coordinator"),
            CoordinatorConfig(address=self.address, state_dir=state, **settings),  # type: ignore[arg-type]
        )
        await self.coordinator.start()
        self.running = asyncio.create_task(self.coordinator.run())
        return self.coordinator

    async def stop_coordinator(self, *, lose_state: bool = False) -> None:
        """As a crash: nobody is told anything."""
        assert self.coordinator is not None
        assert self.running is not None
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.coordinator.close()
        self.coordinator = None
        if lose_state:
            for file in (self.directory / "coordinator").iterdir():
                file.unlink()

    def end_holds(self) -> None:
        """Their deadlines are over now. A hold of a fraction of a second may end before its pause stands, where no core is free."""
        assert self.coordinator is not None
        decisions = self.coordinator._decisions
        ended = tuple(msgspec.structs.replace(hold, deadline_s=0.0) for hold in decisions.fleet.holds)
        decisions.fleet = msgspec.structs.replace(decisions.fleet, holds=ended)

    async def engine(self, name: str, *, directory: str = "", **more: object) -> ScriptedEngine:
        home = self.directory / (directory or name)
        engine = ScriptedEngine(self.host, home, name, self.address, **more)  # type: ignore[arg-type]
        return await self.stack.enter_async_context(engine)

    async def engine_process(self, name: str, step_s: float) -> Child:
        self.directory.joinpath(name).mkdir(mode=0o700, exist_ok=True)
        program = Path(__file__).parent / "scripted_engine.py"
        argv = [sys.executable, str(program), str(self.directory / name), name, self.address, str(step_s)]
        child = await self.host.spawn(argv, env=dict(os.environ), log=self.directory / f"{name}.log")
        self.stack.push_async_callback(child.end_tree, 5.0)
        return child

    async def start_dispatcher(self, **more: object) -> Dispatcher:
        me = passing_identity(self.host, "front")
        self.dispatcher = Dispatcher(self.host, me, self.address, **more)  # type: ignore[arg-type]
        return await self.stack.enter_async_context(self.dispatcher)

    async def close(self) -> None:
        await self.stack.aclose()
        if self.coordinator is not None:
            await self.stop_coordinator()
        self.host.close()

    # --- what tests ask ---------------------------------------------------------------------------------------------

    async def until(self, condition: Callable[[], object], what: str = "") -> None:
        """Looks every 5 ms, for at most WAIT_SECONDS: for things that nobody announces."""
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not condition():
                    await asyncio.sleep(0.005)
        except TimeoutError:
            seen = self.dispatcher.membership if self.dispatcher else None
            pytest.fail(f"waited {WAIT_SECONDS} s for {what or condition}; membership: {seen}")

    def member(self, name: str) -> Member | None:
        assert self.dispatcher is not None
        view = self.dispatcher.membership
        return next((m for m in view.members if m.name == name), None) if view else None

    async def ready(self, *names: str, state: str = "RUNNING") -> None:
        """Until the front sees them so, and reaches them."""

        def reached() -> bool:
            assert self.dispatcher is not None
            links = {life.name: link for life, link in self.dispatcher._links.items()}
            members = [self.member(name) for name in names]
            return all(m is not None and m.state == state and m.standing for m in members) and all(
                name in links and links[name].up for name in names
            )

        await self.until(reached, f"{names} to be {state}")

    def ask(self, prompt: list[int], max_tokens: int, **more: object) -> Generation:
        assert self.dispatcher is not None
        self._ids += 1
        sampling = {k: v for k, v in more.items() if k in Sampling.__struct_fields__}
        rest = {k: v for k, v in more.items() if k not in sampling}
        sampling = {"temperature": 0.0, "max_tokens": max_tokens} | sampling
        return self.dispatcher.submit(
            GenerationRequest(
                id=f"r{self._ids}",
                prompt=prompt,
                sampling=Sampling(**sampling),  # type: ignore[arg-type]
                **rest,  # type: ignore[arg-type]
            )
        )


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    fleet = Fleet(tmp_path)
    try:
        yield fleet
    finally:
        if fleet.dispatcher is not None:
            fleet.dispatcher.check_integrity()
        await fleet.close()

"""Who uses the simulated fleet: clients with prompts, an administrator who pauses it, the launcher that starts again what dies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from interlock.core.errors import ChannelFault, InterlockError
from interlock.fleet.client import CommandFailed, FleetClient
from interlock.fleet.dispatcher import Dispatcher, NoMember, Overloaded, RequestFailed
from interlock.fleet.ledger import GenerationRequest
from interlock.testing.sim.host import SimHost
from interlock.testing.sim.kernel import SimProcess
from interlock.wire.engine_messages import Sampling
from interlock.wire.identity import incarnation_in

if TYPE_CHECKING:
    from interlock.testing.sim.worlds import World

STATES = Path("/var/lib/interlock")
TOLD_SECONDS = 1.0
EXCUSED = ("engine_failed", "no_member", "stopped", "closed", "deadline", "cannot_continue")
"""Named ends that a request may have while faults go on."""


class Client:
    """Sends one request after the other through a front of its own process, and reads the answers at its own pace."""

    def __init__(self, world: World, host: SimHost, dispatcher: Dispatcher, number: int) -> None:
        self._world, self._host, self._dispatcher, self.number = world, host, dispatcher, number
        self._requests = 0

    async def run(self) -> None:
        rng = self._host.process.kernel.rng
        while not self._world.calm:
            await self._host.clock.sleep_s(rng.expovariate(2.0))
            await self._ask(abort=rng.random() < 0.08)
        if self.number == 0:
            while not await self._ask(abort=False):
                await self._host.clock.sleep_s(0.3)
            self._world.probed(self._host.process.name)

    async def _ask(self, *, abort: bool) -> bool:
        """Whether all tokens came."""
        rng = self._host.process.kernel.rng
        self._requests += 1
        name = f"{self._host.process.name}.{self._host.process.pid}.{self.number}.{self._requests}"
        prompt = [int(rng.random() * 1000) for _ in range(1 + int(rng.random() * 8))]
        limit = 1 + int(rng.random() * 40)
        request = GenerationRequest(
            id=name, prompt=prompt, sampling=Sampling(max_tokens=limit, temperature=0.0), deadline_s=120.0
        )
        tokens: list[int] = []
        finish = ""
        try:
            generation = self._dispatcher.submit(request)
            self._world.open[name] = self._host.process
            async for piece in generation:
                tokens += piece.token_ids
                finish = piece.finish
                if abort and len(tokens) > limit // 2:
                    await generation.abort()
                elif rng.random() < 0.1:
                    await self._host.clock.sleep_s(rng.random() * 0.5)
        except (NoMember, Overloaded):
            pass
        except RequestFailed as failed:
            if failed.code not in EXCUSED:
                self._world.violation(f"request {name} failed: {failed}")
        self._world.open.pop(name, None)
        self._world.delivered(name, prompt, tokens, limit, finish)
        self._world.served += finish == "length"
        return finish == "length"


class Administrator:
    """Pauses the fleet now and then, looks whether it stands, and lets it run again. Its word is law for the checks."""

    def __init__(self, world: World, host: SimHost, coordinator: str) -> None:
        self._world, self._host = world, host
        self._client = FleetClient(host, coordinator)

    async def run(self) -> int:
        rng = self._host.process.kernel.rng
        while not self._world.calm:
            await self._host.clock.sleep_s(rng.uniform(0.5, 5.0))
            owner = rng.choice(("trainer", "operator"))
            if not self._world.shape.quiet:
                await self._pause_for_a_while(owner)
        for owner in ("trainer", "operator"):
            await self._let_go(owner)
        self._world.probed("admin")
        if self._world.shape.stop:
            await self._stop()
        await asyncio.Event().wait()
        return 0

    async def _pause_for_a_while(self, owner: str) -> None:
        rng = self._host.process.kernel.rng
        mode = rng.choice(("wait", "keep", "keep", "abort"))
        self._world.aborting |= mode == "abort"
        ends = rng.random() < 0.2
        try:
            await self._client.pause(
                mode, owner=owner, timeout_s=rng.uniform(1.0, 8.0), hold_seconds=3.0 if ends else None
            )
        except (CommandFailed, ChannelFault, TimeoutError, OSError, InterlockError) as error:
            self._world.kernel.note(f"{owner} could not pause: {error}")
        else:
            self._world.kernel.note(f"{owner} was told that the fleet stands ({mode})")
            if not ends:
                self._world.held[owner] = self._host.clock.monotonic_s() - self._host.process.machine.boot_s
        await self._host.clock.sleep_s(rng.choice((0.5, 2.0, 8.0)) * rng.uniform(0.0, 2.0))
        await self._let_go(owner)

    async def _let_go(self, owner: str) -> None:
        """UNPAUSE, as often as it takes until it is done or refused because nothing is held."""
        while True:
            self._world.held.pop(owner, None)
            try:
                await self._client.unpause(owner=owner, timeout_s=5.0)
            except ChannelFault as refused:
                if not refused.retryable:
                    return
            except CommandFailed:
                return  # it was accepted: the hold is released, however long the members take
            except (TimeoutError, OSError, InterlockError) as error:
                self._world.kernel.note(f"{owner} could not unpause: {error}")
            else:
                return
            await self._host.clock.sleep_s(0.2)

    async def _stop(self) -> None:
        while self._world.unserved(besides_stop=True):
            await self._host.clock.sleep_s(0.2)
        self._world.aborting = True
        while True:
            try:
                await self._client.stop(owner="operator", timeout_s=20.0, composite=True)
            except (CommandFailed, ChannelFault, TimeoutError, OSError, InterlockError) as error:
                self._world.kernel.note(f"operator could not stop the fleet: {error}")
                await self._host.clock.sleep_s(0.5)
            else:
                break
        self._world.probed("stop")


class Launcher:
    """Sees exits as a supervisor does, and tells the coordinator of each until that has heard it."""

    def __init__(self, world: World, host: SimHost, coordinator: str) -> None:
        self._world, self._host = world, host
        self._client = FleetClient(host, coordinator)

    async def run(self) -> int:
        await asyncio.Event().wait()
        return 0

    def saw_end(self, process: SimProcess) -> None:
        """Reads which life it was before the next one begins."""
        inode = process.machine.disk.names.get(str(STATES / process.name / "identity.json"))
        incarnation = incarnation_in(inode.now if inode is not None else None)
        if incarnation:
            self._host.process.run(lambda: self._tell(process.name, incarnation), f"gone {process.name}")

    async def _tell(self, name: str, incarnation: int) -> None:
        while True:
            try:
                await self._client.member_gone(name, incarnation, TOLD_SECONDS)
            except (OSError, InterlockError, TimeoutError):
                await self._host.clock.sleep_s(0.5)
            else:
                return

"""Who uses the simulated fleet: clients with prompts, who come back for their answers where a front has died, and the launcher that
sees what dies. (`administrators` are others.)"""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from interlock.core.errors import InterlockError
from interlock.core.sampling import Sampling
from interlock.core.targets import State
from interlock.fleet.client import FleetClient
from interlock.fleet.dispatcher import Dispatcher, Generation, NoMember, Overloaded, RequestFailed
from interlock.fleet.ledger import GenerationRequest
from interlock.testing.sim.checks import Reading
from interlock.testing.sim.host import SimHost
from interlock.testing.sim.kernel import SimProcess
from interlock.testing.sim.tokens import spread
from interlock.wire.identity import incarnation_in

if TYPE_CHECKING:
    from interlock.testing.sim.worlds import World

STATES = Path("/var/lib/interlock")
TOLD_SECONDS = 1.0
EXCUSED = ("engine_failed", "no_member", "stopped", "closed", "deadline", "cannot_continue", "not_taken_up")
"""Named ends that a request may have while faults go on."""
STEMS = [[stem * 10_000 + n for n in range(4 * stem + 4)] for stem in range(3)]
"""Beginnings that prompts share, so that cached blocks are found."""
HTTP_NAMES = ("cmpl-", "chatcmpl-")
LOOK_SECONDS = 0.3


class Reader:
    """Reads answers at its own pace, and has each judged."""

    def __init__(self, world: World, host: SimHost, dispatcher: Dispatcher) -> None:
        self._world, self._host, self._dispatcher = world, host, dispatcher

    async def _read(self, request: str, generation: Generation, reading: Reading) -> bool:
        """Whether all tokens came."""
        rng = self._host.process.kernel.rng
        self._world.open[request] = reading
        finish = ""
        try:
            async for piece in generation:
                reading.tokens += piece.token_ids
                reading.versions += spread(piece.made)
                finish = piece.finish
                if reading.leaves and len(reading.tokens) > reading.limit // 2:
                    await generation.abort()
                elif rng.random() < 0.1:
                    await self._host.clock.sleep_s(rng.random() * 0.5)
        except (NoMember, Overloaded):
            pass
        except RequestFailed as failed:
            if failed.code not in EXCUSED:
                self._world.violation(f"request {request} failed: {failed}")
        self._world.open.pop(request, None)
        self._world.delivered(request, reading, finish)
        self._world.served += finish == "length"
        return finish == "length"


class Client(Reader):
    """Sends one request after the other through a front of its own process."""

    def __init__(self, world: World, host: SimHost, dispatcher: Dispatcher, number: int) -> None:
        super().__init__(world, host, dispatcher)
        self.number = number

    async def run(self) -> None:
        rng = self._host.process.kernel.rng
        while not self._world.calm:
            await self._host.clock.sleep_s(rng.expovariate(2.0))
            await self._ask(leaves=rng.random() < 0.08)
        if self.number == 0:
            while not await self._ask(leaves=False):
                await self._host.clock.sleep_s(0.3)
            self._world.probed(self._host.process.name)

    async def _ask(self, *, leaves: bool) -> bool:
        rng = self._host.process.kernel.rng
        name = f"{self._host.process.name}.{self.number}.{self._world.next_number()}"
        prompt = [int(rng.random() * 1000) for _ in range(1 + int(rng.random() * 8))]
        if self._world.shape.weights and rng.random() < 0.6:
            prompt = [*rng.choice(STEMS), *prompt[:3]]
        limit = 1 + int(rng.random() * 40)
        request = GenerationRequest(
            id=name, prompt=prompt, sampling=Sampling(max_tokens=limit, temperature=0.0), deadline_s=120.0
        )
        try:
            generation = self._dispatcher.submit(request)
        except (NoMember, Overloaded):
            return False
        return await self._read(name, generation, Reading(self._host.process, prompt, limit, leaves=leaves))


class Returner(Reader):
    """The clients of a front's earlier lives, back for the rest of their answers: what they read again is what they had read."""

    def __init__(self, world: World, host: SimHost, dispatcher: Dispatcher) -> None:
        super().__init__(world, host, dispatcher)
        self._taken: set[str] = set()

    async def run(self) -> None:
        while True:
            await self._host.clock.sleep_s(LOOK_SECONDS)
            orphans = self._world.orphans_of(self._host.process.name)
            parked = set(self._dispatcher.parked) - self._taken
            for request in sorted(parked):
                self._taken.add(request)
                if request.startswith(HTTP_NAMES):
                    continue  # its client comes over HTTP (`browsers`)
                before = orphans.pop(request, None)
                generation = self._dispatcher.take_up(request)
                if before is None:  # its client has left with the last life, and nobody wants the rest
                    await generation.abort()
                else:
                    name = f"the rest of {request}"
                    self._host.process.run(functools.partial(self._go_on, request, generation, before), name)
            if self._dispatcher.recovered:
                for request in [name for name in orphans if not name.startswith(HTTP_NAMES)]:
                    self._world.not_recovered(request, orphans.pop(request))

    async def _go_on(self, request: str, generation: Generation, before: Reading) -> None:
        reading = Reading(self._host.process, before.prompt, before.limit, promised=before.promised)
        await self._read(request, generation, reading)
        if reading.tokens[: len(before.tokens)] != before.tokens[: len(reading.tokens)]:
            words = f"was told {before.tokens} and, taken up again, {reading.tokens}"
            self._world.violation(f"request {request} {words}")


class Launcher:
    """Sees exits as a supervisor does, and tells the coordinator of each until that has heard it."""

    def __init__(self, world: World, host: SimHost, coordinator: str) -> None:
        self._world, self._host = world, host
        self._client = FleetClient(host, coordinator)

    async def run(self) -> int:
        await asyncio.Event().wait()
        return 0

    def saw_stop(self, process: SimProcess) -> None:
        """An engine has ended because it shall: it is started when it shall run again, as the supervisor does."""
        if self._world.shape.starts:
            self._host.process.run(lambda: self._await_start(process.name), f"start {process.name} again")

    async def _await_start(self, name: str) -> None:
        while True:
            await self._host.clock.sleep_s(LOOK_SECONDS)
            try:
                target = (await self._client.status(TOLD_SECONDS)).target
            except (OSError, InterlockError, TimeoutError):
                continue
            if target != State.STOPPED:
                self._world.start(name)
                return

    def saw_end(self, process: SimProcess) -> None:
        """Reads which life it was before the next one begins."""
        inode = process.machine.disk.names.get(str(STATES / process.name / "identity.json"))
        incarnation = incarnation_in(inode.now if inode is not None else None)
        if incarnation:
            self._host.process.run(lambda: self._tell(process, incarnation), f"gone {process.name}")

    async def _tell(self, process: SimProcess, incarnation: int) -> None:
        name = process.name
        while True:
            again = self._world.kernel.processes.get(name) is not process
            try:
                await self._client.member_gone(name, incarnation, TOLD_SECONDS, again=again)
            except (OSError, InterlockError, TimeoutError):
                await self._host.clock.sleep_s(0.5)
            else:
                return

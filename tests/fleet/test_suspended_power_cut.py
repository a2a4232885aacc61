"""What is on disk when SUSPENDED is reported outlives the machine's power: on the simulated machine, whose disk forgets what was
not synced. Coordinator, runner and dispatcher run unchanged; the cut comes in the moment in which the command returns."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import continuation_of
from step_model import StepModel

from interlock.core.errors import InterlockError
from interlock.core.sampling import Sampling
from interlock.engines.keeping import RequestsFile
from interlock.engines.runner import Runner, RunnerConfig
from interlock.fleet.client import FleetClient
from interlock.fleet.coordinator import CoordinatorConfig
from interlock.fleet.coordinator_main import run_coordinator
from interlock.fleet.dispatcher import Dispatcher
from interlock.fleet.generation import Generation, RequestFailed
from interlock.fleet.ledger import GenerationRequest
from interlock.host.state_file import StateFile
from interlock.testing.plugin import Simulation
from interlock.testing.sim.host import SimHost
from interlock.testing.sim.kernel import SimProcess
from interlock.wire.identity import load_identity

pytest_plugins = ["interlock.testing.plugin"]
COORDINATOR, STATES = "unix:/run/coordinator.sock", Path("/state")
KILLED = -9
TOKENS, STEP_SECONDS = 60, 0.05
PROMPTS = {f"r{n}": [n, 5] for n in range(3)}
SAMPLING = Sampling(max_tokens=TOKENS, temperature=0.0)


class Machine:
    """Boots and loses power as often as the test says. What clients were told is theirs, and stays."""

    def __init__(self, simulation: Simulation) -> None:
        self.kernel = simulation.kernel
        self.told: dict[str, list[int]] = {name: [] for name in PROMPTS}
        self.attempts: dict[str, int] = {}
        self.ended: set[str] = set()
        self.processes: list[SimProcess] = []
        self.boots = 0

    def boot(self) -> None:
        self.boots += 1
        mains = {"coordinator": self._coordinator, "engine": self._engine, "front": self._front}
        for name, main in mains.items():
            self.processes.append(self.kernel.start("m", name, main, lambda _: None))

    def lose_power(self) -> None:
        for process in self.processes:
            process.end(KILLED)
        self.processes[0].machine.disk.power_cut()
        self.processes.clear()

    async def command(self, *verbs: str) -> None:
        """By an administrator on another machine's process, who says it until it is heard."""
        done: list[str] = []

        async def admin(host: SimHost) -> int:
            client = FleetClient(host, COORDINATOR)
            for verb in verbs:
                while verb not in done:
                    try:
                        await getattr(client, verb)(owner="t")
                        done.append(verb)
                    except (InterlockError, OSError, TimeoutError):
                        await host.clock.sleep_s(0.1)
            return 0

        self.kernel.start("m", f"admin-{len(self.kernel.machine('m').processes)}", admin, lambda _: None)
        async with asyncio.timeout(60.0):
            while len(done) < len(verbs):
                await asyncio.sleep(0.01)

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(60.0):
            while not condition():
                await asyncio.sleep(0.01)

    # --- the processes -------------------------------------------------------------------------------------------

    async def _coordinator(self, host: SimHost) -> int:
        config = CoordinatorConfig(
            address=COORDINATOR, state_dir=STATES / "coordinator", expected=["engine"], exit_is_proof=True
        )
        await run_coordinator(host, config)
        return 1

    async def _engine(self, host: SimHost) -> int:
        model = StepModel()
        host.process.run(lambda: self._steps(host, model), "steps")
        config = RunnerConfig(
            name="engine", address="unix:/run/engine.sock", coordinator=COORDINATOR,
            state_dir=STATES / "engine", version="0",
        )  # fmt: skip
        return await Runner(host, model, config).run()  # type: ignore[arg-type]

    async def _steps(self, host: SimHost, model: StepModel) -> None:
        while True:
            await host.clock.sleep_s(STEP_SECONDS)
            await model.step()

    async def _front(self, host: SimHost) -> int:
        home, first = STATES / "front", self.boots == 1
        host.files.make_private_dir(home)
        me = load_identity(host, home, "front")
        dispatcher = Dispatcher(host, me, COORDINATOR, keep_in=home)
        await dispatcher.start()
        if first:
            await self._until_ready(host, dispatcher)
        for name, prompt in PROMPTS.items():
            if first:
                request = GenerationRequest(id=name, prompt=prompt, sampling=SAMPLING)
                host.process.run(lambda g=dispatcher.submit(request): self._read(g), name)
            elif dispatcher.known(name) is not None:
                self.told[name] = []
                host.process.run(lambda g=dispatcher.take_up(name): self._read(g), name)
        await asyncio.Event().wait()
        return 0

    async def _until_ready(self, host: SimHost, dispatcher: Dispatcher) -> None:
        while not dispatcher.ready:
            await host.clock.sleep_s(0.01)

    async def _read(self, generation: Generation) -> None:
        name = generation.request.id
        try:
            async for piece in generation:
                self.told[name] += piece.token_ids
                self.attempts[name] = generation.attempts
                if piece.finish:
                    self.ended.add(name)
        except RequestFailed as error:
            self.kernel.note(f"{name}: {error}")


def play(simulation: Simulation) -> Machine:
    machine = Machine(simulation)

    async def story() -> None:
        machine.boot()
        await machine.until(lambda: all(len(tokens) > 5 for tokens in machine.told.values()))
        await machine.command("pause", "suspend")
        before = {name: list(tokens) for name, tokens in machine.told.items()}
        machine.lose_power()
        await asyncio.sleep(1.0)
        machine.boot()
        await machine.command("resume", "unpause")
        await machine.until(lambda: machine.ended == set(PROMPTS))
        for name, tokens in machine.told.items():
            assert tokens[: len(before[name])] == before[name]

    simulation.run(story)
    machine.processes.clear()  # what the killed ones left is collected with the simulation
    del machine.kernel
    return machine


@pytest.mark.parametrize("simulation", range(12), indirect=True)
def test_no_token_is_lost_or_changed_when_power_fails_as_suspended_is_reported(
    simulation: Simulation,
) -> None:
    machine = play(simulation)
    assert machine.told == {name: continuation_of(prompt, TOKENS) for name, prompt in PROMPTS.items()}
    assert set(machine.attempts.values()) == {1}, "the engine had them: nothing was dispatched again"


@pytest.mark.parametrize("late", [RequestsFile, StateFile], ids=["engine", "both"])
@pytest.mark.parametrize("simulation", [0], indirect=True)
def test_it_would_be_noticed_if_files_were_reported_before_they_are_synced(
    simulation: Simulation, late: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same story with a save that says it is done and is not."""
    if late is RequestsFile:

        async def unsaved(*_: object) -> None:
            return

        monkeypatch.setattr(RequestsFile, "save", unsaved)
        assert set(play(simulation).attempts.values()) == {2}, (
            "requests went on from the front's ledger alone"
        )
    else:
        monkeypatch.setattr(StateFile, "save", lambda *_: None)
        with pytest.raises(TimeoutError):
            play(simulation)

"""The other processes of our side of `fleet.py`, each of them the real one: a coordinator, a front, and a runner whose engine computes nothing.

    PYTHON benchmarks/fleet_engine.py coordinator DIR ADDRESS
    PYTHON benchmarks/fleet_engine.py engine DIR ADDRESS NAME STEP_SECONDS
    PYTHON benchmarks/fleet_engine.py members DIR ADDRESS COUNT
    PYTHON benchmarks/fleet_engine.py front DIR ADDRESS MODEL_DIR

ADDRESS is the coordinator's. A line on standard output says that it is ready (the front's: its port); it leaves when standard
input ends.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator, Coroutine
from pathlib import Path
from typing import Any

import uvloop

from interlock.core.targets import Mode
from interlock.engines.base import Capabilities, Engine, Progress, Work
from interlock.engines.member import Member
from interlock.engines.runner import Runner, RunnerConfig
from interlock.fleet.coordinator_main import CoordinatorConfig, run_coordinator
from interlock.host.real import RealHost
from interlock.web.main import FrontConfig, run_front
from interlock.wire.fleet_messages import EngineFacts, Load
from interlock.wire.identity import load_identity

MODEL_TOKENS = 1 << 20
TOKEN = 7


class BenchEngine(Engine):
    """`step_s` 0: every request is answered whole at once. Else one step after the other, a token for each request."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._loop: asyncio.Task[None] | None = None
        self._running: dict[str, asyncio.Queue[Progress]] = {}
        self._may_step, self._stands, self._busy = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._may_step.set()
        self._stands.set()

    async def start(self) -> Capabilities:
        if self._step_s:
            self._loop = asyncio.create_task(self._step_on())
        return Capabilities(
            kind="bench", model="m", max_model_tokens=MODEL_TOKENS, pause_modes=frozenset(Mode), features=[]
        )

    async def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        await self._may_step.wait()
        if not self._step_s:
            yield Progress([TOKEN] * work.sampling.max_tokens, [], "length", 0)
            return
        queue = self._running[work.key] = asyncio.Queue()
        self._busy.set()
        try:
            for made in range(1, work.sampling.max_tokens + 1):
                progress = await queue.get()
                last = made == work.sampling.max_tokens and not progress.finish
                yield Progress([TOKEN], [], "length", 0) if last else progress
                if progress.finish:
                    return
        finally:
            del self._running[work.key]
            if not self._running:
                self._busy.clear()

    async def _step_on(self) -> None:
        """A step that was begun is ended, as on a device: a pause waits for it. Without requests there are none."""
        while True:
            await self._may_step.wait()
            await self._busy.wait()
            self._stands.clear()
            await asyncio.sleep(self._step_s)
            for queue in self._running.values():
                queue.put_nowait(Progress([TOKEN], [], "", 0))
            self._stands.set()
            await asyncio.sleep(0)

    async def abort(self, key: str) -> None:
        if key in self._running:
            self._running[key].put_nowait(Progress([], [], "abort", 0))

    async def pause(self, mode: Mode) -> None:
        assert mode is Mode.KEEP, mode
        self._may_step.clear()
        await self._stands.wait()

    async def unpause(self) -> None:
        self._may_step.set()

    async def stop(self) -> None:
        if self._loop is not None:
            self._loop.cancel()

    async def died(self) -> str:
        await asyncio.get_running_loop().create_future()
        return ""

    def load(self) -> Load:
        return Load(len(self._running))


async def engine(directory: Path, address: str, name: str, step_s: float) -> None:
    config = RunnerConfig(
        name=name,
        address=f"unix:{directory}/{name}.sock",
        coordinator=address,
        state_dir=directory / name,
        version="0",
    )
    runner = Runner(RealHost(), BenchEngine(step_s), config)
    await until_input_ends(runner.run())


async def members(directory: Path, address: str, count: int) -> None:
    """So many members on connections of their own, in one process: what they cost the coordinator, not this machine."""
    host = RealHost()
    ended = asyncio.Event()
    for number in range(count):
        name = f"engine-{number}"
        host.files.make_private_dir(directory / name)
        facts = EngineFacts(f"unix:{directory}/{name}.sock", "m", MODEL_TOKENS, "bench")
        me = load_identity(host, directory / name, name)
        engine = BenchEngine(0.0)
        Member(host, me, engine, coordinator=address, facts=facts, leave=lambda *_: ended.set()).begin("0")
    await until_input_ends(ended.wait())


async def coordinator(directory: Path, address: str) -> None:
    config = CoordinatorConfig(address=address, state_dir=directory / "coordinator", recovering_s=0.5)
    await until_input_ends(run_coordinator(RealHost(), config))


async def front(directory: Path, address: str, model_dir: Path) -> None:
    config = FrontConfig(
        coordinator_address=address,
        model_dir=model_dir,
        served_model_name="m",
        state_dir=directory / "front",
        port=0,
    )
    await until_input_ends(run_front(RealHost(), config, on_ready=lambda port: print(port, flush=True)))


async def until_input_ends(work: Coroutine[Any, Any, object]) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(0, lambda: ended.set() if not sys.stdin.buffer.raw.read(1) else None)  # type: ignore[attr-defined]
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(ended.wait())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


def main(kind: str, directory: str, address: str, *more: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark's own end is told by the pipe
    folder = Path(directory)
    if kind == "engine":
        uvloop.run(engine(folder, address, more[0], float(more[1])))
    elif kind == "front":
        uvloop.run(front(folder, address, Path(more[0])))
    elif kind == "members":
        uvloop.run(members(folder, address, int(more[0])))
    else:
        uvloop.run(coordinator(folder, address))


if __name__ == "__main__":
    main(*sys.argv[1:])

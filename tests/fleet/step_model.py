"""An `Engine` that steps by hand, whose tokens are a function of the whole sequence, and that can be suspended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from scripted_engine import MODEL_TOKENS, next_token

from interlock.core.targets import Mode
from interlock.engines.base import Capabilities, Progress, RequestRejected, RequestState, Work
from interlock.wire.engine_messages import TokenLogprobs
from interlock.wire.fleet_messages import Load


class StepModel:
    """`step()` makes one token for every request that runs. `moves`: it tells its requests' states, and puts them back."""

    def __init__(self, *, moves: bool = False, model: str = "scripted") -> None:
        self.moves, self.model = moves, model
        self.sequences: dict[str, tuple[Work, list[int]]] = {}
        self.generated: list[str] = []
        """Keys that came as new requests; what came with a state is in `put_back`."""
        self.put_back: list[RequestState] = []
        self.aborted: set[str] = set()
        self.paused: Mode | None = None
        self.suspended = False
        self.calls: list[str] = []
        self._steps = 0
        self._moved = asyncio.Event()

    async def start(self) -> Capabilities:
        return Capabilities(
            kind="scripted",
            model=self.model,
            max_model_tokens=MODEL_TOKENS,
            pause_modes=frozenset(Mode),
            features=[],
            updates=True,
            suspends=True,
            moves_requests=self.moves,
        )

    async def step(self, count: int = 1) -> None:
        """One token each; returns when all that run have yielded it."""
        for _ in range(count):
            self._steps += 1
            self._notify()
            for _ in range(20):
                await asyncio.sleep(0)

    async def until_running(self, count: int) -> None:
        async with asyncio.timeout(10):
            await self._until(lambda: len(self.sequences) >= count)

    def _notify(self) -> None:
        """No `Condition`: one that is dropped with a killed process of the simulated machine complains."""
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._moved.wait()

    async def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        self.generated.append(work.key)
        async for progress in self._run(work, []):
            yield progress

    async def put(self, state: RequestState) -> AsyncGenerator[Progress, None]:
        if state.model != self.model:
            raise RequestRejected(f"made by {state.model}, this is {self.model}")
        self.put_back.append(state)
        async for progress in self._run(state.work, list(state.tokens)):
            yield progress

    async def states(self) -> list[RequestState]:
        return [
            RequestState(kind="scripted", model=self.model, work=work, tokens=list(tokens))
            for work, tokens in self.sequences.values()
        ]

    async def _run(self, work: Work, made: list[int]) -> AsyncGenerator[Progress, None]:
        self.sequences[work.key] = (work, made)
        seen = self._steps
        self._notify()
        try:
            while True:
                await self._until(lambda seen=seen: self._may_go_on(work.key, seen))
                seen = self._steps
                if work.key in self.aborted:
                    yield Progress([], [], "abort", 0)
                    return
                made.append(next_token([*work.prompt, *made]))
                last = len(made) >= work.sampling.max_tokens
                wanted = work.sampling.logprobs is not None
                logprobs = [TokenLogprobs(-float(len(work.prompt) + len(made)), 1, [])] if wanted else []
                yield Progress(made[-1:], logprobs, "length" if last else "", 1)
                if last:
                    return
        finally:
            del self.sequences[work.key]

    def _may_go_on(self, key: str, seen: int) -> bool:
        return key in self.aborted or (self._steps > seen and not self._stands)

    @property
    def _stands(self) -> bool:
        return self.paused is not None or self.suspended

    async def abort(self, key: str) -> None:
        self.aborted.add(key)
        self._notify()

    async def pause(self, mode: Mode) -> None:
        self.calls.append(f"pause {mode}")
        self.paused = mode

    async def unpause(self) -> None:
        self.calls.append("unpause")
        self.paused = None
        self._notify()

    async def suspend(self) -> None:
        self.calls.append("suspend")
        self.suspended = True

    async def resume(self) -> None:
        self.calls.append("resume")
        self.suspended = False

    async def stop(self) -> None: ...

    async def died(self) -> str:
        await asyncio.get_running_loop().create_future()
        return ""

    def load(self) -> Load:
        return Load(running=len(self.sequences))

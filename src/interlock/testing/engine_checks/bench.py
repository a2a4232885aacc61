"""What every check of an engine works with: requests read in the background, waits with a deadline, faults in words."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from interlock.core.sampling import Sampling
from interlock.core.targets import Mode
from interlock.engines.base import Capabilities, Engine, Progress, RequestState, Work
from interlock.testing.equality import Completion, compare

POLL_SECONDS = 0.002
T = TypeVar("T")


class CheckFailed(AssertionError):  # noqa: N818 - says what is, as the others do
    """The engine does not do what `engines.base` says. The message says what it did instead."""


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """What the suite has to know of the engine under test, which only its author can say."""

    vocabulary: int
    """Prompts are drawn from token ids 16 to this, exclusive."""
    kill: Callable[[Engine], None]
    """Ends a process (or the thread) without which the engine cannot compute, as a crash would."""
    other_weights: Path | None = None
    """A checkpoint of the same shapes with other weights, and those of the start: for engines that `updates`."""
    own_weights: Path | None = None
    prefill_tokens: int = 1024
    """A prompt that takes the engine several steps: so that it can be met in the middle of one."""
    patience_s: float = 60.0
    """What any single wait may take before the engine counts as wedged."""
    still_s: float = 0.3
    """How long a paused engine is watched for a token that must not come."""


class Reader:
    """One request, read in the background: every step of it, and how it ended."""

    def __init__(self, bench: Bench, key: str, steps: AsyncGenerator[Progress, None]) -> None:
        self._bench, self.key = bench, key
        self.steps: list[Progress] = []
        self.error: Exception | None = None
        self._grown = asyncio.Condition()
        self.task = asyncio.create_task(self._read(steps), name=f"reader {key}")

    async def _read(self, steps: AsyncGenerator[Progress, None]) -> None:
        try:
            async with contextlib.aclosing(steps):
                async for step in steps:
                    if self.steps and self.steps[-1].finish:
                        raise CheckFailed(f"{self.key} went on after its finish: {step}")
                    async with self._grown:
                        self.steps.append(step)
                        self._grown.notify_all()
        except Exception as error:
            self.error = error
        finally:
            async with self._grown:
                self._grown.notify_all()

    @property
    def tokens(self) -> list[int]:
        return [token for step in self.steps for token in step.tokens]

    @property
    def finish(self) -> str:
        return self.steps[-1].finish if self.steps else ""

    @property
    def completion(self) -> Completion:
        """With how far the second best was behind each token, where logprobs were asked for."""
        made = Completion(tokens=self.tokens, logprobs=[], margins=[])
        for step in self.steps:
            for token, entry in zip(step.tokens, step.logprobs, strict=False):
                made.logprobs.append(entry.logprob)
                others = [entry.logprob - p for t, p in entry.top if t != token]
                made.margins.append(min(others, default=0.0))
        return made

    async def until(self, count: int) -> None:
        """Until it has so many tokens, or ended."""

        def there() -> bool:
            return len(self.tokens) >= count or self.task.done() or bool(self.finish) or bool(self.error)

        try:
            async with asyncio.timeout(self._bench.ground.patience_s), self._grown:
                await self._grown.wait_for(there)
        except TimeoutError:
            raise CheckFailed(f"{self.key} stands at {len(self.tokens)} tokens, {count} were due") from None
        if len(self.tokens) < count:
            raise CheckFailed(f"{self.key} ended with {self.finish or self.error!r} before token {count}")

    async def end(self) -> Progress:
        """Its last step. Raises what the iterator raised."""
        try:
            async with asyncio.timeout(self._bench.ground.patience_s):
                await asyncio.shield(self.task)
        except TimeoutError:
            raise CheckFailed(f"{self.key} did not end; it has {len(self.tokens)} tokens") from None
        if self.error is not None:
            raise self.error
        if not self.finish:
            raise CheckFailed(f"{self.key} ended without a finish")
        return self.steps[-1]

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class Bench:
    """One started engine on the bench."""

    def __init__(self, engine: Engine, capabilities: Capabilities, ground: Ground) -> None:
        self.engine, self.capabilities, self.ground = engine, capabilities, ground
        self._works = 0
        self._readers: list[Reader] = []

    # --- requests ------------------------------------------------------------------------------------------------

    def prompt(self, seed: int, tokens: int = 40) -> list[int]:
        """The same for the same seed, and next to nothing in common with another's."""
        return [random.Random(f"{seed}/{i}").randrange(16, self.ground.vocabulary) for i in range(tokens)]

    @staticmethod
    def greedy(tokens: int) -> Sampling:
        """End tokens are ignored: the count is known beforehand. Logprobs, so that a tie can be told from a fault."""
        return Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=2)

    def work(self, prompt: list[int], sampling: Sampling | int, salt: str = "check:0") -> Work:
        self._works += 1
        chosen = self.greedy(sampling) if isinstance(sampling, int) else sampling
        return Work.of(f"check-{id(self):x}-{self._works}", prompt, chosen, salt)

    def read(self, prompt: list[int], sampling: Sampling | int, salt: str = "check:0") -> Reader:
        work = self.work(prompt, sampling, salt)
        return self._opened(Reader(self, work.key, self.engine.generate(work)))

    def read_put(self, state: RequestState) -> Reader:
        return self._opened(Reader(self, state.work.key, self.engine.put(state)))

    def _opened(self, reader: Reader) -> Reader:
        self._readers = [r for r in self._readers if not r.task.done()] + [reader]
        return reader

    async def answer(self, prompt: list[int], sampling: Sampling | int, salt: str = "check:0") -> Reader:
        reader = self.read(prompt, sampling, salt)
        await reader.end()
        return reader

    async def begun(self, reader: Reader) -> None:
        """Until the engine says that it computes something, or the reader has heard of it."""
        async with asyncio.timeout(self.ground.patience_s):
            while not (self.engine.load().running or reader.steps or reader.error):  # noqa: ASYNC110 - `load` tells nobody
                await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        """Ends what a check left behind, so that the next one begins on an idle, running engine."""
        for reader in self._readers:
            await reader.leave()
        self._readers.clear()
        with contextlib.suppress(Exception):  # a check that failed may have left it paused
            async with asyncio.timeout(self.ground.patience_s):
                await self.engine.unpause()

    # --- deadlines and faults --------------------------------------------------------------------------------------

    async def within(self, work: Awaitable[T], what: str) -> T:
        try:
            async with asyncio.timeout(self.ground.patience_s):
                return await work
        except TimeoutError:
            raise CheckFailed(f"{what} took more than {self.ground.patience_s:.0f} s") from None

    async def pause(self, mode: Mode = Mode.KEEP) -> None:
        await self.within(self.engine.pause(mode), f"pause({mode})")

    async def unpause(self) -> None:
        await self.within(self.engine.unpause(), "unpause")

    @contextlib.asynccontextmanager
    async def paused(self, mode: Mode = Mode.KEEP) -> AsyncIterator[None]:
        await self.pause(mode)
        yield
        await self.unpause()

    async def stands_still(self, readers: Sequence[Reader]) -> None:
        """What was made before the pause may still arrive; then nothing more does."""
        await asyncio.sleep(self.ground.still_s / 3)
        before = [len(reader.tokens) for reader in readers]
        await asyncio.sleep(self.ground.still_s)
        after = [len(reader.tokens) for reader in readers]
        self.check(
            before == after, f"a paused engine went on: its requests had {before} tokens, then {after}"
        )

    async def refuses(self, work: Awaitable[object], kind: type[Exception], what: str) -> Exception:
        """`work` must raise `kind`; returns it."""
        try:
            await self.within(work, what)
        except kind as error:
            self.check(bool(str(error)), f"{what} is refused without a word")
            return error
        raise CheckFailed(f"{what} was not refused; {kind.__name__} is due")

    def check(self, condition: bool, fault: str) -> None:
        if not condition:
            raise CheckFailed(fault)

    def same(self, reference: Reader, other: Reader, what: str) -> None:
        """Equal tokens up to a tie (`testing.equality`)."""
        self.check(
            len(reference.tokens) == len(other.tokens),
            f"{what}: {len(other.tokens)} tokens, the undisturbed run has {len(reference.tokens)}",
        )
        comparison = compare(what, reference.completion, other.completion)
        self.check(comparison.equal, f"tokens are not those of the undisturbed run: {comparison}")

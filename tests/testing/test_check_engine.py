"""The conformance suite passes an engine that is right, and finds each of many that are wrong in one place."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

sys.path.append(str(Path(__file__).parent))

from pocket_engine import VOCABULARY, PocketEngine, Running

from interlock.core.targets import Mode
from interlock.engines.base import KeptCache, NotStanding, Progress, RequestState, Work
from interlock.testing.check_engine import Bench, Check, Ground, check_engine, engine_checks
from interlock.wire.fleet_messages import Load


@pytest.fixture
def weights(tmp_path: Path) -> list[Path]:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "weights").write_text(str(number))
    return [tmp_path / "1", tmp_path / "2"]


def ground(weights: list[Path], patience_s: float = 10.0) -> Ground:
    return Ground(
        vocabulary=VOCABULARY,
        kill=lambda engine: engine.crash(),  # type: ignore[attr-defined]
        own_weights=weights[0],
        other_weights=weights[1],
        prefill_tokens=700,
        patience_s=patience_s,
        still_s=0.06,
    )


@pytest.fixture
async def bench(weights: list[Path]) -> AsyncIterator[Bench]:
    engine = PocketEngine(weights[0])
    yield Bench(engine, await engine.start(), ground(weights))
    await engine.stop()


@pytest.mark.parametrize("check", engine_checks(), ids=str)
async def test_an_engine_that_is_right_passes(check: Check, bench: Bench) -> None:
    await check.run(bench)


async def test_all_checks_run_at_once_and_begin_anew_after_an_end(weights: list[Path]) -> None:
    made: list[PocketEngine] = []

    def factory() -> PocketEngine:
        made.append(PocketEngine(weights[0]))
        return made[-1]

    report = await check_engine(factory, ground(weights))
    assert not report.faults, report
    assert report.passed == [check.name for check in engine_checks()]
    assert len(made) == 2, "one start for all that leave it alive and the first end, one for the second"
    assert all(engine.dead for engine in made)


# --- wrong ones --------------------------------------------------------------------------------------------------


class AllAtOnce(PocketEngine):
    """Hands everything on when the request has ended."""

    async def follow(self, request: Running) -> AsyncGenerator[Progress, None]:
        steps = [step async for step in super().follow(request)]
        tokens = [token for step in steps for token in step.tokens]
        logprobs = [entry for step in steps for entry in step.logprobs]
        yield msgspec.structs.replace(steps[-1], tokens=tokens, logprobs=logprobs)


class RepeatsAToken(PocketEngine):
    """The step before a pause is taken again after it."""

    async def unpause(self) -> None:
        if self.mode is Mode.KEEP:
            for request in self.requests.values():
                if request.made and not request.finish:
                    request.made.pop()
        await super().unpause()


class GoesOnWhilePaused(PocketEngine):
    """A pause stops newcomers only."""

    def runs(self) -> bool:
        return not self.suspended and any(not r.finish for r in self.requests.values())


class LeaksPrefixes(PocketEngine):
    """Its cache does not know whose it is."""

    def key(self, request: Running, tokens: int) -> bytes:
        work = msgspec.structs.replace(request.work, cache_salt="")
        return super().key(Running(work, request.made), tokens)


class HitsOldWeights(PocketEngine):
    """Its cache does not know the version."""

    def key(self, request: Running, tokens: int) -> bytes:
        number, self.number = self.number, 0
        try:
            return super().key(request, tokens)
        finally:
            self.number = number


class IgnoresUpdates(PocketEngine):
    """Says that it has new weights."""

    async def update_weights(self, path: Path, version: str, kv: KeptCache = KeptCache.RECOMPUTE) -> None:
        number = self.number
        await super().update_weights(path, version, kv)
        self.number = number


class GoesOnWithoutWeights(PocketEngine):
    """A failed update leaves the old ones in force."""

    async def unpause(self) -> None:
        self.broken = False
        await super().unpause()


class DeafInThePause(PocketEngine):
    """An abort waits for the end of the pause."""

    async def abort(self, key: str) -> None:
        if self.mode is None:
            await super().abort(key)


class DropsTheSeed(PocketEngine):
    """One generator for all requests."""

    async def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        self.check(work)
        request = Running(work, [])
        request.random.seed(len(self.cache))
        async for progress in self.follow(request):
            yield progress


class ForgetsTheGenerator(PocketEngine):
    """What is put back draws from the beginning again."""

    async def put(self, state: RequestState) -> AsyncGenerator[Progress, None]:
        async for progress in self.follow(Running(state.work, state.tokens)):
            yield progress


class LosesRequestsInSuspension(PocketEngine):
    """Memory given back, requests with it."""

    async def suspend(self) -> None:
        if not self.suspended:
            for key in list(self.requests):
                await self.abort(key)
        await super().suspend()


class SuspendsWhileRunning(PocketEngine):
    """Does not ask whether it stands."""

    async def suspend(self) -> None:
        self.stands = True
        await super().suspend()


class WaitsForEver(PocketEngine):
    """A pause that waits is not cut short by a stricter one."""

    async def pause(self, mode: Mode) -> None:
        if self.mode is Mode.WAIT and mode is not Mode.WAIT:
            mode = Mode.WAIT
        await super().pause(mode)


class EndsTheWaiting(PocketEngine):
    """Every pause aborts."""

    async def pause(self, mode: Mode) -> None:
        await super().pause(Mode.ABORT)


class TakesEverything(PocketEngine):
    """No request is impossible to it."""

    def check(self, work: Work) -> None:
        pass


class KeepsWhatWasLeft(PocketEngine):
    """A reader that goes leaves its request running."""

    async def follow(self, request: Running) -> AsyncGenerator[Progress, None]:
        try:
            async with contextlib.aclosing(super().follow(request)) as steps:
                async for progress in steps:
                    yield progress
        finally:
            if not request.finish:
                self.requests[request.work.key] = request


class SaysItIsIdle(PocketEngine):
    def load(self) -> Load:
        return Load(running=len(self.requests)) if self.mode is None else Load()


class DiesInSilence(PocketEngine):
    def crash(self) -> None:
        self.end("it crashed")


class HangsItsRequests(PocketEngine):
    """Whoever waits for a token of a dead engine waits for ever."""

    def end(self, why: str) -> None:
        if self.loop is not None:
            self.loop.cancel()

    async def died(self) -> str:
        await self.death.wait()
        return "it crashed"


class TakesStopForDeath(PocketEngine):
    async def stop(self) -> None:
        await super().stop()
        self.death.set()


class OneShortOfFull(PocketEngine):
    """The longest prompt that fits is refused."""

    def check(self, work: Work) -> None:
        super().check(work)
        if len(work.prompt) > 800:
            from interlock.engines.base import RequestRejected

            raise RequestRejected("too long")


class MixesRequests(PocketEngine):
    """A batch of more than four hands tokens to the wrong request."""

    def choose(self, request: Running, rank: int) -> int:
        wrong = len(self.requests) > 4
        return (super().choose(request, rank) + wrong) % VOCABULARY


WRONG: list[tuple[type[PocketEngine], str]] = [
    (AllAtOnce, "came at once"),
    (RepeatsAToken, "tokens, the undisturbed run has"),
    (GoesOnWhilePaused, "a paused engine went on"),
    (LeaksPrefixes, "tokens of another salt"),
    (HitsOldWeights, "KV of the old weights was hit"),
    (IgnoresUpdates, "they were not loaded"),
    (GoesOnWithoutWeights, "without weights was not refused"),
    (DeafInThePause, "did not end"),
    (DropsTheSeed, "seed 7 made"),
    (ForgetsTheGenerator, "taken out and put back"),
    (LosesRequestsInSuspension, "kept over a suspension"),
    (SuspendsWhileRunning, "suspending a running engine was not refused"),
    (WaitsForEver, r"it was to be kept and ended|pause\(keep\) took more than"),
    (EndsTheWaiting, "a frozen request ended"),
    (TakesEverything, "was not refused"),
    (KeepsWhatWasLeft, "nobody asks for anything"),
    (SaysItIsIdle, "its load is"),
    (DiesInSilence, "noticing the engine's death"),
    (HangsItsRequests, "a request of a dead engine took more than"),
    (TakesStopForDeath, "told as a death"),
    (OneShortOfFull, "too long"),
    (MixesRequests, "at once"),
]


@pytest.mark.parametrize(("kind", "words"), WRONG, ids=[kind.__name__ for kind, _ in WRONG])
async def test_an_engine_that_is_wrong_in_one_place_is_found(
    kind: Callable[[Path], PocketEngine], words: str, weights: list[Path]
) -> None:
    report = await check_engine(lambda: kind(weights[0]), ground(weights, patience_s=0.6))
    assert any(re.search(words, fault) for fault in report.faults), report


async def test_an_engine_that_cannot_must_say_so(weights: list[Path]) -> None:
    class SaysItCannot(PocketEngine):
        """And does it nevertheless."""

        async def start(self):
            found = await super().start()
            return msgspec.structs.replace(found, suspends=False, updates=False, moves_requests=False)

    report = await check_engine(lambda: SaysItCannot(weights[0]), ground(weights, patience_s=2.0))
    assert sum("Unable is due" in fault or "FileNotFound" in fault for fault in report.faults) >= 1, report


async def test_what_an_adapter_leaves_out_refuses_by_its_base() -> None:
    from interlock.engines.base import Engine, Unable

    class Bare(Engine):
        pass

    bare = Bare()
    for call in (bare.suspend, bare.resume):
        with pytest.raises(Unable, match="Bare"):
            await call()
    with pytest.raises(Unable):
        await bare.update_weights(Path("x"), "1")
    with pytest.raises(NotImplementedError):
        await bare.take("x")
    assert bare.counts() == {}


async def test_a_check_that_failed_leaves_the_engine_running(weights: list[Path]) -> None:
    engine = PocketEngine(weights[0])
    bench = Bench(engine, await engine.start(), ground(weights))

    async def fails(bench: Bench) -> None:
        await bench.pause(Mode.KEEP)
        await bench.refuses(asyncio.sleep(0), NotStanding, "nothing")

    with pytest.raises(AssertionError, match="fails: nothing was not refused"):
        await Check("fails", fails).run(bench)
    assert engine.mode is None
    await engine.stop()

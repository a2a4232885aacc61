"""Does an engine do what `interlock.engines.base` says? Every sentence there, as a check that can fail.

    from interlock.testing.check_engine import Ground, check_engine, engine_checks

With pytest, a test a check, one start-up for all that leave the engine alive:

    @pytest.mark.parametrize("check", engine_checks(), ids=str)
    async def test_it_conforms(check, my_bench):  # Bench(engine, await engine.start(), ground)
        await check.run(my_bench)

or all at once, in any script:

    report = await check_engine(lambda: MyEngine(...), Ground(vocabulary=512, kill=lambda engine: ...))
    assert not report.faults, report

The order is that of the list: the last checks end the engine they are given and need one of their own (`check.ends`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from interlock.engines.base import Engine
from interlock.testing.engine_checks.bench import Bench, CheckFailed, Ground
from interlock.testing.engine_checks.changes import CHANGES, ENDS
from interlock.testing.engine_checks.pauses import PAUSES
from interlock.testing.engine_checks.requests import REQUESTS

__all__ = ["Bench", "Check", "CheckFailed", "Ground", "Report", "check_engine", "engine_checks"]

Factory = Callable[[], Engine]


class Check(msgspec.Struct, frozen=True):
    """One behaviour, named by its sentence. `ends`: afterwards the engine is dead or stopped."""

    name: str
    body: Callable[[Bench], Awaitable[None]]
    ends: bool = False

    async def run(self, bench: Bench) -> None:
        """Raises `CheckFailed`, which says what the engine did instead; whatever else it raises is a fault as well."""
        try:
            await self.body(bench)
        except CheckFailed as error:
            raise CheckFailed(f"{self.name.replace('_', ' ')}: {error}") from error
        finally:
            await bench.close()

    def __str__(self) -> str:
        return self.name


def engine_checks(*, ends: bool | None = None) -> list[Check]:
    """All checks in order; with `ends` those that do or do not end the engine."""
    alive = [Check(body.__name__, body) for body in [*REQUESTS, *PAUSES, *CHANGES]]
    last = [Check(body.__name__, body, ends=True) for body in ENDS]
    return [check for check in [*alive, *last] if ends in (None, check.ends)]


class Report(msgspec.Struct):
    """What `check_engine` found. `faults` are sentences."""

    passed: list[str]
    faults: list[str]

    def __str__(self) -> str:
        return "\n".join([f"{len(self.passed)} checks passed, {len(self.faults)} failed", *self.faults])


async def check_engine(factory: Factory, ground: Ground) -> Report:
    """Runs every check. `factory` makes an engine that was not started; it is called again after a check that failed
    (its engine may be in any state) or that ended its engine."""
    report = Report([], [])
    todo = engine_checks()
    while todo:
        async with _started(factory, ground) as bench:
            while todo:
                check = todo.pop(0)
                try:
                    await check.run(bench)
                except Exception as error:
                    kind = "" if isinstance(error, CheckFailed) else f"{check.name}: {type(error).__name__}: "
                    report.faults.append(f"{kind}{error}")
                    break
                report.passed.append(check.name)
                if check.ends:
                    break
    return report


@contextlib.asynccontextmanager
async def _started(factory: Factory, ground: Ground) -> AsyncIterator[Bench]:
    engine = factory()
    try:
        async with asyncio.timeout(ground.patience_s):
            capabilities = await engine.start()
        yield Bench(engine, capabilities, ground)
    finally:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(ground.patience_s):
                await engine.stop()

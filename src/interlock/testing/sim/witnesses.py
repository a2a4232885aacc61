"""What the parts of a world tell of themselves: their events and log lines for the timeline, an engine's steps for the checks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from interlock.telemetry.events import Event, EventLog
from interlock.testing.sim.loop import PROCESS

if TYPE_CHECKING:
    from interlock.testing.sim.host import SimHost
    from interlock.testing.sim.kernel import SimProcess
    from interlock.testing.sim.worlds import World

LOGGERS = ("interlock", "uvicorn", "uvicorn.error", "uvicorn.access")
TROUBLE = 0.08
"""How often an engine fails to update, suspend or resume, before the faults cease."""


class EngineWatch:
    """What one engine does, told to the world's checks (`engine.Watcher`)."""

    def __init__(self, world: World, process: SimProcess) -> None:
        self._world, self._process = world, process

    def stepped(self, stage: str, weights: str | None) -> None:
        self._world.promises.stepped(self._process, stage, weights)

    def loaded(self, weights: str) -> None:
        self._world.kernel.note(f"{self._process} has loaded weights {weights}")
        self._world.promises.loaded(self._process, weights)

    def wrong(self, words: str) -> None:
        self._world.violation(f"{self._process}: {words}")

    def trouble(self, what: str) -> bool:
        if self._world.calm or self._world.kernel.rng.random() >= TROUBLE:
            return False
        self._world.kernel.note(f"{self._process} fails to {what}")
        return True


class Noted(EventLog):
    """An event log whose events stand in the run's timeline."""

    def __init__(self, host: SimHost, world: World) -> None:
        super().__init__(host.clock)
        self._process, self._world = host.process, world

    def emit(self, name: str, **fields: object) -> Event:
        words = " ".join(f"{key}={value}" for key, value in fields.items())
        self._world.kernel.note(f"{self._process} {name} {words}")
        if name == "coordinator_without_state":
            self._world.promises.coordinator_forgets(excused="coordinator" in self._world.spoilt)
        elif name == "target":
            self._world.promises.coordinator_knows()
        elif name == "weights" and (
            fields.get("known") is False or str(fields["version"]) not in self._world.promises.order
        ):
            self._world.promises.decided(str(fields["version"]))
        return super().emit(name, **fields)


class Timeline(logging.Handler):
    """The drivers' own log lines in the timeline; a traceback among them is a defect."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        process = PROCESS.get()
        if self._world.kernel.buried or (process is not None and process.dead):
            return
        self._world.kernel.note(f"{process} | {record.getMessage()}")
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            self._world.violation(
                f"{process} logged a defect: {record.getMessage()}: {type(error).__name__}: {error}"
            )


@contextlib.contextmanager
def logged(world: World) -> Iterator[None]:
    """What the drivers log, and uvicorn, stands in the timeline and nowhere else."""
    timeline = Timeline(world)
    with contextlib.ExitStack() as stack:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            stack.callback(setattr, logger, "propagate", logger.propagate)
            stack.callback(setattr, logger, "handlers", logger.handlers)
            logger.handlers, logger.propagate = [timeline], False
            logger.setLevel(logging.INFO)
        yield

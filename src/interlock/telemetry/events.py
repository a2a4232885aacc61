"""The event log: what happened, as names and fields, the last few thousand in memory and all of them in a file if asked.

Events are for machines (the dashboard, a test, a post-mortem); log lines are for eyes. The kept ones are a *ring* with a
name: numbers mean something only within it, so whoever follows a ring that began anew is told of a gap, not of silence.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from interlock.core.limits import EVENTS_KEPT_MAX
from interlock.host.base import Clock

_log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder(enc_hook=str)


class Event(msgspec.Struct, frozen=True):
    """`number` counts from 1 without gaps, so that a reader sees what it missed; `at_s` is monotonic."""

    number: int
    at_s: float
    wall_ns: int
    name: str
    fields: dict[str, Any]


class Sink(Protocol):
    """Where events are written to: `host.files.AppendFile`, `host.files.RotatingFile`."""

    def append(self, line: bytes) -> None:
        """One whole line. Raises `OSError` or `ValueError` when it cannot be kept: the log then gives the sink up."""
        ...


class Ring(msgspec.Struct, frozen=True):
    """What a log that was kept begins with: its name, and its last events."""

    name: str
    events: Sequence[Event] = ()


class EventLog:
    """Never fails its caller: a sink that cannot be written is reported once and given up."""

    def __init__(
        self,
        clock: Clock,
        sink: Sink | None = None,
        kept_max: int = EVENTS_KEPT_MAX,
        *,
        ring: Ring | None = None,
    ) -> None:
        self._clock, self._sink = clock, sink
        self._kept: deque[Event] = deque(ring.events if ring else (), maxlen=kept_max)
        self._count = self._kept[-1].number if self._kept else 0
        self._news: asyncio.Event | None = None
        self.ring = ring.name if ring else os.urandom(8).hex()
        """Names the numbers: two logs never share it."""

    @property
    def last(self) -> int:
        """The number of the newest event; 0: there is none."""
        return self._count

    def emit(self, name: str, **fields: Any) -> Event:
        """Keeps one event, with its number and both clocks. `fields` are what JSON can say; never raises for a full disk."""
        self._count += 1
        event = Event(self._count, self._clock.monotonic_s(), self._clock.wall_ns(), name, fields)
        self._kept.append(event)
        if self._sink is not None:
            try:
                self._sink.append(_encoder.encode(event))
            except (OSError, ValueError, TypeError) as error:
                _log.error("the event log's file is given up: %s", error)
                self._sink = None
        if self._news is not None:
            self._news.set()
        return event

    def since(self, number: int) -> list[Event]:
        """Kept events after `number`, oldest first."""
        return [event for event in self._kept if event.number > number]

    def missed(self, number: int) -> int:
        """How many events after `number` are not kept any more."""
        oldest = self._kept[0].number if self._kept else self._count + 1
        return max(0, oldest - 1 - number)

    async def wait(self, number: int, seconds: float) -> None:
        """Returns when there is an event after `number`, or after so many seconds. On the loop that emits only."""
        try:
            async with asyncio.timeout(seconds):
                while self._count <= number:
                    if self._news is None or self._news.is_set():
                        self._news = asyncio.Event()
                    await self._news.wait()
        except TimeoutError:
            return

"""The event log: what happened, as names and fields, the last few thousand in memory and all of them in a file if asked.

Events are for machines (the dashboard, a test, a post-mortem); log lines are for eyes.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import msgspec

from interlock.core.limits import EVENTS_KEPT_MAX
from interlock.host.base import Clock
from interlock.host.files import AppendFile

_log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder(enc_hook=str)


class Event(msgspec.Struct, frozen=True):
    """`number` counts from 1 without gaps, so that a reader sees what it missed; `at_s` is monotonic."""

    number: int
    at_s: float
    wall_ns: int
    name: str
    fields: dict[str, Any]


class EventLog:
    """Never fails its caller: a sink that cannot be written is reported once and given up."""

    def __init__(self, clock: Clock, sink: AppendFile | None = None, kept_max: int = EVENTS_KEPT_MAX) -> None:
        self._clock, self._sink = clock, sink
        self._kept: deque[Event] = deque(maxlen=kept_max)
        self._count = 0

    def emit(self, name: str, **fields: Any) -> Event:
        self._count += 1
        event = Event(self._count, self._clock.monotonic_s(), self._clock.wall_ns(), name, fields)
        self._kept.append(event)
        if self._sink is not None:
            try:
                self._sink.append(_encoder.encode(event))
            except (OSError, ValueError, TypeError) as error:
                _log.error("the event log's file is given up: %s", error)
                self._sink = None
        return event

    def since(self, number: int) -> list[Event]:
        """Kept events after `number`, oldest first."""
        return [event for event in self._kept if event.number > number]

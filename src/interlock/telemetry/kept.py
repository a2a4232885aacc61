"""An event log that outlives its process: the ring in a file beside the process's state, read again at the next start.

Durable enough: a line is written at once and not synced, so a killed process loses nothing and a machine that loses power the
last moments. Two files of `kept_max` lines at most: when the one is full it becomes the older one. Their first line names the
ring. A file that cannot be read costs its events, never the start: then a new ring begins, which followers see by its name.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from interlock.core.limits import EVENTS_FILE_BYTES_MAX, EVENTS_KEPT_MAX
from interlock.host.base import Clock, Files
from interlock.host.files import RotatingFile
from interlock.telemetry.events import Event, EventLog, Ring

_log = logging.getLogger(__name__)
FILE = "events.jsonl"


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ring: str


def open_event_log(files: Files, clock: Clock, directory: Path, kept_max: int = EVENTS_KEPT_MAX) -> EventLog:
    """The log whose file is in `directory`, going on where its last life ended. Never raises: without a file it is in memory."""
    path = directory / FILE
    try:
        ring = _read(files, path, kept_max) or Ring(os.urandom(8).hex())
        header = msgspec.json.encode(_Header(ring.name))
        # Written whole again: the last line of a killed process may be half a line.
        files.write_durably(path, b"".join(line + b"\n" for line in (header, *map(_line, ring.events))))
        sink = RotatingFile(path, header, lines=len(ring.events), lines_max=kept_max)
    except OSError as error:
        _log.error("events are kept in memory only: %s", error)
        return EventLog(clock, kept_max=kept_max)
    return EventLog(clock, sink, kept_max, ring=ring)


def _line(event: Event) -> bytes:
    return msgspec.json.encode(event, enc_hook=str)


def _read(files: Files, path: Path, kept_max: int) -> Ring | None:
    """None where no ring can be read. Of two files only what has the newer one's name counts."""
    newest = _file(files, path)
    if newest is None:
        return None
    older = _file(files, RotatingFile.older(path))
    events = list(newest.events)
    if older is not None and older.name == newest.name:
        events = [*older.events, *events]
    last, kept = 0, []
    for event in events:
        if event.number > last:  # what is read is a ring only where numbers rise
            last = event.number
            kept.append(event)
    return Ring(newest.name, kept[-kept_max:])


def _file(files: Files, path: Path) -> Ring | None:
    try:
        lines = (files.read(path, EVENTS_FILE_BYTES_MAX) or b"").splitlines()
        name = msgspec.json.decode(lines[0], type=_Header).ring
    except (OSError, ValueError, IndexError, msgspec.MsgspecError):
        return None
    events = []
    for line in lines[1:]:
        try:
            events.append(msgspec.json.decode(line, type=Event))
        except msgspec.MsgspecError:
            continue
    return Ring(name, events)

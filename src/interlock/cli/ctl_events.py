"""`interlock ctl events`: what has happened, and with --follow what happens, over restarts of the coordinator.

Numbers rise by one. Where events are missing a line says how many and why: silence never stands for a gap.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from datetime import datetime

import msgspec

from interlock.cli.ctl_show import print_json
from interlock.fleet.client import FleetClient
from interlock.host.real import RealHost
from interlock.wire.fleet_messages import Events, Happened


class Gap(msgspec.Struct, frozen=True):
    """What `--json` prints where events are missing."""

    gap: str
    missed: int
    ring: str


async def show_events(host: RealHost, client: FleetClient, parsed: argparse.Namespace) -> None:
    """Raises as `FleetClient.status` when there is no fleet; a coordinator that goes away later is waited for."""
    after = parsed.since if isinstance(parsed.since, int) else 0
    not_before_ns = 0
    if isinstance(parsed.since, float):
        not_before_ns = host.clock.wall_ns() - int(parsed.since * 1e9)
    told = await client.events(after, timeout_s=min(parsed.timeout, 5.0))
    while True:
        _show(told, parsed.json, not_before_ns)
        if told.events:
            after = told.events[-1].number
        if after >= told.last:
            break
        told = await client.events(after, told.ring, timeout_s=min(parsed.timeout, 5.0))
    if parsed.follow:
        async with contextlib.aclosing(client.follow_events(after, told.ring)) as batches:
            async for batch in batches:
                _show(batch, parsed.json, not_before_ns)


def _show(told: Events, as_json: bool, not_before_ns: int) -> None:
    if told.gap:
        if as_json:
            print_json(Gap(told.gap, told.missed, told.ring))
        else:
            print(f"-- gap: {told.gap}", flush=True)
    for event in told.events:
        if event.wall_ns < not_before_ns:
            continue
        if as_json:
            print_json(event)
        else:
            print(line_of(event), flush=True)
    sys.stdout.flush()


def line_of(event: Happened) -> str:
    """Local time, number, name, and the fields as they are; a value with a space in quotation marks."""
    moment = datetime.fromtimestamp(event.wall_ns / 1e9).astimezone()
    fields = " ".join(f"{name}={_value(value)}" for name, value in event.fields.items())
    clock = moment.strftime("%H:%M:%S.") + f"{moment.microsecond // 1000:03d}"
    return f"{clock}  {event.number:>5}  {event.name:<12} {fields}".rstrip()


def _value(value: str | int | float | bool | None) -> str:
    if value is None:
        return "-"
    text = str(value).replace("\n", "\\n").replace("\r", "\\r")
    return f'"{text}"' if " " in text or not text else text

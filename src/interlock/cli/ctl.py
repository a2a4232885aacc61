"""`interlock ctl`: one question or one command to a running fleet's coordinator."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import getpass
import sys
from pathlib import Path

import msgspec

from interlock.cli.errors import Failure
from interlock.core.errors import ChannelFault, InterlockError
from interlock.fleet.client import CommandFailed, FleetClient
from interlock.fleet.launchers.rundir import coordinator_address
from interlock.host.real import RealHost
from interlock.wire.fleet_messages import Command, CommandProgress, Membership

POLL_SECONDS = 0.1


def ctl(parsed: argparse.Namespace) -> int:
    """Returns the exit status. Raises `Failure` with the coordinator's own words."""
    try:
        return asyncio.run(_ctl(parsed))
    except ChannelFault as fault:
        raise Failure(fault.message) from fault
    except CommandFailed as error:
        if parsed.json and error.progress is not None:
            _print_json(error.progress)
        raise Failure(str(error)) from error
    except (ConnectionError, TimeoutError, InterlockError) as error:
        raise Failure(_unreachable(parsed.port, error)) from error


def _unreachable(port: int, error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return f"no fleet of yours answers on port {port}; is it running? Name its HTTP port with --port"
    return str(error)


async def _ctl(parsed: argparse.Namespace) -> int:
    host = RealHost()
    client = FleetClient(host, coordinator_address(parsed.port))
    fleet = await client.status(min(parsed.timeout, 5.0))  # also tells at once when there is no fleet
    if parsed.verb == "status":
        _show(fleet, parsed.json)
        return 0
    order = _order(client, parsed)
    last: CommandProgress | None = None
    said: set[tuple[str, str]] = set()
    async for progress in client.command(order):
        last = progress
        if not parsed.json:
            _tell(progress, said)
    if last is None or not last.ok:
        raise CommandFailed(last.message if last else "the coordinator did not say how it ended", last)
    if parsed.verb in ("stop", "drain"):
        await _wait_for_the_end(host, client, parsed.timeout)
    if parsed.json:
        _print_json(last)
    else:
        print(last.message or f"{order.command.lower()}: done")
    return 0


async def _wait_for_the_end(host: RealHost, client: FleetClient, seconds: float) -> None:
    """A stopped fleet ends, its coordinator last: when nobody answers any more it is over."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(seconds):
            while True:
                await client.status()
                await host.clock.sleep_s(POLL_SECONDS)


def _order(client: FleetClient, parsed: argparse.Namespace) -> Command:
    owner = parsed.owner or getpass.getuser()
    if parsed.verb == "pause":
        return client.order(
            "PAUSE", owner, parsed.timeout, mode=parsed.mode, allow_unknown=parsed.allow_unknown
        )
    if parsed.verb == "unpause":
        return client.order("UNPAUSE", owner, parsed.timeout, break_hold_of=parsed.break_hold_of)
    if parsed.verb == "update":
        weights = Path(parsed.weights).expanduser().resolve()
        if not weights.is_dir():
            raise Failure(f"{weights} is no directory; name the checkpoint directory of the new weights")
        return client.order(
            "UPDATE", owner, parsed.timeout, version=parsed.version, weights=str(weights), kv=parsed.kv
        )
    if parsed.verb in ("suspend", "resume"):
        return client.order(parsed.verb.upper(), owner, parsed.timeout)
    mode = "wait" if parsed.verb == "drain" else "keep"
    return client.order("STOP", owner, parsed.timeout, composite=True, mode=mode)


def _tell(progress: CommandProgress, said: set[tuple[str, str]]) -> None:
    """Each member's outcome once, as it changes; to standard error, the answer itself goes to standard output."""
    for member in progress.members:
        if member.outcome != "waiting" and (member.name, member.outcome) not in said:
            said.add((member.name, member.outcome))
            print(f"  {member.name}: {member.outcome} ({member.state})", file=sys.stderr)


def _show(fleet: Membership, as_json: bool) -> None:
    if as_json:
        _print_json(fleet)
        return
    print(f"target {fleet.target} at epoch {fleet.epoch}, weights version {fleet.version}")
    for hold in fleet.holds:
        print(f"  held by {hold.owner} (mode {hold.mode})")
    for member in fleet.members:
        standing = "there" if member.standing else "on its way"
        print(
            f"  {member.name:<12} {member.state:<10} {standing:<10} running {member.load.running}, "
            f"waiting {member.load.waiting}, KV used {100 * member.load.kv_used_share:.0f}%"
        )


def _print_json(what: msgspec.Struct) -> None:
    print(msgspec.json.encode(what).decode())

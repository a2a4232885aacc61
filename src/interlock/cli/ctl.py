"""`interlock ctl`: one question or one command to a running fleet's coordinator.

The answer goes to standard output, the way there to standard error, a line a change, so that a tired operator sees who is
waited for, and a script sees one line or one JSON object. What it is asked with stands in `ctl_words`, how it looks in `ctl_show`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import getpass
import select
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from interlock.cli.ctl_events import show_events
from interlock.cli.ctl_show import Answer, Teller, print_json, show_report, show_status, summary, wanted
from interlock.cli.ctl_words import PORT_DEFAULT, timeout_of
from interlock.cli.errors import REFUSED, TOO_LATE, Failure
from interlock.core.errors import ChannelFault, InterlockError
from interlock.core.targets import State
from interlock.fleet.client import CommandFailed, FleetClient
from interlock.fleet.launchers.rundir import coordinator_address, leave_file
from interlock.host.real import RealHost
from interlock.wire.fleet_messages import Command, CommandProgress

POLL_SECONDS = 0.1
STILL_SECONDS = 5.0
"""How often a wait without news says that it still waits."""
REACHED = {
    "pause": State.PAUSED,
    "unpause": State.RUNNING,
    "update": State.PAUSED,
    "suspend": State.SUSPENDED,
    "resume": State.PAUSED,
    "start": State.RUNNING,
}
"""What the fleet is when a verb is done. `stop` and `drain` are two commands in a row, of which the first may be late."""
EVERY_LIFE = 0
"""In `MemberGone`: whoever had that name so far."""
END_SECONDS = 10.0
"""What a fleet whose engines have stopped gets to end itself."""


def ctl(parsed: argparse.Namespace) -> int:
    """Returns the exit status. Raises `Failure` with the coordinator's own words."""
    parsed.timeout = timeout_of(parsed)
    try:
        return asyncio.run(_ctl(parsed))
    except ChannelFault as fault:
        if parsed.json:
            print_json(Answer(ok=False, code=fault.code, message=fault.message))
        raise Failure(fault.message, REFUSED) from fault
    except CommandFailed as error:
        status = _status_of(error)
        raise Failure(f"{error}{_what_next(parsed) if status == TOO_LATE else ''}", status) from error
    except TimeoutError as error:
        raise Failure(str(error) or "it took too long", TOO_LATE) from error
    except (ConnectionError, InterlockError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise  # not the coordinator is gone
        raise Failure(_unreachable(parsed.port, error)) from error


def _nobody_reads() -> bool:
    """Whether what we print goes into a pipe that nobody holds the other end of."""
    with contextlib.suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _status_of(error: CommandFailed) -> int:
    """Late is who did not get there or cannot be seen; failed is who tried and could not."""
    members = error.progress.members if error.progress is not None else []
    outcomes = {member.outcome for member in members}
    return TOO_LATE if "failed" not in outcomes and outcomes & {"waiting", "unknown"} else 1


def _what_next(parsed: argparse.Namespace) -> str:
    """Nothing is undone by lateness: the coordinator goes on telling its members what they shall be."""
    if parsed.verb not in REACHED:
        return ""
    fleet = "" if parsed.port == PORT_DEFAULT else f" --port {parsed.port}"
    return f"; the fleet goes on; `interlock ctl status --wait {REACHED[parsed.verb]}{fleet}` waits for it"


def _unreachable(port: int, error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return f"no fleet of yours answers on port {port}; is it running? Name its HTTP port with --port"
    return str(error)


async def _ctl(parsed: argparse.Namespace) -> int:
    host = RealHost()
    client = FleetClient(host, coordinator_address(parsed.port))
    match parsed.verb:
        case "status" if parsed.wait is not None:
            return await _wait_until(host, client, parsed)
        case "status":
            show_status(await client.status(_patience(parsed)), parsed, host.clock.monotonic_s())
        case "events":
            await show_events(host, client, parsed)
        case "metrics":
            print((await client.metrics(_patience(parsed))).rstrip())
        case "command":
            report = await client.command(parsed.id, owner=parsed.owner or "", timeout_s=_patience(parsed))
            return show_report(report, parsed.json)
        case "forget":
            await _forget(client, parsed)
        case _:
            return await _command(host, client, parsed)
    return 0


def _patience(parsed: argparse.Namespace) -> float:
    return min(float(parsed.timeout), 5.0)


# --- commands ----------------------------------------------------------------------------------------------------


async def _command(host: RealHost, client: FleetClient, parsed: argparse.Namespace) -> int:
    fleet = await client.status(_patience(parsed))  # tells at once when there is no fleet
    if parsed.verb in ("stop", "drain") and parsed.end and fleet.target == State.STOPPED:
        answer = Answer(ok=True, message=await _end(host, client, parsed.port))
        print_json(answer) if parsed.json else print(summary(parsed.verb, answer))
        return 0
    order = _order(client, parsed)
    begun_s = host.clock.monotonic_s()
    teller = Teller(begun_s, verb=parsed.verb, quiet=parsed.json)
    last: CommandProgress | None = None
    words = client.follow(order)
    try:
        async for progress in _with_patience(host, words, teller):
            last = progress
            teller.tell(progress, host.clock.monotonic_s())
            if parsed.no_wait and not progress.done:
                break
    finally:
        await words.aclose()
    seconds = host.clock.monotonic_s() - begun_s
    answer = Answer.of(order, last, seconds)
    if last is None or (last.done and not last.ok):
        if parsed.json:
            print_json(answer)
        raise CommandFailed(last.message if last else "the coordinator did not say how it ended", last)
    if parsed.verb in ("stop", "drain") and last.done:
        answer.message = "its engines have ended; `start` begins again"
        if parsed.end:
            answer.message = await _end(host, client, parsed.port)
    if parsed.json:
        print_json(answer)
    elif not last.done:
        print(f"{parsed.verb}: accepted; `interlock ctl command {order.command_id}` says how it goes")
    else:
        print(summary(parsed.verb, answer))
    return 0


async def _with_patience(
    host: RealHost, words: AsyncGenerator[CommandProgress, None], teller: Teller
) -> AsyncGenerator[CommandProgress, None]:
    """What comes, and between two words that are far apart a line that it is still waited for."""
    upcoming: asyncio.Task[CommandProgress | None] | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(anext(words, None))
            done, _ = await asyncio.wait({upcoming}, timeout=STILL_SECONDS)
            if not done:
                teller.still(host.clock.monotonic_s())
                continue
            progress, upcoming = upcoming.result(), None
            if progress is None:
                return
            yield progress
    finally:
        if upcoming is not None:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)


async def _end(host: RealHost, client: FleetClient, port: int) -> str:
    """What is left of a stopped fleet: its supervisor looks for this file."""
    host.files.write_durably(leave_file(port), b"")
    ended = await _wait_for_the_end(host, client)
    return "the fleet has ended" if ended else "its engines have ended, the rest has not yet"


async def _wait_for_the_end(host: RealHost, client: FleetClient) -> bool:
    """The coordinator ends last: when nobody answers any more it is over."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_SECONDS):
            while True:
                try:
                    await client.status()
                except ConnectionError:
                    return True
                await host.clock.sleep_s(POLL_SECONDS)
    return False


def _order(client: FleetClient, parsed: argparse.Namespace) -> Command:
    owner = parsed.owner or getpass.getuser()
    match parsed.verb:
        case "pause":
            return client.order(
                "PAUSE",
                owner,
                parsed.timeout,
                mode=parsed.mode,
                allow_unknown=parsed.allow_unknown,
                hold_seconds=parsed.hold_seconds,
            )
        case "unpause":
            return client.order("UNPAUSE", owner, parsed.timeout, break_hold_of=parsed.break_hold_of)
        case "update":
            weights = str(_checkpoint(parsed.weights))
            return client.order(
                "UPDATE", owner, parsed.timeout, version=parsed.version, weights=weights, kv=parsed.kv
            )
        case "start":
            weights = str(_checkpoint(parsed.weights)) if parsed.weights else ""
            return client.order("START", owner, parsed.timeout, version=parsed.version, weights=weights)
        case "suspend" | "resume":
            return client.order(parsed.verb.upper(), owner, parsed.timeout)
        case "drain":
            return client.order("STOP", owner, parsed.timeout, composite=True, mode="wait")
        case _:
            return client.order("STOP", owner, parsed.timeout, composite=True, mode="keep")


def _checkpoint(folder: str) -> Path:
    weights = Path(folder).expanduser().resolve()
    if not weights.is_dir():
        raise Failure(f"{weights} is no directory; name the checkpoint directory of the new weights")
    return weights


async def _forget(client: FleetClient, parsed: argparse.Namespace) -> None:
    fleet = await client.status(_patience(parsed))
    lives = dict.fromkeys(fleet.awaited, EVERY_LIFE) | {m.name: m.incarnation for m in fleet.members}
    if parsed.member not in lives:
        raise Failure(f"{parsed.member} is no member; there are: {', '.join(sorted(lives)) or 'none'}")
    # Where START awaits a new life, the one that is listed is the last: it is the new one that nobody shall wait for.
    life = EVERY_LIFE if parsed.member in fleet.awaited else lives[parsed.member]
    await client.member_gone(parsed.member, life, _patience(parsed))
    which = f"{parsed.member}@{life}" if life else parsed.member
    if parsed.json:
        print_json(Answer(ok=True, message=f"{which} counts as gone"))
    else:
        print(f"{parsed.member}: counts as gone from now on; nobody waits for it")


# --- waiting for a state -----------------------------------------------------------------------------------------


async def _wait_until(host: RealHost, client: FleetClient, parsed: argparse.Namespace) -> int:
    """Until target and every member that is not gone say so. A fleet that is not there yet is waited for, and one that is not
    there any more is STOPPED."""
    deadline_s = host.clock.monotonic_s() + parsed.timeout
    said = ""
    while True:
        try:
            fleet = await client.status(_patience(parsed))
            missing = wanted(fleet, parsed.wait)
            if not missing:
                show_status(fleet, parsed, host.clock.monotonic_s())
                return 0
        except (ChannelFault, ConnectionError, TimeoutError) as error:
            if isinstance(error, ConnectionError) and parsed.wait == State.STOPPED:
                if parsed.json:
                    print_json(Answer(ok=True, message="no fleet answers"))
                else:
                    print(f"STOPPED: no fleet answers on port {parsed.port}")
                return 0
            missing = "no coordinator answers" if isinstance(error, ConnectionError) else str(error)
        if missing != said and not parsed.json:
            print(f"  {missing}", file=sys.stderr)
        said = missing
        if host.clock.monotonic_s() >= deadline_s:
            raise TimeoutError(f"the fleet is not {parsed.wait} after {parsed.timeout:g} s: {missing}")
        await host.clock.sleep_s(POLL_SECONDS)

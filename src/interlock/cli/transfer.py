"""`interlock transfer serve|ping|peers|explain|bench`: transfer engines by hand, between two terminals or two hosts.

    interlock transfer serve --name b --address tcp:10.0.0.6:7400          # there: offers memory to read
    interlock transfer explain b=tcp:10.0.0.6:7400                          # here: how is b reached, over which lane, and why
    interlock transfer bench b=tcp:10.0.0.6:7400

Peers are given as NAME=ADDRESS, or as NAME with --coordinator. TCP addresses need the fleet's token, in $INTERLOCK_TRANSFER_TOKEN.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from interlock.cli.arguments import mebibytes, name, seconds
from interlock.cli.errors import Failure, Usage
from interlock.host.leaving import signalled

if TYPE_CHECKING:
    from interlock.transfer.engine import TransferEngine

TOKEN = "INTERLOCK_TRANSFER_TOKEN"  # noqa: S105 - the name of a variable
BENCH_LABEL = "bench"
POINTS = [(4 << 10, 1), (4 << 10, 256), (64 << 10, 64), (256 << 10, 64), (1 << 20, 32), (16 << 20, 4)]
BENCH_SECONDS = 0.5


def add_parser(commands: Any) -> None:
    """Adds the command; `run` is what its arguments are given to."""
    transfer = commands.add_parser(
        "transfer",
        help="transfer engines by hand",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = transfer.add_subparsers(dest="verb", metavar="VERB")
    serve = verbs.add_parser("serve", help="offer memory to read until Ctrl-C")
    serve.add_argument("--name", required=True, type=name, help="what peers call it")
    serve.add_argument("--address", required=True, metavar="unix:/PATH|tcp:HOST:PORT")
    serve.add_argument(
        "--mib", type=mebibytes, default=256, metavar="N", help="memory to offer (default 256 MiB)"
    )
    for verb, words in {
        "ping": "how far is it to a peer and back",
        "peers": "which peers can be connected, and how soon",
        "explain": "over which lane a peer is read, and why not over a faster one",
        "bench": "read scattered pieces of what `serve` offers",
    }.items():
        parser = verbs.add_parser(verb, help=words)
        parser.add_argument("peer", nargs="+", metavar="NAME[=ADDRESS]")
        parser.add_argument("--timeout", type=seconds, default=10.0, metavar="S", help="default 10")
    for parser in verbs.choices.values():
        parser.add_argument(
            "--coordinator", default="", metavar="ADDRESS", help="ask this coordinator for addresses"
        )
        parser.add_argument("--lanes", default="shm,tcp", help="kinds of lanes (default shm,tcp)")


def run(arguments: argparse.Namespace) -> int:
    """Raises `Usage`, and `Failure` when the peer cannot be reached or read."""
    if arguments.verb is None:
        raise Usage("transfer needs one of: serve, ping, peers, explain, bench")
    from interlock.core.errors import InterlockError

    try:
        return asyncio.run(_serve(arguments) if arguments.verb == "serve" else _ask(arguments))
    except (OSError, ValueError, InterlockError) as error:
        raise Failure(f"transfer: {error}") from error


@contextlib.asynccontextmanager
async def _engine(
    arguments: argparse.Namespace, name: str, address: str, peers: dict[str, str]
) -> AsyncIterator[TransferEngine]:
    from interlock.host.real import RealHost
    from interlock.membership.directory import Directory, StaticDirectory
    from interlock.membership.embedded import CoordinatorDirectory
    from interlock.transfer.engine import LaneOptions, TransferEngine
    from interlock.wire.identity import Identity, passing_identity

    host = RealHost()
    me = passing_identity(host, "transfer")
    if name:
        me = Identity(name, host.clock.wall_ns(), os.urandom(16))
    token = os.environ.get(TOKEN, "").encode()
    directory: Directory = StaticDirectory(peers)
    asked: CoordinatorDirectory | None = None
    with tempfile.TemporaryDirectory(prefix="itl") as private:
        if arguments.coordinator:
            directory = asked = CoordinatorDirectory(
                host, me, arguments.coordinator, lambda: engine.address if name else "", token
            )
        engine = TransferEngine(
            host,
            me,
            address or f"unix:{private}/control.sock",
            directory=directory,
            token=token,
            lanes=LaneOptions(kinds=tuple(arguments.lanes.split(",")), directory=private),
        )
        await engine.start()
        if asked is not None:
            await asked.start()
        try:
            yield engine
        finally:
            if asked is not None:
                await asked.close()
            await engine.close()
            host.close()


async def _serve(arguments: argparse.Namespace) -> int:
    from interlock.host.memory import create_memory

    memory = create_memory("interlock-bench", arguments.mib << 20)
    with signalled() as told:
        async with _engine(arguments, arguments.name, arguments.address, {}) as engine:
            engine.register(memory, BENCH_LABEL)
            sys.stdout.write(
                f"{arguments.name} offers {arguments.mib} MiB at {engine.address}; Ctrl-C ends it\n"
            )
            sys.stdout.flush()
            await told.wait()
    return 0


async def _ask(arguments: argparse.Namespace) -> int:
    peers = dict(given.split("=", 1) for given in arguments.peer if "=" in given)
    names = [given.split("=", 1)[0] for given in arguments.peer]
    if not arguments.coordinator and len(peers) < len(names):
        raise Usage("give each peer as NAME=ADDRESS, or name a --coordinator")
    verb = {"ping": _ping, "peers": _peers, "explain": _explain, "bench": _bench}[arguments.verb]
    async with _engine(arguments, "", "", peers) as engine:
        good = [await verb(engine, name, arguments.timeout) for name in names]
    return 0 if all(good) else 1


async def _ping(engine: TransferEngine, name: str, timeout_s: float) -> bool:
    took = sorted([await engine.ping(name, timeout_s=timeout_s) for _ in range(10)])
    print(
        f"{name}: {took[0] * 1e6:.0f} µs at best, {took[5] * 1e6:.0f} µs median of 10, to the peer and back"
    )
    return True


async def _peers(engine: TransferEngine, name: str, timeout_s: float) -> bool:
    from interlock.transfer.engine import TransferFailed

    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    try:
        await engine.open(name, timeout_s=timeout_s)
    except TransferFailed as failed:
        print(f"{name}: {failed}")
        return False
    print(f"{name}: connected within {(loop.time() - begun_s) * 1e3:.1f} ms")
    return True


async def _explain(engine: TransferEngine, name: str, timeout_s: float) -> bool:
    from interlock.transfer.engine import Part

    await engine.open(name, timeout_s=timeout_s)
    for segment in (await engine.segments_of(name, timeout_s=timeout_s))[:4]:
        await _read(engine, [Part(segment, bytearray(1), [(0, 0, 1)])], timeout_s)
    print("\n".join(engine.explain(name)))
    return True


async def _read(engine: TransferEngine, parts: list[Any], timeout_s: float) -> None:
    transfer = engine.read(parts, timeout_s=timeout_s)
    outcome = await transfer.outcome()
    await transfer.release()
    outcome.check()


async def _bench(engine: TransferEngine, name: str, timeout_s: float) -> bool:
    import numpy as np

    from interlock.transfer.engine import Part

    found = await engine.segments_of(name, BENCH_LABEL, timeout_s=timeout_s)
    if not found:
        raise Failure(f"{name} offers no segment {BENCH_LABEL!r}; start it with `interlock transfer serve`")
    here = np.zeros(found[0].size_bytes, np.uint8)
    loop = asyncio.get_running_loop()
    for size, count in POINTS:
        places = min(count, found[0].size_bytes // (2 * size))
        if not places:
            continue
        at = np.arange(places) * 2 * size
        parts = [Part(found[0], here, np.stack([at, at, np.full(places, size)], axis=1))]
        await _read(engine, parts, timeout_s)
        begun_s, times = loop.time(), 0
        while loop.time() - begun_s < BENCH_SECONDS:
            await _read(engine, parts, timeout_s)
            times += 1
        each_s = (loop.time() - begun_s) / times
        rate = size * places / each_s / 1e9
        print(f"{size >> 10:6} KiB x {places:<4} {rate:7.2f} GB/s {each_s * 1e6:9.0f} µs a batch")
    return True

"""`interlock attach URL`: a running vLLM server is a member of a fleet for as long as this command runs."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from interlock.cli.arguments import name, port
from interlock.cli.errors import Failure
from interlock.host.leaving import signalled

JOIN_SECONDS = 30.0


def add_parser(commands: Any) -> None:
    """Adds the command; `run` is what its arguments are given to."""
    parser = commands.add_parser(
        "attach",
        help="make a running vLLM server a member of a fleet, by its URL",
        description="Speaks for a vLLM server (started with VLLM_SERVER_DEV_MODE=1) until Ctrl-C: it is paused and updated with the "
        "fleet. Its requests stay its own.",
    )
    parser.add_argument("url", metavar="URL", help="http://host:port of the server")
    parser.add_argument("--port", type=port, default=8000, help="HTTP port of the fleet (default 8000)")
    parser.add_argument("--name", type=name, help="what the member is called (default: host:port)")
    parser.add_argument(
        "--version",
        type=name,
        default="0",
        help="what its weights are called, unless vLLM names them (default 0)",
    )
    parser.add_argument(
        "--weights",
        default="",
        metavar="DIRECTORY",
        help="where their checkpoint lies, as the server sees it",
    )
    parser.add_argument("--api-key", metavar="KEY", help="sent as `Authorization: Bearer KEY`")
    parser.add_argument(
        "--sleeps", action="store_true", help="the server was started with --enable-sleep-mode"
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Raises `Failure`."""
    return asyncio.run(_run(parsed))


async def _run(parsed: argparse.Namespace) -> int:
    with signalled() as stop:
        return await _attach(parsed, stop)


async def _attach(parsed: argparse.Namespace, stop: asyncio.Event) -> int:
    from interlock.attaching import attach
    from interlock.engines.base import EngineStartError

    try:
        attached = await attach(
            parsed.url,
            coordinator=parsed.port,
            name=parsed.name,
            version=parsed.version,
            weights=parsed.weights,
            api_key=parsed.api_key,
            sleeps=parsed.sleeps,
        )
    except (EngineStartError, ValueError) as error:
        raise Failure(str(error)) from error
    async with attached:
        print(f"{attached.name} is attached to the fleet on port {parsed.port}. Without:", flush=True)
        for lacking, words in attached.lacks.items():
            print(f"  {lacking:<14} {words}", flush=True)
        ended = asyncio.create_task(attached.ended())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if ended.done():
            print(f"{attached.name} is attached no more: {ended.result()}", flush=True)
            return 0
        ended.cancel()
    print(f"{attached.name} is detached", flush=True)
    return 0

"""`python -m interlock _process KIND NAME RUN_DIR`: what the supervisor starts. Not for people.

Each process hears by a pipe when the supervisor is gone and then has a stated grace to leave. A thread of its own sees to it
that it does, whatever its loop is busy with; and the last process of a fleet removes the run directory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
import uvloop

from interlock.core.errors import InterlockError
from interlock.core.limits import CHILD_GRACE_SECONDS
from interlock.fleet.launchers.rundir import ChildMark
from interlock.host.processes import parent_gone
from interlock.host.real import RealHost
from interlock.host.sweep import (
    FileLock,
    end_marked_now,
    own_mark,
    parent_pipe_ended,
    wait_parent_pipe_ended,
)
from interlock.host.threads import Event, start_thread
from interlock.telemetry.logs import configure_logging

CONFIG_BYTES_MAX = 1 << 20
STATUS_TOLD = 143
T = TypeVar("T")
_log = logging.getLogger(__name__)


def encode_config(config: msgspec.Struct) -> bytes:
    """A part's configuration as it goes to its process: JSON, paths as strings."""
    return msgspec.json.encode(config, enc_hook=str)


def decode_config(data: bytes, kind: type[T]) -> T:
    """The other way. Raises `msgspec.ValidationError` for what is no `kind`."""
    return msgspec.json.decode(data, type=kind, dec_hook=lambda wanted, value: wanted(value))


def run_process(arguments: list[str]) -> NoReturn:
    """The whole life of one part; does not return, so that no library's exit handler can hang it."""
    kind, name, folder = arguments
    run_dir = Path(folder)
    configure_logging(name)
    mark = ChildMark(run_dir)
    left = Event()
    start_thread("supervisor-guard", lambda: _guard(left, mark))
    status = 1
    try:
        status = _run(kind, name, run_dir)
    except KeyboardInterrupt:
        status = STATUS_TOLD
    except (InterlockError, OSError, ValueError, MemoryError) as error:
        _log.error("%s: %s", type(error).__name__, error)
        (run_dir / f"{name}.failure").write_text(str(error))
    except BaseException:
        _log.exception("%s ended by an error of its own", name)
    left.set()
    _leave(mark, status)


def _run(kind: str, name: str, run_dir: Path) -> int:
    host = RealHost()
    data = host.files.read(run_dir / f"{name}.json", CONFIG_BYTES_MAX)
    if data is None:
        raise ValueError(f"{run_dir} has no configuration for {name}")
    # The store's loop mostly waits for its disk and its threads; the others pass every token on.
    run = asyncio.run if kind == "store" else uvloop.run
    return run(KINDS[kind](host, data))


async def _coordinator(host: RealHost, data: bytes) -> int:
    from interlock.fleet.coordinator_main import CoordinatorConfig, run_coordinator
    from interlock.telemetry.kept import open_event_log

    config = decode_config(data, CoordinatorConfig)
    host.files.make_private_dir(config.state_dir)
    # A fleet whose supervisor was killed may be on its way out still; what it writes would land in the file of this one.
    lock = FileLock.take(config.state_dir / "lock", within_s=CHILD_GRACE_SECONDS)
    if lock is None:
        raise OSError(f"{config.state_dir} is in use by another coordinator; end that one, or name another")
    events = open_event_log(host.files, host.clock, config.state_dir)
    try:
        return await _until_told(run_coordinator(host, config, events=events))
    finally:
        lock.release()


async def _store(host: RealHost, data: bytes) -> int:
    from interlock.store.main import StoreConfig, run_node

    await run_node(host, decode_config(data, StoreConfig))
    return STATUS_TOLD


async def _front(host: RealHost, data: bytes) -> int:
    from interlock.web.main import FrontConfig, run_front

    await run_front(host, decode_config(data, FrontConfig))
    return STATUS_TOLD


async def _engine(host: RealHost, data: bytes) -> int:
    from interlock.engines.main import EngineProcessConfig, run_engine

    return await run_engine(host, decode_config(data, EngineProcessConfig))


KINDS: dict[str, Callable[[RealHost, bytes], Coroutine[Any, Any, int]]] = {
    "coordinator": _coordinator,
    "store": _store,
    "front": _front,
    "engine": _engine,
}


async def _until_told(work: Coroutine[Any, Any, None]) -> int:
    """Runs `work` until SIGTERM, SIGINT, or the supervisor's end, then cancels it. Raises what it raised by itself."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tasks = [
        asyncio.create_task(work),
        asyncio.create_task(stop.wait()),
        asyncio.create_task(parent_gone()),
    ]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]
    return STATUS_TOLD


def _guard(left: Event, mark: ChildMark) -> None:
    wait_parent_pipe_ended()
    if not left.wait(CHILD_GRACE_SECONDS - 0.5):
        _log.warning("still here %s s after the supervisor's end: leaving without order", CHILD_GRACE_SECONDS)
        _leave(mark, STATUS_TOLD)


def _leave(mark: ChildMark, status: int) -> NoReturn:
    """With everything this process has started: whatever it was, nothing of it may be left."""
    tree = own_mark()
    if tree is not None:
        end_marked_now(tree)
    logging.shutdown()
    sys.stdout.flush()
    mark.leave(supervisor_gone=parent_pipe_ended())
    os._exit(status)

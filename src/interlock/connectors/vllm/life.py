"""Which life of the engine this is: one incarnation that all processes of one vLLM engine agree on.

vLLM builds the scheduler's and each worker's connector in processes of their own and tells them nothing of each other,
except one id of the engine's life that it drew at start. The first of them to come allots the incarnation and writes it
beside that id, under a file lock; the others find it there (DESIGN §4.2: durable before the first message).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from interlock.core.identity import next_incarnation
from interlock.wire.identity import MachineState

LIFE_FILE_BYTES_MAX = 4096


class _Life(msgspec.Struct, frozen=True):
    life: str
    incarnation: int


def engine_incarnation(host: MachineState, state: Path, engine: str, life: str) -> int:
    """The incarnation of this engine's life; the same for every process that passes the same `life`.

    Raises `OSError` when the state directory cannot be written: without it a restarted engine could be taken for its
    former life.
    """
    folder = state / "engines"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The name is an operator's word and may hold slashes: never a path component.
    stem = hashlib.sha256(engine.encode()).hexdigest()[:32]
    file = folder / f"{stem}.json"
    with _locked(folder / f".{stem}.lock"):
        last = _read(host, file)
        if last is not None and last.life == life:
            return last.incarnation
        stored = last.incarnation if last is not None else 0
        incarnation = next_incarnation(stored=stored, wall_ns=host.clock.wall_ns())
        host.files.write_durably(file, msgspec.json.encode(_Life(life, incarnation)))
        return incarnation


def _read(host: MachineState, file: Path) -> _Life | None:
    data = host.files.read(file, LIFE_FILE_BYTES_MAX)
    try:
        return msgspec.json.decode(data, type=_Life) if data else None
    except msgspec.DecodeError:
        return None  # the wall clock still puts the new life above the old one


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the kernel unlocks for one that dies, and the work inside is two small file calls."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

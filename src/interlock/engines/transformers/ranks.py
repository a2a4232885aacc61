"""The ranks of one engine: rank 0 drives, in the engine's process; each other rank is a process that does what it is told.

    rank 0 ──command (length, msgpack)──► pipe ──► rank n          the model's own collectives run over gloo between them
           ◄──answer─────────────────────  pipe ──

Commands travel by pipe and not by a collective: a rank may stand idle for hours without a time-out, a pipe's end tells at
once that the other side is gone, and no port is opened for them. Rank 0 has an answer from every rank before the next
command: what it reports as standing stands on all of them.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from interlock.core.limits import LOCKSTEP_COLLECTIVE_SECONDS_MAX
from interlock.engines.base import EngineGone, EngineStartError
from interlock.engines.transformers.computer import Computer
from interlock.engines.transformers.hooks import Hooks
from interlock.engines.transformers.plans import (
    AnyCommand,
    Leave,
    Load,
    Open,
    Put,
    Release,
    Step,
    Take,
    Update,
    decode,
    encode,
)
from interlock.engines.transformers.setup import ExpertGroup, TransformersConfig, load_model

COMMAND_BYTES_MAX = 1 << 34
STARTED = b"started"


class RankAnswer(msgspec.Struct, frozen=True):
    """`error` is "" or what went wrong, in words; `data` is what `Take` hands out."""

    error: str = ""
    data: bytes = b""


class RankFailed(Exception):  # noqa: N818 - says what is, as the others do
    """A command failed on some rank in an orderly way: every rank still answers."""


def obey(computer: Computer, command: AnyCommand, rank: int) -> Any:
    """What the command gives on this rank: logits of a step, good blocks of a load, bytes of a take."""
    match command:
        case Step():
            return computer.step(command)
        case Open(access):
            return open_hooks(computer, access, rank)
        case Load():
            return computer.load(command)
        case Take(key):
            return computer.take(key)
        case Put():
            return computer.put(command, rank)
        case Update(path, drop_caches):
            return computer.update(path, drop_caches)
        case Release():
            return computer.release()
        case Leave():
            return None


def build_computer(config: TransformersConfig, rank: int) -> Computer:
    """This rank's model, probed. Raises `EngineStartError`, `ModelRefused`."""

    def load(path: str) -> Any:
        return load_model(config, path)

    if config.expert_group is not None:
        return _build_expert_rank(config, config.expert_group, load)
    if config.tensor_parallel == 1:
        return Computer(load, block_tokens=config.block_tokens)
    agree = _join_group(config, rank)
    try:
        return Computer(load, block_tokens=config.block_tokens, agree=agree)
    except BaseException:
        leave_group()
        raise


def _build_expert_rank(
    config: TransformersConfig, group: ExpertGroup, load: Callable[[str], Any]
) -> Computer:
    """Alone with its requests, and one of several with the experts: every forward meets those of the other ranks.

    The probe meets, too: all ranks ask the same model the same questions. No collective of this group has a deadline of its
    own that counts: whoever leads the steps has one, and ends the group.
    """
    _init_group(Path(group.meeting), group.rank, group.ranks, LOCKSTEP_COLLECTIVE_SECONDS_MAX)
    return Computer(load, block_tokens=config.block_tokens)


def open_hooks(computer: Computer, access: bytes, rank: int) -> Hooks:
    """The store's part on this rank."""
    from interlock.engines.transformers import blocks

    store: Any = blocks
    hooks: Hooks = store.open_hooks(access, computer, rank)
    computer.worker, computer.boundary = hooks.worker, hooks.boundary
    return hooks


def meeting_file(config: TransformersConfig) -> Path:
    """Where the ranks of this engine find each other; must be absent before the first of them starts."""
    return Path(config.scratch_dir).resolve() / "ranks"


def _join_group(config: TransformersConfig, rank: int) -> Any:
    """Joins the gloo group of this engine's ranks (a file in its scratch directory is where they meet)."""
    import torch
    from torch import distributed

    _init_group(meeting_file(config), rank, config.tensor_parallel, config.collective_seconds)

    def agree(good: int) -> int:
        least = torch.tensor([good])
        distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
        return int(least)

    return agree


def _init_group(meeting: Path, rank: int, ranks: int, seconds: float) -> None:
    from datetime import timedelta

    from torch import distributed

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks)
    )
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )


def leave_group() -> None:
    """So that this process may have another engine later."""
    from torch import distributed

    with contextlib.suppress(RuntimeError):
        distributed.destroy_process_group()


class Ranks:
    """Rank 0's hold on all ranks, its own included. Blocking; used by the engine's thread alone."""

    def __init__(self, computer: Computer, pipes: Sequence[Pipe], seconds: float) -> None:
        self.computer, self._pipes, self._seconds = computer, list(pipes), seconds

    @property
    def count(self) -> int:
        return 1 + len(self._pipes)

    def await_start(self) -> None:
        """Every other rank has its model. Raises `EngineStartError`, `EngineGone`."""
        for pipe in self._pipes:
            answer = msgspec.msgpack.decode(pipe.receive(self._seconds), type=RankAnswer)
            if answer.error:
                raise EngineStartError(answer.error)

    def do(self, command: AnyCommand) -> Any:
        """What the command gives on rank 0, once every rank has done it.

        Raises `RankFailed` when it failed in an orderly way somewhere, `EngineGone` when a rank is gone.
        """
        return self.do_all(command)[0]

    def do_all(self, command: AnyCommand) -> list[Any]:
        """As `do`: rank 0's own, and the bytes of every other rank."""
        if self._pipes:
            data = encode(command)
            for pipe in self._pipes:
                pipe.send(data)
        error = ""
        own: Any = None
        try:
            own = obey(self.computer, command, 0)
        except Exception as failure:
            if isinstance(command, Step):
                raise EngineGone(f"the step failed: {type(failure).__name__}: {failure}") from failure
            error = str(failure)
        answers = [
            msgspec.msgpack.decode(pipe.receive(self._seconds), type=RankAnswer) for pipe in self._pipes
        ]
        error = error or next((answer.error for answer in answers if answer.error), "")
        if error:
            raise RankFailed(error)
        return [own, *(answer.data for answer in answers)]

    def close(self) -> None:
        """Tells the other ranks to end, waits for none, and leaves their group."""
        for pipe in self._pipes:
            with contextlib.suppress(EngineGone):
                pipe.send(encode(Leave()))
            pipe.close()
        if self._pipes:
            leave_group()
        self._pipes = []


class Pipe:
    """A length-prefixed exchange over two pipe descriptors, which it owns. Waits, but never without end where told so."""

    def __init__(self, read_fd: int, write_fd: int, seconds: float | None = None) -> None:
        """`seconds`: what a write waits for a reader that takes nothing."""
        self._read, self._write, self._seconds = read_fd, write_fd, seconds
        os.set_blocking(write_fd, False)

    def send(self, data: bytes) -> None:
        """Raises `EngineGone` when the other side is gone, or takes nothing for too long."""
        view = memoryview(len(data).to_bytes(8, "big") + data)
        while view:
            if not _ready(self._write, select.POLLOUT, self._seconds):
                raise EngineGone(f"a rank of this engine has taken nothing for {self._seconds:.0f} s")
            try:
                view = view[os.write(self._write, view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise EngineGone(f"a rank of this engine is gone: {error}") from error

    def receive(self, seconds: float | None) -> bytes:
        """Raises `EngineGone` when the other side is gone or says nothing for `seconds`."""
        size = int.from_bytes(self._exactly(8, seconds), "big")
        if size > COMMAND_BYTES_MAX:
            raise EngineGone(f"a rank announced {size} bytes; at most {COMMAND_BYTES_MAX} are taken")
        return self._exactly(size, seconds)

    def _exactly(self, count: int, seconds: float | None) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            if not _ready(self._read, select.POLLIN, seconds):
                raise EngineGone(f"a rank of this engine has not answered for {seconds:.0f} s")
            part = os.read(self._read, min(1 << 20, count - len(parts)))
            if not part:
                raise EngineGone("a rank of this engine is gone: its pipe has ended")
            parts += part
        return bytes(parts)

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


def _ready(fd: int, event: int, seconds: float | None) -> bool:
    """Waits for `event` on `fd`; false after `seconds`."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(None if seconds is None else seconds * 1000.0))


class RankConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What another rank's process is started with, as JSON in its only argument."""

    engine: TransformersConfig
    rank: int
    read_fd: int
    write_fd: int


def main() -> int:
    """The life of a rank other than 0: obeys until told to leave, or until rank 0 is gone."""
    from interlock.engines.transformers.setup import prepare_environment

    config = msgspec.json.decode(sys.argv[1].encode(), type=RankConfig)
    prepare_environment(config.engine)
    pipe = Pipe(config.read_fd, config.write_fd)
    try:
        try:
            computer = build_computer(config.engine, config.rank)
        except Exception as error:
            pipe.send(msgspec.msgpack.encode(RankAnswer(str(error))))
            return 1
        pipe.send(msgspec.msgpack.encode(RankAnswer(data=STARTED)))
        _obey_all(computer, pipe, config.rank)
    except EngineGone as error:
        print(f"rank {config.rank} leaves: {error}", file=sys.stderr)
        return 1
    return 0


def _obey_all(computer: Computer, pipe: Pipe, rank: int) -> None:
    while True:
        command = decode(pipe.receive(None))
        if isinstance(command, Leave):
            return
        try:
            made = obey(computer, command, rank)
            answer = RankAnswer(data=made if isinstance(made, bytes) else b"")
        except Exception as error:
            answer = RankAnswer(f"rank {rank}: {type(error).__name__}: {error}")
        pipe.send(msgspec.msgpack.encode(answer))
        if answer.error and isinstance(command, Step):
            return


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # a group whose other end is gone would be waited for

"""The process of one rank: loads its part of the model, listens, and serves its runner until that is gone.

It listens, so that more than one leader can speak to it: whom to obey is decided by their epochs (`core/lockstep`), not by who
came last. Requests belong to the channel that began them and go with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from interlock.core.errors import ProtocolError, RemoteProtocolError
from interlock.core.limits import CHILD_GRACE_SECONDS
from interlock.engines.base import (
    EngineGone,
    EngineStartError,
    NotStanding,
    RequestRejected,
    Unable,
    UpdateFailed,
)
from interlock.engines.lockstep.rank_config import RankConfig
from interlock.engines.lockstep.rank_engine import RankEngine
from interlock.engines.lockstep.words import (
    Abort,
    Begin,
    Done,
    Failed,
    FenceWord,
    GrantWord,
    Hold,
    Leave,
    Made,
    PutBack,
    Said,
    Started,
    States,
    StatesPage,
    Take,
    Taken,
    ToRank,
    Update,
)
from interlock.engines.transformers.engine import Told
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.base import Host
from interlock.host.processes import parent_gone
from interlock.host.real import RealHost
from interlock.telemetry.logs import configure_logging
from interlock.wire.channel import Channel, Received, serve_channels
from interlock.wire.identity import Identity

_log = logging.getLogger(__name__)
CALLS_MAX = 4096
FAULTS: dict[type[Exception], str] = {
    RequestRejected: "rejected",
    KeyError: "unknown",
    NotStanding: "not_standing",
    Unable: "unable",
    UpdateFailed: "update_failed",
    EngineGone: "gone",
}
"""What a call may raise, and its code on the wire; `link` turns it back."""


class RankService:
    """Serves leaders and the runner over one engine, all in the loop's thread."""

    def __init__(self, host: Host, config: TransformersConfig) -> None:
        assert config.expert_group is not None
        self.engine = RankEngine(host, config, on_made=self._made, on_said=self._say, on_death=self._failed)
        self.leave: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._channels: list[Channel] = []
        self._owners: dict[str, Channel] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._why_failed = ""

    async def serve(self, channel: Channel) -> None:
        """One connection, until it ends. Raises what `Channel.messages` raises."""
        self._channels.append(channel)
        try:
            await channel.send(self._said())
            if self._why_failed:
                await channel.send(Failed(self._why_failed))
            async for received in channel.messages():
                await self._hear(channel, received)
        finally:
            self._channels.remove(channel)
            for key in [key for key, owner in self._owners.items() if owner is channel]:
                self._owners.pop(key)
                self._call(self._forget(key))

    # --- what is heard -------------------------------------------------------------------------------------------

    async def _hear(self, channel: Channel, received: Received) -> None:
        match received.body:
            case FenceWord(word) | GrantWord(word):
                try:
                    answers = self.engine.seat.hear(word)
                except RemoteProtocolError as error:
                    await channel.fault(received, "refused", str(error))
                    raise
                if answers:
                    _post(channel, self._said())
            case Hold(number, mode):
                self.engine.hold(number, mode)
            case Leave():
                if not self.leave.done():
                    self.leave.set_result("told to")
            case _ if len(self._calls) >= CALLS_MAX:
                await channel.fault(received, "rejected", f"{CALLS_MAX} calls wait here; try again later")
            case _:
                self._call(self._answer(channel, received))

    async def _answer(self, channel: Channel, received: Received) -> None:
        with contextlib.suppress(ConnectionError, ProtocolError):
            try:
                await channel.reply(received, await self._do(channel, received.body))
            except tuple(FAULTS) as error:
                code = next(code for kind, code in FAULTS.items() if isinstance(error, kind))
                await channel.fault(received, code, str(error))
            except Exception as error:
                _log.exception("%s failed", type(received.body).__name__)
                await channel.fault(received, "failed", f"{type(error).__name__}: {error}")

    async def _do(self, channel: Channel, asked: object) -> Done | Taken | StatesPage:
        engine = self.engine
        match asked:
            case Begin(work):
                await self._own(channel, work.key, engine.begin(work))
            case PutBack(state):
                await self._own(channel, state.work.key, engine.put_back(state))
            case Abort(key, told):
                await engine.forget(key, told=told)
            case Take(key):
                return Taken(await engine.take_out(key))
            case States(after):
                return StatesPage(*await engine.states_page(after))
            case Update(path, version, kv):
                await engine.update_weights(Path(path), version, kv)
            case _:
                raise Unable(f"a rank does not understand {type(asked).__name__}")
        return Done()

    async def _own(self, channel: Channel, key: str, begin: Coroutine[Any, Any, None]) -> None:
        """Its tokens go to this channel, from the first step on."""
        self._owners[key] = channel
        try:
            await begin
        except BaseException:
            self._owners.pop(key, None)
            raise

    async def _forget(self, key: str) -> None:
        with contextlib.suppress(EngineGone):
            await self.engine.forget(key, told=False)

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    # --- what is said --------------------------------------------------------------------------------------------

    def _said(self) -> Said:
        loop = self.engine.loop
        busy = self.engine.load()
        return Said(
            report=loop.seat.report,
            wants_tokens=loop.wants_tokens,
            stood=loop.stood,
            running=busy.running,
            waiting=busy.waiting,
            kv_used_share=busy.kv_used_share,
        )

    def _say(self) -> None:
        said = self._said()
        for channel in self._channels:
            _post(channel, said)

    def _made(self, told: Told) -> None:
        counts = dict(self.engine.counts())
        shares: dict[int, tuple[Channel, Told]] = {}
        for key, progress in told:
            owner = self._owners.get(key)
            if owner is not None:
                shares.setdefault(id(owner), (owner, []))[1].append((key, progress))
                if progress.finish:
                    del self._owners[key]
        for channel, share in shares.values():
            _post(channel, Made(share, counts))

    def _failed(self, why: str) -> None:
        """Said to whoever listens; they end this process, and know better than it whose fault it was."""
        self._why_failed = why
        for channel in self._channels:
            _post(channel, Failed(why))
        asyncio.get_running_loop().call_later(CHILD_GRACE_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if not self.leave.done():
            self.leave.set_result(self._why_failed)


def _post(channel: Channel, body: msgspec.Struct) -> None:
    with contextlib.suppress(ConnectionError, ProtocolError):
        channel.post(body)


async def live(host: Host, config: RankConfig) -> str:
    """The rank's whole life; why it ended. Raises `EngineStartError` before it serves anybody."""
    service = RankService(host, config.engine)
    gone = asyncio.create_task(parent_gone(), name="runner")
    starting = asyncio.create_task(service.engine.start(), name="start")
    waits: set[asyncio.Future[Any]] = {gone, starting}
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        return "the runner is gone"
    capabilities = starting.result()
    me = Identity(config.engine.name, max(1, host.clock.wall_ns()))
    listener = await serve_channels(host, config.address, me=me, accept=ToRank, on_channel=service.serve)
    tell(config.started_fd, Started(capabilities=capabilities))
    waits = {gone, service.leave}
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CHILD_GRACE_SECONDS / 2):
            await service.engine.stop()
            await listener.close()
    return service.leave.result() if service.leave.done() else "the runner is gone"


def tell(fd: int, started: Started) -> None:
    """On the pipe, which ends with it."""
    with contextlib.suppress(OSError):
        os.write(fd, msgspec.msgpack.encode(started))
        os.close(fd)


def main() -> int:
    """The exit status."""
    config = msgspec.json.decode(sys.argv[1].encode(), type=RankConfig)
    configure_logging(config.engine.name)
    try:
        why = asyncio.run(live(RealHost(), config))
    except EngineStartError as error:
        tell(config.started_fd, Started(error=str(error)))
        return 1
    _log.info("%s leaves: %s", config.engine.name, why)
    return 0


def exit_now(status: int) -> None:
    """Without waiting for a collective whose other end is gone."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    exit_now(main())

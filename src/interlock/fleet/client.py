"""Asking a fleet's coordinator: status, pause, update, suspend, stop, with progress member by member.

A command is named by (owner, command_id), and the coordinator carries it through once it has accepted it. So this client may
lose its connection, or the coordinator its life: the command is sent again under the same name until its end is heard. A client
that dies leaves a command that goes on; whoever knows its id asks `command` what became of it.

    async with fleet.paused(mode="keep") as pause:
        await pause.update_weights("v7", "/checkpoints/v7")  # every member stands, or the call has raised

`fleet.blocking_client` is the synchronous twin.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path

from interlock.core.errors import ChannelFault, InterlockError, RemoteProtocolError, StaleError
from interlock.core.limits import (
    COMMAND_SECONDS_DEFAULT,
    ENGINE_START_SECONDS_MAX,
    HELLO_SECONDS_MAX,
    RECONNECT_SECONDS_MAX,
    RECONNECT_SECONDS_MIN,
    RELEASE_SECONDS_DEFAULT,
)
from interlock.fleet.asking import Questions
from interlock.fleet.pausing import Paused
from interlock.host.base import Host
from interlock.wire.channel import Channel
from interlock.wire.envelope import Fault
from interlock.wire.fleet_messages import Command, CommandProgress
from interlock.wire.identity import Identity

GRACE_SECONDS = 5.0
"""What the coordinator may take, beyond a command's own deadline, to say how it ended."""
OnProgress = Callable[[CommandProgress], None]
"""Called with each word of the coordinator on a command's way, the last one included. It must not block."""


class CommandFailed(InterlockError):  # noqa: N818
    """The command was accepted and did not get there. `progress` is the last word, member by member."""

    def __init__(
        self, message: str, progress: CommandProgress | None = None, *, retryable: bool = False
    ) -> None:
        super().__init__(message, retryable=retryable)
        self.progress = progress


class FleetClient(Questions):
    """One user of one coordinator. Without an `identity` it is nobody in particular (a command line, a test).

    What every command may raise ("as `run`"):

    * `ChannelFault`: refused, nothing was changed; `code` is "refused" (the message says what to do instead), "invalid",
      "not_kept" (the coordinator's disk), and `retryable` says whether the same may succeed later;
    * `CommandFailed`: it was begun and did not get there by its deadline, or a member failed on the way: `progress` has all;
    * `TimeoutError`: the coordinator did not say how it ended; it may still be carried through. Ask `command` by its id;
    * `StaleError`: this client's own identity has a newer life.

    No connection is held between calls, so a client may be used by any number of tasks, and kept over restarts.
    """

    def __init__(self, host: Host, address: str, identity: Identity | None = None) -> None:
        super().__init__(host, address, identity)
        self._numbers = itertools.count(1)

    # --- commands -------------------------------------------------------------------------------------------------

    async def pause(
        self,
        mode: str = "keep",
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        hold_seconds: float | None = None,
        allow_unknown: bool = False,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """Returns when every member stands, is gone, or (if allowed) cannot be seen. Raises as `run`.

        `mode`: running requests are frozen ("keep"), ended first ("wait"), or aborted ("abort"). The hold is `owner`'s until
        `unpause`, or until `hold_seconds` have passed; a pause repeated by its owner makes it later, never earlier. It stays
        when this raises `CommandFailed`: who does not want it any more says `unpause`.
        """
        order = self.order(
            "PAUSE", owner, timeout_s, mode=mode, hold_seconds=hold_seconds, allow_unknown=allow_unknown
        )
        return await self.run(order, on_progress)

    async def unpause(
        self,
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        break_hold_of: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """Releases `owner`'s hold, or breaks that of another by name. Raises as `run`.

        The fleet runs when no hold remains; while others hold it, `message` names them. Refused while the weights are unknown.
        """
        order = self.order("UNPAUSE", owner, timeout_s, break_hold_of=break_hold_of)
        return await self.run(order, on_progress)

    async def update_weights(
        self,
        version: str,
        weights: str | Path,
        *,
        owner: str,
        kv: str = "recompute",
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """While paused, every engine changes to the checkpoint directory `weights` (as the engines see it), which is called
        `version` from then on. `kv`: what becomes of the KV of frozen requests, "recompute" or "keep".

        Raises as `run`. After `CommandFailed` the weights are unknown: update again, or stop.
        """
        order = self.order("UPDATE", owner, timeout_s, version=version, weights=str(weights), kv=kv)
        return await self.run(order, on_progress)

    async def suspend(
        self,
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """While paused, every engine gives its memory back; requests are kept. Raises as `run`."""
        return await self.run(self.order("SUSPEND", owner, timeout_s), on_progress)

    async def resume(
        self,
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """Every engine takes its memory again; the fleet is paused then (vLLM's resume is our `unpause`). Raises as `run`."""
        return await self.run(self.order("RESUME", owner, timeout_s), on_progress)

    async def drain(
        self,
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """Lets running requests end, then stops: carried through though this client may be gone. Raises as `run`."""
        order = self.order("STOP", owner, timeout_s, composite=True, mode="wait")
        return await self.run(order, on_progress)

    async def stop(
        self,
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        composite: bool = False,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """Ends every engine. `composite`: also from RUNNING, by way of a pause. Raises as `run`."""
        return await self.run(self.order("STOP", owner, timeout_s, composite=composite), on_progress)

    async def start(
        self,
        *,
        owner: str,
        timeout_s: float = ENGINE_START_SECONDS_MAX,
        version: str | None = None,
        weights: str = "",
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """A fleet that was stopped is launched again, by the launcher that stayed; returns when every engine runs. `version` and
        `weights` as for `update_weights`; without them those it had. Raises as `run`."""
        order = self.order("START", owner, timeout_s, version=version, weights=weights)
        return await self.run(order, on_progress)

    def paused(
        self,
        mode: str = "keep",
        *,
        owner: str | None = None,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        hold_seconds: float | None = None,
        allow_unknown: bool = False,
        release_s: float = RELEASE_SECONDS_DEFAULT,
        on_progress: OnProgress | None = None,
    ) -> Paused:
        """`async with fleet.paused() as pause:` holds the fleet paused inside the block, and releases its own hold however
        the block is left. What it promises, and what happens when the coordinator dies within, stands in `fleet.pausing`.

        Without an `owner` the hold has a name that no other has. `hold_seconds`: it ends by itself so long after, which a
        trainer that may be killed should name; `release_s`: how long the end of the block waits for a coordinator that is away.
        """
        return Paused(
            self,
            owner or f"{self._me.name}.{next(self._numbers)}",
            mode=mode,
            timeout_s=timeout_s,
            hold_seconds=hold_seconds,
            allow_unknown=allow_unknown,
            release_s=release_s,
            on_progress=on_progress,
        )

    def order(self, command: str, owner: str, timeout_s: float, **more: object) -> Command:
        """A command under an id of its own (`command_id`), to be given to `run` or `follow`."""
        return Command(command, owner, secrets.token_hex(8), timeout_s=timeout_s, **more)  # type: ignore[arg-type]

    async def run(self, order: Command, on_progress: OnProgress | None = None) -> CommandProgress:
        """Its last progress. Raises what the class says."""
        last: CommandProgress | None = None
        async with contextlib.aclosing(self.follow(order)) as words:
            async for progress in words:
                last = progress
                if on_progress is not None:
                    on_progress(progress)
        if last is None or not last.ok:
            why = last.message if last else "no progress was heard"
            raise CommandFailed(f"{order.command} failed: {why}", last)
        return last

    async def follow(self, order: Command) -> AsyncGenerator[CommandProgress, None]:
        """Progress as it comes; the last one is `done`. Leaving early leaves the command to the coordinator.

        Raises `ChannelFault` when refused, `TimeoutError` when no end was heard by the command's deadline and a grace (it may
        still be carried through: ask again by its id).
        """
        clock = self._host.clock
        deadline_s = clock.monotonic_s() + order.timeout_s + GRACE_SECONDS
        pause_s, trouble = RECONNECT_SECONDS_MIN, "no connection"
        while (left_s := deadline_s - clock.monotonic_s()) > 0:
            try:
                channel = await self._connect(min(left_s, HELLO_SECONDS_MAX))
                try:
                    async for progress in self._listen(channel, order, deadline_s):
                        yield progress
                        if progress.done:
                            return
                finally:
                    await channel.close()
                trouble = str(channel.closed)
            except StaleError:
                raise
            except ChannelFault as fault:
                if fault.code != "recovering":
                    raise
                trouble = fault.message
            except (OSError, TimeoutError, RemoteProtocolError) as error:
                trouble = str(error)
            await clock.sleep_s(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_SECONDS_MAX)
        raise TimeoutError(
            f"the coordinator did not say how {order.command} (owner {order.owner}, id {order.command_id}) ended: {trouble}"
        )

    # --- channels -------------------------------------------------------------------------------------------------

    async def _listen(
        self, channel: Channel, order: Command, deadline_s: float
    ) -> AsyncIterator[CommandProgress]:
        number = await channel.send(order)
        messages = channel.messages()
        while True:
            async with asyncio.timeout(max(0.0, deadline_s - self._host.clock.monotonic_s())):
                received = await anext(messages, None)
            if received is None:
                return
            match received.body:
                case Fault(code, message, retryable) if received.answers == number:
                    raise ChannelFault(code, message, retryable)
                case CommandProgress() as progress if received.answers == number:
                    yield progress
                case _:
                    pass

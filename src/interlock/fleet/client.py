"""Asking a fleet's coordinator: status, pause, update, suspend, stop, with progress member by member.

A command is named by (owner, command_id), and the coordinator carries it through once it has accepted it. So this client may
lose its connection, or the coordinator its life: the command is sent again under the same name until its end is heard.

    async with fleet.paused(mode="keep", owner="trainer") as pause:
        ...  # every member stands, or the call has raised
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

from interlock.core.errors import ChannelFault, InterlockError, RemoteProtocolError, StaleError
from interlock.core.limits import (
    COMMAND_SECONDS_DEFAULT,
    HELLO_SECONDS_MAX,
    RECONNECT_SECONDS_MAX,
    RECONNECT_SECONDS_MIN,
)
from interlock.host.base import Host
from interlock.wire.channel import Channel, connect_channel
from interlock.wire.envelope import Fault
from interlock.wire.fleet_messages import (
    Command,
    CommandAccepted,
    CommandProgress,
    GetStatus,
    MemberGone,
    Membership,
)
from interlock.wire.identity import Identity, passing_identity

GRACE_SECONDS = 5.0
"""What the coordinator may take, beyond a command's own deadline, to say how it ended."""


class CommandFailed(InterlockError):  # noqa: N818
    """The command was accepted and did not get there. `progress` is the last word, member by member."""

    def __init__(
        self, message: str, progress: CommandProgress | None = None, *, retryable: bool = False
    ) -> None:
        super().__init__(message, retryable=retryable)
        self.progress = progress


class FleetClient:
    """One user of one coordinator. Without an `identity` it is nobody in particular (a command line, a test)."""

    def __init__(self, host: Host, address: str, identity: Identity | None = None) -> None:
        self._host, self._address = host, address
        self._me = identity or passing_identity(host, "admin")

    async def status(self, timeout_s: float = HELLO_SECONDS_MAX) -> Membership:
        """Raises `ConnectionError` or `TimeoutError` (no coordinator), `ChannelFault` "recovering"."""
        channel = await self._connect(timeout_s)
        try:
            answer = await channel.request(GetStatus(), timeout_s)
        finally:
            await channel.close()
        if not isinstance(answer, Membership):
            raise RemoteProtocolError(f"GetStatus was answered by {type(answer).__name__}")
        return answer

    async def member_gone(self, name: str, incarnation: int, timeout_s: float = HELLO_SECONDS_MAX) -> None:
        """For launchers: all processes of this life are proven ended. Raises as `status`; to be repeated until it returns."""
        channel = await self._connect(timeout_s)
        try:
            await channel.request(MemberGone(name, incarnation), timeout_s)
        finally:
            await channel.close()

    async def pause(
        self,
        mode: str = "keep",
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        hold_seconds: float | None = None,
        allow_unknown: bool = False,
    ) -> CommandProgress:
        """Returns when every member stands, is gone, or (if allowed) cannot be seen. Raises as `run`.

        The hold stays when it raises `CommandFailed`: who does not want it any more says `unpause`.
        """
        return await self.run(
            self.order(
                "PAUSE", owner, timeout_s, mode=mode, hold_seconds=hold_seconds, allow_unknown=allow_unknown
            )
        )

    async def unpause(
        self, *, owner: str, timeout_s: float = COMMAND_SECONDS_DEFAULT, break_hold_of: str | None = None
    ) -> CommandProgress:
        """Releases `owner`'s hold, or breaks that of another by name. Raises as `run`."""
        return await self.run(self.order("UNPAUSE", owner, timeout_s, break_hold_of=break_hold_of))

    async def update_weights(
        self,
        version: str,
        weights: str,
        *,
        owner: str,
        kv: str = "recompute",
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
    ) -> CommandProgress:
        """While paused, every engine changes to the checkpoint directory `weights` (as the engines see it), which is called
        `version` from then on. `kv`: what becomes of the KV of frozen requests, "recompute" or "keep".

        Raises as `run`. After `CommandFailed` the weights are unknown: update again, or stop.
        """
        return await self.run(self.order("UPDATE", owner, timeout_s, version=version, weights=weights, kv=kv))

    async def suspend(self, *, owner: str, timeout_s: float = COMMAND_SECONDS_DEFAULT) -> CommandProgress:
        """While paused, every engine gives its memory back; requests are kept. Raises as `run`."""
        return await self.run(self.order("SUSPEND", owner, timeout_s))

    async def resume(self, *, owner: str, timeout_s: float = COMMAND_SECONDS_DEFAULT) -> CommandProgress:
        """Every engine takes its memory again; the fleet is paused then (vLLM's resume is our `unpause`). Raises as `run`."""
        return await self.run(self.order("RESUME", owner, timeout_s))

    async def drain(self, *, owner: str, timeout_s: float = COMMAND_SECONDS_DEFAULT) -> CommandProgress:
        """Lets running requests end, then stops: carried through though this client may be gone. Raises as `run`."""
        return await self.run(self.order("STOP", owner, timeout_s, composite=True, mode="wait"))

    async def stop(
        self, *, owner: str, timeout_s: float = COMMAND_SECONDS_DEFAULT, composite: bool = False
    ) -> CommandProgress:
        """Ends every engine. `composite`: also from RUNNING, by way of a pause. Raises as `run`."""
        return await self.run(self.order("STOP", owner, timeout_s, composite=composite))

    @contextlib.asynccontextmanager
    async def paused(
        self, mode: str = "keep", *, owner: str | None = None, timeout_s: float = COMMAND_SECONDS_DEFAULT
    ) -> AsyncIterator[CommandProgress]:
        """Holds the fleet paused inside the block. When the pause fails, its hold is released and it raises as `run`."""
        owner = owner or self._me.name
        try:
            yield await self.pause(mode, owner=owner, timeout_s=timeout_s)
        finally:
            with contextlib.suppress(ChannelFault):  # broken by an administrator, or stopped meanwhile
                await self.unpause(owner=owner, timeout_s=timeout_s)

    def order(self, command: str, owner: str, timeout_s: float, **more: object) -> Command:
        """A command under a name of its own, to be given to `run` or `command`."""
        return Command(command, owner, secrets.token_hex(8), timeout_s=timeout_s, **more)  # type: ignore[arg-type]

    async def run(self, command: Command) -> CommandProgress:
        """Its last progress. Raises `ChannelFault` (refused), `CommandFailed` (did not get there), `TimeoutError`."""
        last: CommandProgress | None = None
        async for progress in self.command(command):
            last = progress
        if last is None or not last.ok:
            why = last.message if last else "no progress was heard"
            raise CommandFailed(f"{command.command} failed: {why}", last)
        return last

    async def command(self, command: Command) -> AsyncIterator[CommandProgress]:
        """Progress as it comes; the last one is `done`. Raises `ChannelFault` when refused, `TimeoutError` when no end
        was heard by the command's deadline and a grace (it may still be carried through: ask again by its name)."""
        clock = self._host.clock
        deadline_s = clock.monotonic_s() + command.timeout_s + GRACE_SECONDS
        pause_s, trouble = RECONNECT_SECONDS_MIN, "no connection"
        while (left_s := deadline_s - clock.monotonic_s()) > 0:
            try:
                channel = await self._connect(min(left_s, HELLO_SECONDS_MAX))
                try:
                    async for progress in self._follow(channel, command, deadline_s):
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
            f"the coordinator did not say how {command.command} (owner {command.owner}, id {command.command_id}) ended: {trouble}"
        )

    async def _follow(
        self, channel: Channel, command: Command, deadline_s: float
    ) -> AsyncIterator[CommandProgress]:
        number = await channel.send(command)
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

    async def _connect(self, timeout_s: float) -> Channel:
        return await connect_channel(
            self._host,
            self._address,
            me=self._me,
            role="admin",
            accept=CommandAccepted | CommandProgress | Membership,
            deadline_s=timeout_s,
        )

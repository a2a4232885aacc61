"""A fleet held paused for the length of a block, and let go however the block is left.

    async with fleet.paused() as pause:
        ...                                    every member stood when it was entered
        await pause.update_weights("v7", path)
                                               here the hold is released, and the fleet runs if nobody else holds it

What can go wrong, and what happens then:

* The pause fails, or its waiter is cancelled: the hold may be placed already, so it is released, then the block raises.
* The block raises or is cancelled: the hold is released first, to its end though cancelled again, then that goes on.
* The coordinator dies within: the hold stands in its state and in every member's memory, and nothing is unpaused by its death.
  Commands inside the block, and the release, are sent again until it is back, or until their deadlines: then `HoldLeft`
  says whose hold is still there and how to end it. If the block itself raised, that goes on, with those words as a note.
* The weights are unknown (an update failed): the fleet must not run, so the release is refused. `HoldLeft` again.
* An administrator breaks the hold, or it reaches `hold_seconds`, or the fleet is stopped: there is nothing left to release.
  Whoever must know while it works asks `pause.held()`.
* This process is killed: the hold stays until its `hold_seconds`; without, until somebody breaks it by name.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from interlock.core.errors import ChannelFault, InterlockError
from interlock.core.limits import COMMAND_SECONDS_DEFAULT
from interlock.wire.fleet_messages import CommandProgress, MemberProgress

if TYPE_CHECKING:
    from interlock.fleet.client import FleetClient, OnProgress

Weights = str | Path | Callable[[], "str | Path | Awaitable[str | Path]"]
"""A checkpoint directory as the engines see it, or what writes one and says where: called while the fleet stands."""


class HoldLeft(InterlockError):  # noqa: N818 - says what is, as the others do
    """The block is over and its hold is still in force, or nobody could say. `owner` is whose it is."""

    def __init__(self, owner: str, why: str, hint: str) -> None:
        super().__init__(f"the fleet is still held by {owner!r}: {why}", hint=hint, owner=owner)
        self.owner = owner


class Pause:
    """The fleet, held. `progress` is how it came to stand, member by member."""

    def __init__(self, client: FleetClient, owner: str, progress: CommandProgress) -> None:
        self._client, self.owner, self.progress = client, owner, progress

    @property
    def ok(self) -> bool:
        """Whether every member came to stand."""
        return self.progress.ok

    @property
    def members(self) -> list[MemberProgress]:
        """How each member came to stand."""
        return self.progress.members

    async def held(self) -> bool:
        """Whether this hold is in force, by the coordinator's word now. Raises as `FleetClient.status`."""
        return any(hold.owner == self.owner for hold in (await self._client.status()).holds)

    async def update_weights(
        self,
        version: str,
        weights: Weights,
        *,
        kv: str = "recompute",
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """`FleetClient.update_weights` by this hold's owner. `weights` may be a function (or coroutine function) that writes
        the checkpoint and returns its directory; what it raises leaves the weights as they were."""
        where = weights() if callable(weights) else weights
        if inspect.isawaitable(where):
            where = await where
        return await self._client.update_weights(
            version, where, owner=self.owner, kv=kv, timeout_s=timeout_s, on_progress=on_progress
        )

    async def suspend(
        self, *, timeout_s: float = COMMAND_SECONDS_DEFAULT, on_progress: OnProgress | None = None
    ) -> CommandProgress:
        """Every engine gives its memory back. Raises as `FleetClient.run`; `resume` before the block ends."""
        return await self._client.suspend(owner=self.owner, timeout_s=timeout_s, on_progress=on_progress)

    async def resume(
        self, *, timeout_s: float = COMMAND_SECONDS_DEFAULT, on_progress: OnProgress | None = None
    ) -> CommandProgress:
        """Every engine takes its memory again; the fleet stays paused. Raises as `FleetClient.run`."""
        return await self._client.resume(owner=self.owner, timeout_s=timeout_s, on_progress=on_progress)


class Paused:
    """What `FleetClient.paused` returns: `async with` it once."""

    def __init__(
        self,
        client: FleetClient,
        owner: str,
        *,
        mode: str,
        timeout_s: float,
        hold_seconds: float | None,
        allow_unknown: bool,
        release_s: float,
        on_progress: OnProgress | None,
    ) -> None:
        self._client, self.owner, self._mode = client, owner, mode
        self._timeout_s, self._release_s = timeout_s, release_s
        self._hold_seconds, self._allow_unknown = hold_seconds, allow_unknown
        self._on_progress = on_progress

    async def __aenter__(self) -> Pause:
        """Raises as `FleetClient.run`; the hold is released then."""
        try:
            progress = await self._client.pause(
                self._mode,
                owner=self.owner,
                timeout_s=self._timeout_s,
                hold_seconds=self._hold_seconds,
                allow_unknown=self._allow_unknown,
                on_progress=self._on_progress,
            )
        except ChannelFault:
            raise  # refused: no hold was placed, and one of an earlier block by this name is not ours to end
        except BaseException as error:
            await self._release(error)
            raise
        return Pause(self._client, self.owner, progress)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises `HoldLeft`, and `CommandFailed` when the hold was released but not every member runs; where the block raised,
        both are notes on its exception."""
        await self._release(error)

    async def _release(self, error: BaseException | None) -> None:
        """To its end, though the task be cancelled once more."""
        releasing = asyncio.ensure_future(self._let_go())
        again: asyncio.CancelledError | None = None
        while not releasing.done():
            try:
                await asyncio.wait({releasing})
            except asyncio.CancelledError as cancelled:
                again = cancelled
        problem: BaseException | None
        if releasing.cancelled():  # the loop itself ends
            problem = HoldLeft(self.owner, "its release was cancelled", self._hint)
        else:
            problem = releasing.exception()
        if error is not None and problem is not None:
            error.add_note(str(problem))
        elif error is None and (problem or again) is not None:
            raise problem or again  # type: ignore[misc]

    async def _let_go(self) -> None:
        try:
            async with asyncio.timeout(self._release_s):
                await self._unpause()
        except TimeoutError as late:
            why = f"no coordinator confirmed the release within {self._release_s:.0f} s"
            raise HoldLeft(self.owner, why, self._hint) from late

    async def _unpause(self) -> None:
        try:
            await self._client.unpause(owner=self.owner, timeout_s=self._release_s)
        except ChannelFault as refused:
            fleet = await self._client.status()
            if any(hold.owner == self.owner for hold in fleet.holds):
                raise HoldLeft(self.owner, refused.message, self._hint) from refused
            # Else it was broken, has expired, or went with a fleet that was stopped: nothing is left to release.

    @property
    def _hint(self) -> str:
        return f"once that is mended, `interlock ctl unpause --owner {self.owner}` ends it"

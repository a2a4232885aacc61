"""What a coordinator has decided: kept on disk first, then in force, then told.

One owner of `fleet`, so that this order is kept in one place. Every rule of what is decided stands in `core`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from interlock.core.commands import transition
from interlock.core.fleet_state import (
    Accept,
    FleetEffect,
    FleetEvent,
    FleetState,
    Persist,
    Phase,
    StepDown,
    TellMembers,
)
from interlock.core.identity import Epoch
from interlock.core.targets import State
from interlock.fleet.command_book import CommandBook
from interlock.fleet.coordinator_news import News
from interlock.fleet.coordinator_state import CoordinatorFile, KnownMember, Stored
from interlock.fleet.members import Members
from interlock.wire.fleet_messages import Command


class Decisions:
    """`tell` is called with a target that is in force and kept; `changed` is set with each change that others must see."""

    def __init__(
        self,
        file: CoordinatorFile,
        members: Members,
        news: News,
        version: str,
        changed: asyncio.Event,
        tell: Callable[[], Awaitable[None]],
    ) -> None:
        self._file, self._members, self._news = file, members, news
        self.changed, self._tell = changed, tell
        self._kept_members: list[KnownMember] = []
        """Which the file names: a member that only changes its state is no reason to write it."""
        self.fleet = FleetState(Phase.RECOVERING, Epoch(), State.RUNNING, version)
        self.book = CommandBook()
        """Kept in the same file."""
        self.settled = False
        """Whether the members were judged to stand at the current epoch."""

    @property
    def leads(self) -> bool:
        return self.fleet.phase is Phase.LEADING

    def load(self) -> Stored | None:
        """What the last life kept; its commands and members are taken over. Raises `OSError`: then nothing is known to be lost."""
        stored, why = self._file.load()
        if stored is None:
            self._news.emit("coordinator_without_state", reason=why)
        else:
            self.book = CommandBook(stored.commands)
            self._members.restore(stored.members)
        return stored

    async def decide(self, event: FleetEvent) -> None:
        """Raises `CommandRefused`; `OSError` as `apply`."""
        await self.apply(*transition(self.fleet, event))

    async def apply(
        self, fleet: FleetState, effects: tuple[FleetEffect, ...], ask: Command | None = None
    ) -> None:
        """Raises `OSError` when it cannot be kept; then nothing has changed and nobody was told."""
        if any(isinstance(effect, Persist) for effect in effects):
            self._write(fleet)
        if fleet.epoch != self.fleet.epoch:
            self.settled = False
        before, self.fleet = self.fleet, fleet
        self._news.decided(before, fleet, ask)
        for effect in effects:
            match effect:
                case TellMembers(target):
                    self._news.emit("target", epoch=target.epoch, state=target.state, mode=target.mode)
                    self.changed.set()
                    await self._tell()
                case StepDown(epoch):
                    self._news.emit("coordinator_deposed", epoch=epoch)
                    self.changed.set()
                case Persist() | Accept():
                    pass  # kept above; answered where the command was asked

    def save(self) -> None:
        """The book has changed. Raises `OSError`."""
        self._write(self.fleet)

    def save_members(self) -> None:
        """Where others are known than the file names. Raises `OSError`."""
        if self._members.known() != self._kept_members:
            self._write(self.fleet)

    def _write(self, fleet: FleetState) -> None:
        members = self._members.known()
        self._file.save(fleet, self.book.records(), members)
        self._kept_members = members

"""What one scope of the snapshot store is: its directories, what is being written, what is durable. The rules are core/snapshots."""

from __future__ import annotations

import hashlib
from enum import StrEnum

import msgspec


class Phase(StrEnum):
    """Where a request's scope stands; in three of them its lock is held."""

    EMPTY = "EMPTY"
    """No directory under the live root belongs to this scope."""
    MAKING = "MAKING"
    """The scope's lock is held: its directory is being made and opened."""
    LIVE = "LIVE"
    MOVING = "MOVING"
    """The scope's lock is held: an erased directory is being renamed to the trash."""
    PROMOTING = "PROMOTING"
    """The scope's lock is held: a durable file is being renamed into the store."""
    CLOSED = "CLOSED"


def scope_name(request: str) -> str:
    """The name of a request's scope: no request id is ever part of a path (oMLX took it as a directory name)."""
    return hashlib.blake2b(request.encode(), digest_size=16).hexdigest()


class Directory(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A directory's name, used once: made by this incarnation of the store for this epoch of the scope."""

    scope: str
    incarnation: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.scope}.{self.incarnation}.{self.epoch}"


class Item(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One snapshot of a scope at a position (tokens). Its number, not its position, says which save it was."""

    number: int
    position: int
    bytes: int
    directory: Directory
    deadline_s: float
    overdue: bool = False
    """Reported failed while its writer was still at it; what the writer says later makes nothing readable."""

    @property
    def file(self) -> str:
        """Its file name in the scope's directory: no part of it comes from outside."""
        return f"{self.position}.{self.number}"


class Folder(msgspec.Struct, frozen=True, array_like=True):
    """One directory and what it costs on disk: reserved at acceptance, given back when nothing of it is left."""

    name: Directory
    root: int
    """It stands, or stood, in live/<root>."""
    items: int = 0
    bytes: int = 0
    is_open: bool = True
    """Its descriptor, which is closed when nobody works through it any more."""
    trashed: bool = False
    reaped: bool = False


class Load(msgspec.Struct, frozen=True, array_like=True):
    """A read under way; it holds the descriptor of the directory it began in."""

    number: int
    item: Item


class Scope(msgspec.Struct, frozen=True):
    """The snapshots of one request in one life of the store. Begin it with `Scope(name, incarnation, root, epoch)`.

    `epoch` is raised by each erasure. Whoever drops a scope and meets its name again gives the new one a higher epoch than
    the old one had (core/snapshot_book does), so that no directory's name comes twice.
    """

    name: str
    incarnation: int
    root: int
    epoch: int = 0
    phase: Phase = Phase.EMPTY
    directory: Directory | None = None
    """The current one: new files go there, and whatever lies in another is erased."""
    durable: tuple[Item, ...] = ()
    writing: tuple[Item, ...] = ()
    """All that a writer may still have, of erased epochs too: their memory is not free yet."""
    folders: tuple[Folder, ...] = ()
    loads: tuple[Load, ...] = ()
    next_item: int = 0
    under_lock: Item | None = None
    """MAKING: what is to be accepted. PROMOTING: what is being promoted."""

    @property
    def is_forgettable(self) -> bool:
        """Nothing of it is in memory, on disk or under way."""
        return self.phase in (Phase.EMPTY, Phase.CLOSED) and not (self.folders or self.writing or self.loads)

    def staged_at(self, position: int) -> Item | None:
        """What was accepted at this position and is not yet durable nor failed."""
        for item in self.writing:
            if item.position == position and item.directory == self.directory and not item.overdue:
                return item
        return None

    def durable_at(self, position: int) -> Item | None:
        """What is on disk for that position, None: nothing."""
        for item in self.durable:
            if item.position == position:
                return item
        return None

    def is_used(self, directory: Directory) -> bool:
        """Whether somebody still works through this directory's descriptor."""
        return (
            (directory == self.directory and self.phase is not Phase.CLOSED)
            or any(item.directory == directory for item in self.writing)
            or any(load.item.directory == directory for load in self.loads)
        )

    def folder_of(self, directory: Directory) -> Folder:
        """Raises `StopIteration` for a directory that is not this scope's."""
        return next(folder for folder in self.folders if folder.name == directory)

    def with_folder(self, folder: Folder) -> Scope:
        """The scope with this folder in the place of the one of the same name."""
        folders = tuple(folder if each.name == folder.name else each for each in self.folders)
        return msgspec.structs.replace(self, folders=folders)

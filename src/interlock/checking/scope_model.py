"""One scope of the snapshot store with everything around it: its owner, its directories as the kernel has them, writers, a loader.

A part of worlds/snapshots, which puts several of these side by side. A directory is an object: its name is where it stands, a
descriptor leads to it wherever it went. The content of a file is the life of the id in which it was saved, and no reader,
directory under the live root or pack may have it from a life that is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from interlock.checking.explorer import Broken
from interlock.checking.parts import Machine
from interlock.core.errors import ProtocolError
from interlock.core.snapshot_events import (
    Accepted,
    CallDone,
    CallFailed,
    Charged,
    CloseDirectory,
    Durable,
    Effect,
    Erase,
    Event,
    Failed,
    Freed,
    LoadAsked,
    Loaded,
    LoadRead,
    Missed,
    Promote,
    Promoted,
    ReadFile,
    ReadStaged,
    Reaped,
    RootMoved,
    Save,
    WriteEnded,
)
from interlock.core.snapshot_state import Directory, Folder, Item, Phase, Scope

LIVE, TRASH, GONE = "live", "trash", "gone"
LOCKED = (Phase.MAKING, Phase.MOVING, Phase.PROMOTING)
NOTHING, ACCEPTED, DURABLE, LOST, ELSEWHERE = "nothing", "accepted", "durable", "failed", "promoted"
"""What the owner was told last of its state in this life of the id."""
FAULTS = ("failed writes", "failed calls", "crashes", "erase_alls")
WRITE, CALL, CRASH, ERASE_ALL = range(len(FAULTS))


class Dir(NamedTuple):
    """A directory as the kernel has it. `files` are (name, life of the id in which it was saved)."""

    name: Directory
    place: str
    root: int
    is_open: bool
    files: tuple[tuple[str, int], ...]


class Task(NamedTuple):
    """What a writer has: the bytes of one life. `result`: whether they are on disk; None until it tried."""

    item: Item
    life: int
    result: bool | None


class Reading(NamedTuple):
    """`content`: what was read: a life, or None for nothing. `is_read`: it was tried. `asked`: in which life."""

    item: Item
    is_read: bool
    content: int | None
    asked: int


class Local(NamedTuple):
    """One scope and what is its own."""

    core: int
    disk: tuple[Dir, ...] = ()
    tasks: tuple[Task, ...] = ()
    load: Reading | None = None
    life: int = 0
    """In which life its id is."""
    told: str = NOTHING
    used: tuple[int, int, int] = (0, 0, 0)
    """Items, memory bytes and disk bytes charged; every item has one byte."""


class Common(NamedTuple):
    """What all scopes share. `left`: what is left of the budget, in the order of FAULTS."""

    root: int
    incarnation: int
    left: tuple[int, ...]

    def spent(self, fault: int) -> Common:
        left = (*self.left[:fault], self.left[fault] - 1, *self.left[fault + 1 :])
        return self._replace(left=left)


Step = tuple[tuple[Any, ...], Local | Broken, Common]


class ScopeModel:
    """Scope `name`, whose id has `lives` lives. Actions are tuples that begin with a word and the name.

    `reads`: there are loaders, and the owner may promote.
    """

    def __init__(self, name: str, lives: int, reads: bool, machine: Machine[Any, Any, Any]) -> None:
        self.name, self.lives, self.reads, self.machine = name, lives, reads, machine

    def start(self) -> Local:
        return Local(self.machine.number(Scope(self.name, 1, 0)))

    def core(self, local: Local) -> Scope:
        core: Scope = self.machine[local.core]
        return core

    # --- what may happen -----------------------------------------------------------------------------------------

    def steps(self, local: Local, common: Common) -> Iterable[Step]:
        core = self.core(local)
        if core.phase in LOCKED:
            yield from self._call(local, common, core)
        else:
            for action, after in self._own(local, common, core):
                yield action, after, common
            for action, after in self._reap(local, core):
                yield action, after, common
        yield from self._write(local, common, core)
        for action, after in self._read(local, core):
            yield action, after, common

    def _own(self, local: Local, common: Common, core: Scope) -> Iterable[tuple[Any, Local | Broken]]:
        """What the owner may ask for, once the scope's lock is free, and what erase_all tells."""
        name = self.name
        if local.life < self.lives:
            if local.told in (NOTHING, LOST):
                yield ("save", name, local.life), self.tell(local, Save(0, 1, 1.0))
            over = local._replace(life=local.life + 1, told=NOTHING)
            yield ("erase", name, local.life), self.tell(over, Erase())
        elif core.phase is Phase.EMPTY and any(not folder.trashed for folder in core.folders):
            yield ("erase", name, local.life), self.tell(local, Erase())
        if local.told == DURABLE and self.reads:
            yield ("promote", name), self.tell(local, Promote(0))
        if self.reads and local.load is None and local.told in (ACCEPTED, DURABLE):
            yield ("load", name), self.tell(local, LoadAsked(0, 0))
        if core.root < common.root:
            over = local
            if core.directory is not None and core.folder_of(core.directory).root < common.root:
                over = local._replace(life=min(local.life + 1, self.lives), told=NOTHING)
            yield ("root moved", name), self.tell(over, RootMoved(common.root))

    def _call(self, local: Local, common: Common, core: Scope) -> Iterable[Step]:
        """The metadata call under the lock is made, or fails."""
        if core.phase is Phase.MAKING:
            assert core.under_lock is not None
            done = self._make_directory(local, core.under_lock.directory, core.root)
        elif core.phase is Phase.MOVING:
            done = self.trash(local, next(each for each in core.folders if not each.trashed).name)
        else:
            assert core.under_lock is not None
            done = self._promote(local, core.under_lock)
        after = done if isinstance(done, Broken) else self.tell(done, CallDone())
        yield ("call", self.name, core.phase), after, common
        if common.left[CALL]:
            failed = self.tell(local, CallFailed("EIO"))
            yield ("call fails", self.name, core.phase), failed, common.spent(CALL)

    def _read(self, local: Local, core: Scope) -> Iterable[tuple[Any, Local | Broken]]:
        load = local.load
        if load is None:
            return
        if load.is_read:
            if core.phase not in LOCKED:
                yield ("check", self.name), self.tell(local, LoadRead(0, load.content is not None))
            return
        found = dir_of(local, load.item.directory)
        if found is None or not found.is_open:
            closed = Broken(f"a load reads through a closed descriptor of {load.item.directory}")
            yield ("read", self.name), closed
            return
        content = dict(found.files).get(load.item.file)
        yield ("read", self.name), local._replace(load=load._replace(is_read=True, content=content))

    def _write(self, local: Local, common: Common, core: Scope) -> Iterable[Step]:
        for at, task in enumerate(local.tasks):
            rest = (*local.tasks[:at], *local.tasks[at + 1 :])
            if task.result is None:
                yield ("write", self.name, task.life), self.land(local, task, rest), common
                if common.left[WRITE]:
                    failed = local._replace(tasks=tuple(sorted((*rest, task._replace(result=False)))))
                    yield ("write fails", self.name, task.life), failed, common.spent(WRITE)
            elif core.phase not in LOCKED:
                ended = WriteEnded(task.item.number, task.result, "EIO")
                yield (
                    ("ended", self.name, task.life),
                    self.tell(local._replace(tasks=rest), ended),
                    common,
                )

    def _reap(self, local: Local, core: Scope) -> Iterable[tuple[Any, Local | Broken]]:
        for each in local.disk:
            if each.place != TRASH:
                continue
            after = _changed(local, each, each._replace(place=GONE, files=()))
            if any(folder.name == each.name and folder.trashed for folder in core.folders):
                yield ("reap", self.name, each.name), self.tell(after, Reaped(each.name))
            else:
                yield ("reap", self.name, each.name), after

    def root_renamed(self, local: Local, root: int) -> Local:
        """erase_all's last step: what is under an older root goes to the trash with it."""
        disk = (
            each._replace(place=TRASH) if each.place == LIVE and each.root < root else each
            for each in local.disk
        )
        return local._replace(disk=tuple(disk))

    def crashed(self, local: Local, common: Common) -> Local | Broken:
        """All memory is gone. `common` is that of the next life, which adopts what the owner names; the rest is trash.

        A power cut may undo renames to the trash: the directory is under its live root again, is not named by its owner, and
        goes to the trash with that root before anything is served. So it ends as here.
        """
        old = self.core(local)
        name = old.directory if local.told in (ACCEPTED, DURABLE) else None
        core = Scope(self.name, common.incarnation, common.root)
        found: list[Dir] = []
        told = ELSEWHERE if local.told == ELSEWHERE else NOTHING
        used = 0
        for each in local.disk:
            if each.name == name and each.place == LIVE:
                items = [_item(file, each.name) for file, _ in each.files]
                core = _adopted(core, each.name, items)
                found.append(each._replace(root=common.root, is_open=True))
                used, told = len(items), DURABLE if items else NOTHING
            elif each.place != GONE:
                found.append(each._replace(place=TRASH, is_open=False))
        if local.told == DURABLE and told != DURABLE:
            return Broken(f"what {self.name} was told to be durable is gone after the crash")
        return Local(
            self.machine.number(core), tuple(found), life=local.life, told=told, used=(used, 0, used)
        )

    # --- the disk ------------------------------------------------------------------------------------------------

    def _make_directory(self, local: Local, name: Directory, root: int) -> Local | Broken:
        if dir_of(local, name) is not None:
            return Broken(f"directory {name} is made a second time")
        return local._replace(disk=(*local.disk, Dir(name, LIVE, root, True, ())))

    def trash(self, local: Local, name: Directory) -> Local | Broken:
        found = dir_of(local, name)
        assert found is not None
        return _changed(local, found, found._replace(place=TRASH))

    def _promote(self, local: Local, item: Item) -> Local | Broken:
        found = dir_of(local, item.directory)
        assert found is not None
        content = dict(found.files).get(item.file)
        if content != local.life:
            return Broken(f"life {content} of {self.name} is promoted in its life {local.life}")
        return _changed(
            local, found, found._replace(files=tuple(f for f in found.files if f[0] != item.file))
        )

    def land(self, local: Local, task: Task, rest: tuple[Task, ...]) -> Local | Broken:
        """A writer writes through the directory's descriptor; in a removed directory nothing can be made."""
        found = dir_of(local, task.item.directory)
        if found is None or not found.is_open:
            return Broken(f"a writer writes through a closed descriptor of {task.item.directory}")
        is_written = found.place != GONE
        after = local._replace(tasks=tuple(sorted((*rest, task._replace(result=is_written)))))
        if not is_written:
            return after
        files = tuple(sorted((*found.files, (task.item.file, task.life))))
        return _changed(after, found, found._replace(files=files))

    # --- the store -----------------------------------------------------------------------------------------------

    def tell(self, local: Local, event: Event) -> Local | Broken:
        """The scope hears `event`, and what follows is done."""
        try:
            number, effects = self.machine.step(local.core, event)
        except (AssertionError, ProtocolError) as error:
            return Broken(f"the store raised {type(error).__name__}: {error}")
        core: Scope = self.machine[number]
        if core.is_forgettable:  # Dropped; the next of its name begins above it, as in core/snapshot_book.
            epoch = core.epoch if not core.next_item else core.epoch + 1
            number = self.machine.number(Scope(core.name, core.incarnation, core.root, epoch))
        after = local._replace(core=number)
        for effect in effects:
            done = self._do(after, effect)
            if isinstance(done, Broken):
                return done
            after = done
        return after

    def _do(self, local: Local, effect: Effect) -> Local | Broken:
        match effect:
            case Charged(bytes):
                return _charged(local, 1, bytes, bytes)
            case Freed(items, memory_bytes, disk_bytes):
                return _charged(local, -items, -memory_bytes, -disk_bytes)
            case Accepted(item, True):
                task = Task(item, local.life, None)
                return local._replace(told=ACCEPTED, tasks=tuple(sorted((*local.tasks, task))))
            case Durable():
                return local._replace(told=DURABLE)
            case Failed():
                return local._replace(told=LOST)
            case Promoted():
                return local._replace(told=ELSEWHERE)
            case ReadFile(load):
                return local._replace(load=Reading(load.item, False, None, local.life))
            case ReadStaged(load):
                life = next(task.life for task in local.tasks if task.item == load.item)
                return local._replace(load=Reading(load.item, True, life, local.life))
            case Loaded() | Missed():
                return self._returned(local, effect)
            case CloseDirectory(directory):
                found = dir_of(local, directory)
                if found is None or not found.is_open:
                    return Broken(f"the descriptor of {directory} is closed twice")
                return _changed(local, found, found._replace(is_open=False))
        return local

    def _returned(self, local: Local, effect: Loaded | Missed) -> Local | Broken:
        load = local.load
        if isinstance(effect, Missed):
            is_owed = load is None or load.asked == local.life
            if is_owed and local.told in (ACCEPTED, DURABLE):
                return Broken(f"{self.name} misses what was accepted and neither failed nor was erased")
        elif load is None or load.content != local.life:
            content = None if load is None else load.content
            return Broken(f"a load of {self.name} in life {local.life} of its id returns life {content}")
        return local._replace(load=None)

    def reduced(self, local: Local) -> Local:
        """Without what can change nothing any more: which bytes lie in the trash while nobody reads there, and directories of an
        earlier life of the process in the trash, which nobody knows."""
        core = self.core(local)
        known = {folder.name for folder in core.folders}
        kept = {core.directory, None if local.load is None else local.load.item.directory}
        disk = tuple(
            each._replace(files=()) if each.place == TRASH and each.name not in kept else each
            for each in local.disk
            if each.place != TRASH or each.name in known
        )
        return local._replace(disk=disk)

    # --- what must hold ------------------------------------------------------------------------------------------

    def wrong(self, local: Local, common: Common) -> str | None:
        core = self.core(local)
        known = {folder.name for folder in core.folders}
        stranded = {f.name for f in core.folders if not f.trashed and f.name != core.directory}
        files = sum(len(each.files) for each in local.disk if each.name in known)
        for each in local.disk:
            is_settled = core.phase is not Phase.MOVING and each.root == common.root
            if each.place == LIVE and is_settled and each.name not in stranded:
                for _, life in each.files:
                    if life < local.life:
                        return f"life {life} of {self.name} was erased, and its file is under the live root"
        open_ = {each.name for each in local.disk if each.is_open}
        for user in (*local.tasks, *(() if local.load is None else (local.load,))):
            if user.item.directory not in open_:
                return f"somebody works through the descriptor of {user.item.directory}, which was closed"
        if min(local.used) < 0 or local.used[2] < files or local.used[1] < len(local.tasks):
            return f"charged {local.used}: but there are {len(local.tasks)} items in memory, {files} on disk"
        if local.told == DURABLE and core.phase is not Phase.PROMOTING:
            here = None if core.directory is None else dir_of(local, core.directory)
            if here is None or here.place != LIVE or not here.files:
                return f"what {self.name} was told to be durable is not on disk"
        return None

    def is_quiet(self, local: Local, common: Common) -> bool:
        """Nothing is under way, the trash is empty, and what is charged is what is kept."""
        core = self.core(local)
        kept = sum(len(each.files) for each in local.disk)
        return (
            not local.tasks
            and local.load is None
            and all(each.place == LIVE for each in local.disk)
            and core.phase not in LOCKED
            and core.root == common.root
            and local.used == (kept, 0, kept)
        )


def dir_of(local: Local, name: Directory) -> Dir | None:
    return next((each for each in local.disk if each.name == name), None)


def _charged(local: Local, items: int, memory_bytes: int, disk_bytes: int) -> Local:
    used = local.used
    return local._replace(used=(used[0] + items, used[1] + memory_bytes, used[2] + disk_bytes))


def _changed(local: Local, old: Dir, new: Dir) -> Local:
    """Of a removed directory that nobody holds open nothing is left."""
    disk: Iterator[Dir] = (new if each is old else each for each in local.disk)
    return local._replace(disk=tuple(each for each in disk if each.place != GONE or each.is_open))


def _item(file: str, directory: Directory) -> Item:
    position, number = map(int, file.split("."))
    return Item(number, position, 1, directory, 1.0)


def _adopted(core: Scope, directory: Directory, items: Sequence[Item]) -> Scope:
    """As core/snapshot_book adopts."""
    latest = {item.position: item for item in sorted(items)}
    return msgspec.structs.replace(
        core,
        epoch=directory.epoch,
        phase=Phase.LIVE,
        directory=directory,
        durable=tuple(sorted(latest.values())),
        folders=(Folder(directory, core.root, len(items), len(items)),),
        next_item=1 + max((item.number for item in items), default=-1),
    )

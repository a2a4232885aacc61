"""The beginning of a store's life: the root is ours alone, its incarnation is new, and nothing found is trusted.

Evidence is the lock on the root, which dies with its holder: only who has it sweeps. Of what an earlier life left, the directories
that their owner names are moved under the new root, one by one, by name; all else goes to the trash.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from interlock.core.snapshot_book import Amount, SnapshotBook
from interlock.core.snapshot_state import Directory, Item, scope_name
from interlock.host.trees import Folder, ThreadHost, Tree
from interlock.snapshots.desk import KEPT, LIVE, TRASH

_INCARNATION = "incarnation"


class Claim(msgspec.Struct, frozen=True):
    """An owner's word that it still wants a request's snapshots; `SnapshotStore.claim` gives it, a later life takes it."""

    request: str
    incarnation: int
    epoch: int


class Opened(msgspec.Struct, frozen=True, eq=False):
    """A tree that is ours, and what was found in it."""

    tree: Tree
    book: SnapshotBook
    found: dict[str, tuple[int, int]]
    adopted: dict[Directory, Folder]
    requests: dict[str, str]


def open_store(
    host: ThreadHost, path: Path, owner: str, claims: Sequence[Claim], budget: Amount, scopes_max: int
) -> Opened:
    """Raises `DirectoryBusy` naming who has it, `PermissionError`, `OSError`."""
    tree = host.open_tree(path, owner)
    try:
        for name in (LIVE, TRASH, KEPT):
            tree.make_folder(name)
        incarnation = _next_incarnation(host, tree)
        old = [name for name in tree.folders(LIVE) if name.isdecimal()]
        root = max((int(name) for name in old), default=-1) + 1
        tree.make_folder(f"{LIVE}/{root}")
        book = SnapshotBook(incarnation, root=root, budget=budget, scopes_max=scopes_max)
        adopted, requests = _adopt(tree, book, old, claims)
        for name in (f"{LIVE}/{root}", LIVE, "."):  # what is adopted stands before its old root goes
            tree.sync_folder(name)
        for name in [each for each in tree.folders(LIVE) if each != str(root)]:
            tree.rename(f"{LIVE}/{name}", f"{TRASH}/found.{incarnation}.{name}")
        found = {name: tree.usage(f"{TRASH}/{name}") for name in tree.folders(TRASH)}
        for items, size in found.values():
            book.trash_found(items, size)
        return Opened(tree, book, found, adopted, requests)
    except BaseException:
        tree.close()
        raise


def _next_incarnation(host: ThreadHost, tree: Tree) -> int:
    words = (tree.read_small(_INCARNATION) or b"").decode("ascii", "replace").strip()
    stored = int(words) if words.isdecimal() else 0
    incarnation = max(stored + 1, host.wall_ns())
    tree.write_small(_INCARNATION, str(incarnation).encode())
    return incarnation


def _adopt(
    tree: Tree, book: SnapshotBook, old: Sequence[str], claims: Sequence[Claim]
) -> tuple[dict[Directory, Folder], dict[str, str]]:
    where = {name: root for root in old for name in tree.folders(f"{LIVE}/{root}")}
    adopted: dict[Directory, Folder] = {}
    requests: dict[str, str] = {}
    for claim in claims:
        directory = Directory(scope_name(claim.request), claim.incarnation, claim.epoch)
        root = where.get(str(directory))
        if root is None or directory.incarnation >= book.incarnation or directory.scope in requests:
            continue
        tree.rename(f"{LIVE}/{root}/{directory}", f"{LIVE}/{book.root}/{directory}")
        folder = tree.open_folder(f"{LIVE}/{book.root}/{directory}")
        items = []
        for file in folder.list():
            position, _, number = file.name.partition(".")
            if position.isdecimal() and number.isdecimal():
                items.append(Item(int(number), int(position), file.size_bytes, directory, 0.0))
            else:
                folder.remove(file.name)  # a write that was never finished
        book.adopt(directory, items)
        adopted[directory], requests[directory.scope] = folder, claim.request
    return adopted, requests

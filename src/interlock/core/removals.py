"""What was deleted, and how far each node has carried it out: so that what a tenant had stored never comes back.

What can go wrong. A node that was away while a tenant was deleted comes back with his blocks, on its disk or in its memory, and
the others take them up from there. A node dies in the middle of the sweep and finds the rest on its disk when it starts
again. Blocks that a peer named before the deletion arrive after it. A hold with a deadline only moves these to another hour.

Why it cannot here. A removal is named by what it is of and by the node that was asked for it (its *origin*), and has an epoch, which
rises with each removal of that name; every node that hears of it keeps it durably. A node has *done* it when nothing that was
stored before is with it any more, also not on its way; it says so only then. And nobody takes up a block from a peer unless that
peer has done all removals that concern the block and are known *here, at the moment it is published*: whatever order messages,
crashes and reads come in, what a node without them has is a miss to everybody else. Nodes tell each other all they know
whenever they meet, so one that was away learns of it before anything of its is taken, and carries it out.

Epochs of one origin are compared, those of two never: of two removals of one tenant at two nodes neither stands for the other,
for something may have been stored between them.

Nothing is ever forgotten, for a node may be away for years; so a node that remembers `kept_max` removals refuses the next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

import msgspec

from interlock.core.errors import LocalProtocolError
from interlock.core.limits import (
    NAME_CHARS_MAX,
    PREFIX_CHARS_MAX,
    REMOVALS_KEPT_MAX,
    TENANT_CHARS_MAX,
)


class What(msgspec.Struct, frozen=True, array_like=True):
    """The blocks of a tenant, those whose key begins with these hexadecimal digits, or those that both are said of."""

    tenant: str | None
    prefix: str

    def concerns(self, key: bytes, tenant: str) -> bool:
        """Whether this is said of the block `key` of `tenant`."""
        if self.tenant is not None and self.tenant != tenant:
            return False
        return not self.prefix or key.hex().startswith(self.prefix)


EVERYTHING = What(None, "")
Name = tuple[What, str]
"""What is removed, and at which node that was said."""


class Removal(msgspec.Struct, frozen=True, array_like=True):
    """As nodes tell each other, and keep it: `done` is true of the node that says it, or keeps it."""

    what: What
    origin: str
    epoch: int
    done: bool = False

    @property
    def name(self) -> Name:
        """Of two removals of one name the higher epoch counts."""
        return self.what, self.origin

    def __post_init__(self) -> None:
        """Raises `ValueError` for what no node would say: it may come from outside."""
        prefix = self.what.prefix
        if self.epoch <= 0 or len(self.what.tenant or "") > TENANT_CHARS_MAX:
            raise ValueError(
                f"a removal has a positive epoch and a tenant of at most {TENANT_CHARS_MAX} characters"
            )
        if not 0 < len(self.origin) <= NAME_CHARS_MAX:
            raise ValueError(f"a removal's origin is a node's name of 1 to {NAME_CHARS_MAX} characters")
        if len(prefix) > PREFIX_CHARS_MAX or set(prefix) - set("0123456789abcdef"):
            raise ValueError(f"a key begins with up to {PREFIX_CHARS_MAX} digits of 0 to 9 and a to f")


class RemovalBook:
    """Every removal that one node knows, the newest of each name."""

    def __init__(self, known: Iterable[Removal] = (), *, kept_max: int = REMOVALS_KEPT_MAX) -> None:
        """`known`: as an earlier life of the node kept it."""
        self._kept_max = kept_max
        self._removals: OrderedDict[Name, tuple[int, Removal]] = OrderedDict()
        """With the number of their last change, in that order."""
        self._by_what: dict[What, set[Name]] = {}
        self._lengths: dict[str | None, set[int]] = {}
        """Of the prefixes that are said of a tenant: a block is looked up by its own prefixes, not compared with all removals."""
        self.number = 0
        """Of the last change in this life."""
        for removal in known:
            self._put(removal)

    def __len__(self) -> int:
        return len(self._removals)

    def __iter__(self) -> Iterator[Removal]:
        return iter([removal for _, removal in self._removals.values()])

    def get(self, name: Name) -> Removal | None:
        """The newest removal of that name."""
        known = self._removals.get(name)
        return None if known is None else known[1]

    # --- what happens ----------------------------------------------------------------------------------------------

    def begin(self, what: What, origin: str, at_least: int) -> Removal:
        """A new removal, said at this node. Its epoch is `at_least` that, and above all of this origin that are known.

        Raises `LocalProtocolError` when there is no room for it.
        """
        epoch = max([at_least, *(known.epoch + 1 for known in self if known.origin == origin)])
        removal = Removal(what, origin, epoch)
        self._put(removal)
        return removal

    def heard(self, said: Removal) -> bool:
        """A peer knows of it. True when it is news: it has to be carried out here, too. Raises `LocalProtocolError` as `begin`."""
        known = self.get(said.name)
        if known is not None and said.epoch <= known.epoch:
            return False
        self._put(Removal(said.what, said.origin, said.epoch))
        return True

    def done(self, removal: Removal) -> bool:
        """Nothing that was stored before it is here any more. False when a newer one has its name: that one is not done."""
        known = self.get(removal.name)
        if known is None or known.epoch != removal.epoch:
            return False
        self._mark(known, done=True)
        return True

    def undo(self) -> None:
        """Nobody knows what is here: every removal has to be carried out again."""
        for removal in self:
            self._mark(removal, done=False)

    def _mark(self, removal: Removal, *, done: bool) -> None:
        """No news for others: what is done here they hear with the blocks."""
        number, _ = self._removals[removal.name]
        self._removals[removal.name] = number, msgspec.structs.replace(removal, done=done)

    # --- questions -------------------------------------------------------------------------------------------------

    def pending(self) -> list[Removal]:
        """What is not done yet, the oldest change first."""
        return [removal for removal in self if not removal.done]

    def holds(self, key: bytes, tenant: str) -> bool:
        """Whether a removal that is not done concerns this block: what is on the disk of it does not come up."""
        return any(not removal.done for removal in self._concerning(key, tenant))

    def done_for(self, blocks: Iterable[tuple[bytes, str]]) -> list[Removal]:
        """The removals, done here, that concern any of these blocks (key, tenant): what a peer needs to hear with them."""
        if not self._removals:
            return []
        found = {
            removal.name: removal
            for key, tenant in blocks
            for removal in self._concerning(key, tenant)
            if removal.done
        }
        return list(found.values())

    def admits(self, key: bytes, tenant: str, said: Iterable[Removal]) -> bool:
        """Whether this block of a peer may be published here now; `said`: what the peer had done when it named the block."""
        needed = self._concerning(key, tenant)
        if not needed:
            return True
        there = {removal.name: removal.epoch for removal in said if removal.done}
        return all(there.get(removal.name, 0) >= removal.epoch for removal in needed)

    def page(self, after: int, limit: int) -> tuple[list[Removal], int]:
        """At most `limit` of what changed after number `after`, oldest first; and the number to go on from."""
        found: list[tuple[int, Removal]] = []
        for entry in reversed(self._removals.values()):
            if entry[0] <= after:
                break
            found.append(entry)
        chosen = found[::-1][:limit]
        return [removal for _, removal in chosen], chosen[-1][0] if chosen else self.number

    # --- inside ----------------------------------------------------------------------------------------------------

    def _concerning(self, key: bytes, tenant: str) -> list[Removal]:
        if not self._removals:
            return []
        digits = key.hex()
        asked = [What(of, digits[:length]) for of in (tenant, None) for length in self._lengths.get(of, ())]
        return [self._removals[name][1] for what in asked for name in self._by_what.get(what, ())]

    def _put(self, removal: Removal) -> None:
        name = removal.name
        if name not in self._removals and len(self._removals) >= self._kept_max:
            raise LocalProtocolError(
                f"{self._kept_max} removals are remembered here, and none of them can be forgotten: a node that is away may have "
                "what they are of",
                hint="stop all nodes, empty their disks and remove their files of removals; then nothing can come back",
            )
        self.number += 1
        self._removals[name] = self.number, removal
        self._removals.move_to_end(name)
        self._by_what.setdefault(removal.what, set()).add(name)
        self._lengths.setdefault(removal.what.tenant, set()).add(len(removal.what.prefix))

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the two tables differ, or the bound is not kept."""
        assert {name for names in self._by_what.values() for name in names} == set(self._removals)
        assert all(len(what.prefix) in self._lengths[what.tenant] for what in self._by_what)
        assert len(self._removals) <= self._kept_max

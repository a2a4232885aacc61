"""What was removed stays removed: by the rule, over nodes that are away, cut off, and die in the middle."""

from __future__ import annotations

import random

import pytest

from interlock.core.errors import LocalProtocolError
from interlock.core.removals import EVERYTHING, Removal, RemovalBook, What

KEY = bytes.fromhex("ab") * 32
ANN = What("ann", "")


def test_what_a_peer_had_not_done_when_it_named_a_block_is_not_taken_up() -> None:
    book = RemovalBook()
    assert book.admits(KEY, "ann", [])
    removal = book.begin(ANN, "here", 5)
    done = Removal(ANN, "here", 5, done=True)
    assert not book.admits(KEY, "ann", [])
    assert not book.admits(KEY, "ann", [removal]), "it knows of it, and has not done it"
    assert not book.admits(KEY, "ann", [Removal(ANN, "here", 4, done=True)]), "it has done an older one"
    assert not book.admits(KEY, "ann", [Removal(ANN, "there", 9, done=True)]), "it has done another's"
    assert book.admits(KEY, "ann", [done])
    assert book.admits(KEY, "bob", [])


def test_epochs_of_one_origin_rise_also_when_the_clock_steps_back() -> None:
    book = RemovalBook()
    first = book.begin(ANN, "here", 1000)
    again = book.begin(What("bob", ""), "here", 7)
    assert first.epoch == 1000
    assert again.epoch == 1001
    assert book.begin(ANN, "here", 7).epoch == 1002


def test_removals_of_two_nodes_do_not_stand_for_each_other() -> None:
    book = RemovalBook()
    book.done(book.begin(ANN, "here", 1000))
    assert book.heard(Removal(ANN, "there", 10)), "its clock is behind, and it may have come later"
    assert [removal.origin for removal in book.pending()] == ["there"]


def test_what_is_known_is_no_news_and_what_became_newer_meanwhile_is_not_done() -> None:
    book = RemovalBook()
    one = book.begin(ANN, "here", 1)
    assert not book.heard(one)
    two = book.begin(ANN, "here", 2)
    assert not book.done(one)
    assert book.holds(KEY, "ann")
    assert book.done(two)
    assert not book.holds(KEY, "ann")
    assert book.done_for([(KEY, "ann"), (KEY, "bob")]) == [Removal(ANN, "here", 2, done=True)]
    book.undo()
    assert book.pending() == [two]


def test_a_removal_concerns_what_it_names_and_nothing_else() -> None:
    assert What("ann", "abab").concerns(KEY, "ann")
    assert not What("ann", "aa").concerns(KEY, "ann")
    assert not What("ann", "").concerns(KEY, "")
    assert What("", "").concerns(KEY, "")
    assert What(None, "ab").concerns(KEY, "whoever")
    assert EVERYTHING.concerns(KEY, "whoever")


def test_pages_tell_each_change_once_and_in_order() -> None:
    book = RemovalBook()
    said = [book.begin(What(f"t{n}", ""), "here", n + 1) for n in range(7)]
    heard: list[Removal] = []
    after = 0
    for _ in range(3):
        page, after = book.page(after, 3)
        heard += page
    assert heard == said
    assert book.page(after, 3) == ([], book.number)
    book.done(said[0])
    assert book.page(after, 3)[0] == [], "who did what is told with blocks alone"
    newer = book.begin(What("t0", ""), "here", 1)
    assert book.page(after, 3)[0] == [newer]


def test_one_removal_too_many_is_refused_and_none_is_forgotten() -> None:
    book = RemovalBook(kept_max=2)
    for tenant in "ab":
        book.begin(What(tenant, ""), "here", 1)
    with pytest.raises(LocalProtocolError, match="2 removals are remembered"):
        book.begin(What("c", ""), "here", 1)
    with pytest.raises(LocalProtocolError):
        book.heard(Removal(What("c", ""), "there", 1))
    assert book.heard(Removal(What("a", ""), "here", 99))
    book.check_integrity()
    assert len(book) == 2


@pytest.mark.parametrize(
    "words",
    [
        ("ann", "xyz", "n", 1),
        ("ann", "", "n", 0),
        ("a" * 300, "", "n", 1),
        ("a", "", "", 1),
        ("a", "0" * 65, "n", 1),
    ],
)
def test_what_no_node_would_say_is_refused(words: tuple[str, str, str, int]) -> None:
    tenant, prefix, origin, epoch = words
    with pytest.raises(ValueError, match=r"epoch|origin|digits"):
        Removal(What(tenant, prefix), origin, epoch)


# --- nodes that meet, miss each other, and die ------------------------------------------------------------------------


class Node:
    """As much of a store node as the rule asks of: blocks are (key, tenant, when stored), in memory and on a disk."""

    def __init__(self, name: str) -> None:
        self.name, self.up = name, True
        self.book = RemovalBook()
        self.ram: dict[bytes, int] = {}
        self.disk: dict[bytes, int] = {}
        self.named: list[tuple[bytes, int, list[Removal]]] = []
        """Blocks that a peer named and whose bytes are under way."""

    def sweep(self, removal: Removal, *, dies: bool) -> None:
        if not removal.what.tenant:
            return
        self.ram.clear()
        if dies:  # in the middle: the disk is half swept, and the book says so
            for key in list(self.disk)[: len(self.disk) // 2]:
                del self.disk[key]
            self.die()
            return
        self.disk.clear()
        self.book.done(removal)

    def die(self) -> None:
        self.up = False
        self.ram.clear()
        self.named.clear()


class World:
    """One tenant, three nodes, and an order of events that a seed chooses."""

    def __init__(self, seed: int, *, rule: bool = True) -> None:
        self.rng, self.rule = random.Random(seed), rule
        self.nodes = [Node(name) for name in "abc"]
        self.now = 0
        self.removed_at: dict[tuple[str, int], int] = {}
        """When each removal was said, by origin and epoch."""
        self.taken = 0
        self.wrong: list[str] = []

    def play(self, steps: int) -> None:
        for _ in range(steps):
            self.now += 1
            self.step(self.rng.choice(self.nodes))
            self.check()
        for node in self.nodes:
            node.up = True
        for _ in range(3):
            for node in self.nodes:
                for other in self.nodes:
                    self.meet(node, other)
                for removal in node.book.pending():
                    node.sweep(removal, dies=False)
            self.check()
        last = max(self.removed_at.values(), default=0)
        for node in self.nodes:
            assert not node.book.pending()
            self.wrong += [
                f"{node.name} kept it" for at in [*node.ram.values(), *node.disk.values()] if at < last
            ]

    def step(self, node: Node) -> None:
        choice, rng = self.rng.random(), self.rng
        if not node.up:
            node.up = choice < 0.3
            return
        other = rng.choice([n for n in self.nodes if n is not node])
        if choice < 0.25:
            node.ram[bytes([rng.randrange(40)])] = self.now
        elif choice < 0.35:
            node.disk |= node.ram
        elif choice < 0.45:
            held = {key: at for key, at in node.disk.items() if not node.book.holds(key, "ann")}
            node.ram = held | node.ram
        elif choice < 0.55:  # asks where it is; the bytes arrive whenever they like
            if other.up:
                said = other.book.done_for((key, "ann") for key in other.ram)
                node.named += [(key, at, said) for key, at in other.ram.items()]
        elif choice < 0.79:
            self.arrive(node)
        elif choice < 0.82:
            removal = node.book.begin(ANN, node.name, rng.randrange(1, 50))
            self.removed_at[node.name, removal.epoch] = self.now
            node.sweep(removal, dies=rng.random() < 0.3)
        elif choice < 0.92:
            if other.up:
                self.meet(node, other)
        elif choice < 0.96:
            for removal in node.book.pending():
                if node.up:
                    node.sweep(removal, dies=rng.random() < 0.3)
        else:
            node.die()

    def arrive(self, node: Node) -> None:
        if not node.named:
            return
        key, at, said = node.named.pop(self.rng.choice([-1, self.rng.randrange(len(node.named))]))
        if key not in node.ram and (node.book.admits(key, "ann", said) or not self.rule):
            node.ram[key] = at
            self.taken += 1

    def meet(self, node: Node, other: Node) -> None:
        for removal in node.book.page(0, 100)[0]:
            other.book.heard(removal)
        for removal in other.book.page(0, 100)[0]:
            node.book.heard(removal)

    def check(self) -> None:
        """Where a removal is done, nothing that was stored before it is there, in memory or on the disk."""
        for node in self.nodes:
            done = [self.removed_at[r.origin, r.epoch] for r in node.book if r.done]
            oldest = max(done, default=0)
            found = [at for at in [*node.ram.values(), *node.disk.values()] if at < oldest]
            self.wrong += [f"{node.name} has what was stored at {at} and removed at {oldest}" for at in found]


def test_no_order_of_absences_crashes_and_late_bytes_brings_back_what_was_removed() -> None:
    taken = 0
    for seed in range(400):
        world = World(seed)
        world.play(120)
        assert not world.wrong, (seed, world.wrong)
        taken += world.taken
    assert taken > 500, "blocks did move between nodes"


def test_without_the_rule_the_same_worlds_find_what_came_back() -> None:
    def comes_back(seed: int) -> bool:
        world = World(seed, rule=False)
        world.play(120)
        return bool(world.wrong)

    assert any(comes_back(seed) for seed in range(20))


def test_a_block_is_looked_up_by_its_own_prefixes_and_meets_exactly_what_concerns_it() -> None:
    """Comparing it with each removal took seconds where a node remembers thousands of them."""
    rng = random.Random(3)
    keys = [rng.randbytes(2) for _ in range(40)]
    tenants = ["", "ann", "bob"]
    book = RemovalBook()
    for number in range(300):
        digits = rng.choice(keys).hex()[: rng.randrange(5)]
        book.heard(Removal(What(rng.choice([*tenants, None]), digits), f"n{rng.randrange(3)}", number + 1))
    book.check_integrity()
    for key in keys:
        for tenant in tenants:
            concerning = {removal.name for removal in book if removal.what.concerns(key, tenant)}
            assert concerning
            assert {removal.name for removal in book._concerning(key, tenant)} == concerning
    small = RemovalBook([Removal(What("ann", keys[0].hex()[:2]), "here", 1)])
    assert [small.holds(key, "ann") for key in keys] == [key[0] == keys[0][0] for key in keys]

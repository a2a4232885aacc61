"""The hand's account of bytes holds whatever happens to a pack while its file is being changed."""

from interlock.store.packs.clock import Pack, PackClock
from interlock.testing.sim.disk_lives import live_through


def test_a_pack_that_left_while_its_file_was_changed_is_not_counted_again() -> None:
    """Seed 1000214 of the disk's lives: a hole was punched again while the pack was set aside."""
    clock = PackClock()
    gone, stays = Pack(1, 4096 * 9, 4096 * 9, visited=1), Pack(2, 4096 * 5, 4096 * 5, visited=2)
    clock.add(gone)
    clock.add(stays)
    clock.remove(1)
    clock.resize(gone, 4096)
    assert clock.bytes == stays.bytes
    again = Pack(1, 4096 * 3, 4096 * 3, visited=3)
    clock.add(again)
    clock.resize(gone, 0)
    assert clock.bytes == stays.bytes + again.bytes
    clock.resize(stays, 4096)
    assert (stays.bytes, clock.bytes) == (4096, 4096 * 4)


def test_the_seed_that_found_it_plays_without_a_wrong_account() -> None:
    assert live_through(1000214, 40).wrong == []

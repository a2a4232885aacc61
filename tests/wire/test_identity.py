"""Lives: always newer, on disk before they speak, raised only until somebody accepted them."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.core.errors import LocalProtocolError, StaleError
from interlock.core.limits import PEERS_KNOWN_MAX
from interlock.host.blocking import BlockingHost
from interlock.wire.identity import Identity, KnownPeers, incarnation_in, load_identity, passing_identity

host = BlockingHost()


class SteppedClock:
    """A wall clock that stands where it is put."""

    def __init__(self, wall_ns: int) -> None:
        self.wall = wall_ns

    def wall_ns(self) -> int:
        return self.wall

    def monotonic_s(self) -> float:
        return 0.0

    async def sleep_s(self, seconds: float) -> None:
        raise AssertionError("an identity never waits")


class SteppedHost:
    def __init__(self, wall_ns: int) -> None:
        self.clock = SteppedClock(wall_ns)
        self.files = host.files


def test_each_life_is_above_the_last_though_the_clock_steps_back(tmp_path: Path) -> None:
    lives = [load_identity(SteppedHost(wall), tmp_path, "a").incarnation for wall in (1000, 500, 500, 2000)]
    assert lives == [1000, 1001, 1002, 2000]


def test_a_lost_directory_does_not_bring_an_old_life_back(tmp_path: Path) -> None:
    first = load_identity(host, tmp_path, "a")
    (tmp_path / "identity.json").unlink()
    assert load_identity(host, tmp_path, "a").incarnation > first.incarnation


def test_an_unaccepted_life_rises_above_who_refused_it_and_stores_that_first(tmp_path: Path) -> None:
    identity = load_identity(SteppedHost(10), tmp_path, "a")
    identity.raise_above(5000, by="b")
    assert identity.incarnation == 5001
    assert load_identity(SteppedHost(10), tmp_path, "a").incarnation == 5002


def test_an_accepted_life_never_rises_it_ends_and_its_successor_begins_above(tmp_path: Path) -> None:
    identity = load_identity(SteppedHost(10), tmp_path, "a")
    identity.mark_accepted()
    with pytest.raises(StaleError, match="stop this process") as caught:
        identity.raise_above(5000, by="b")
    assert caught.value.highest == 5000
    assert identity.incarnation == 10
    assert load_identity(SteppedHost(10), tmp_path, "a").incarnation == 5001


def test_a_directory_of_another_name_or_with_garbage_is_refused_in_words(tmp_path: Path) -> None:
    load_identity(host, tmp_path, "a")
    with pytest.raises(LocalProtocolError, match="belongs to a, not to b"):
        load_identity(host, tmp_path, "b")
    (tmp_path / "identity.json").write_bytes(b"\xff{")
    with pytest.raises(LocalProtocolError, match="unreadable"):
        load_identity(host, tmp_path, "a")


def test_a_directory_whose_bits_flipped_is_refused_and_names_no_life(tmp_path: Path) -> None:
    """A flipped digit is valid JSON and another life: nobody may act on it, neither the process nor who tells of its end."""
    known = load_identity(host, tmp_path, "a").incarnation
    file = tmp_path / "identity.json"
    whole = file.read_bytes()
    assert incarnation_in(whole) == known
    at = whole.index(str(known).encode()) + 3
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert incarnation_in(file.read_bytes()) == 0
    with pytest.raises(LocalProtocolError, match=r"unreadable.*checksum"):
        load_identity(host, tmp_path, "a")
    assert incarnation_in(None) == 0


def test_passing_identities_never_meet() -> None:
    assert len({passing_identity(host, "ctl").name for _ in range(100)}) == 100


@pytest.mark.parametrize(("name", "incarnation"), [("", 1), ("x" * 1000, 1), ("a", 0), ("a", -5)])
def test_what_is_no_identity_is_refused(name: str, incarnation: int) -> None:
    with pytest.raises(LocalProtocolError):
        Identity(name, incarnation)


def test_the_highest_life_of_a_name_is_kept_and_lower_ones_refused(known: KnownPeers) -> None:
    assert known.admit("a", 5, b"x", 1) is None
    refusal = known.admit("a", 4, b"y", 2)
    assert refusal is not None
    assert refusal.highest == 5
    assert known.admit("a", 5, b"x", 1) is None, "the same life may come again"
    assert known.admit("a", 6, b"y", 2) is None
    assert known.highest("a") == 6
    assert known.highest("b") == 0


@pytest.mark.parametrize(("life", "pid"), [(b"y", 1), (b"x", 2), (b"", None)])
def test_a_twin_is_refused_by_the_names_of_both(known: KnownPeers, life: bytes, pid: int | None) -> None:
    known.admit("a", 5, b"x", 1)
    refusal = known.admit("a", 5, life, pid)
    assert refusal is not None
    assert refusal.highest == 0, "rising would hide that two claim one name"
    assert "process 1" in refusal.reason
    assert f"process {pid or 'elsewhere'}" in refusal.reason
    assert known.admit("a", 5, b"x", 1) is None


def test_memory_of_peers_is_bounded_and_keeps_those_heard_last(known: KnownPeers) -> None:
    known.admit("first", 5, b"", None)
    for i in range(PEERS_KNOWN_MAX - 1):
        known.admit(f"peer-{i}", 1, b"", None)
    known.admit("first", 5, b"", None)
    known.admit("one more", 1, b"", None)
    assert known.highest("first") == 5
    assert known.highest("peer-0") == 0


def test_a_life_that_cannot_be_stored_is_not_spoken_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = load_identity(SteppedHost(10), tmp_path, "a")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(identity._files, "write_durably", full)
        with pytest.raises(OSError, match="No space"):
            identity.raise_above(5000, by="b")
    assert identity.incarnation == 10, "what is on disk"
    identity.raise_above(5000, by="b")
    assert identity.incarnation == 5001

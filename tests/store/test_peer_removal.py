"""Holds of removals: what they keep away, who lifts them, and that they end by themselves."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.core import limits
from interlock.core.errors import InterlockError
from interlock.store.peer_removal import PeerRemoval, RemovedEverywhere, RemoveHere
from interlock.store.refusal import Refusal
from interlock.wire.store_messages import Done, Remove

KEY = bytes.fromhex("ab") * 32


class Clock:
    now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s


class Rig:
    """One node's part, with scripted peers."""

    def __init__(self, *peers: str) -> None:
        self.clock, self.removed, self.asked = Clock(), list[Remove](), list[tuple[str, Any]]()
        self.deaf = set[str]()
        self.part = PeerRemoval(self.clock, peers, self.ask, self.remove)  # type: ignore[arg-type]

    async def ask(self, peer: str, question: Any, wanted: Any) -> Done:
        assert self.part.holds(KEY, "ann") is isinstance(question, RemoveHere), (
            "a hold begins before, ends after"
        )
        self.asked.append((peer, question))
        if peer in self.deaf:
            raise InterlockError(f"{peer} is away")
        return Done(3)

    async def remove(self, body: Remove) -> int:
        assert self.part.holds(KEY, "ann"), "it is held before it is swept"
        self.removed.append(body)
        return 2


async def test_every_peer_is_asked_and_told_when_it_is_over() -> None:
    rig = Rig("b", "c")
    assert await rig.part.everywhere(Remove("ann")) == Done(8)
    assert rig.removed == [Remove("ann")]
    here, over = RemoveHere("ann", ""), RemovedEverywhere("ann", "")
    assert rig.asked == [("b", here), ("c", here), ("b", over), ("c", over)]
    assert not rig.part.holds(KEY, "ann")


async def test_with_one_peer_away_it_is_named_and_the_hold_stays_until_its_deadline() -> None:
    rig = Rig("b", "c")
    rig.deaf = {"c"}
    assert await rig.part.everywhere(Remove("ann")) == Done(5, ["c"])
    assert len(rig.asked) == 2
    rig.clock.now_s += 2 * limits.PEER_REMOVE_SECONDS_MAX - 1
    assert rig.part.holds(KEY, "ann")
    rig.clock.now_s += 2
    assert not rig.part.holds(KEY, "ann")


async def test_a_hold_concerns_the_tenant_and_the_keys_it_names_and_nothing_else() -> None:
    rig = Rig()
    await rig.part.heard("b", RemoveHere("ann", "abab"))
    assert rig.part.holds(KEY, "ann")
    assert not rig.part.holds(KEY, "bob")
    assert not rig.part.holds(b"\xaa" * 32, "ann")


async def test_whoever_lifts_lifts_his_own_hold_alone() -> None:
    rig = Rig()
    for peer in ("b", "c"):
        assert await rig.part.heard(peer, RemoveHere("ann", "")) == Done(2)
    await rig.part.heard("b", RemovedEverywhere("ann", ""))
    assert rig.part.holds(KEY, "ann")
    await rig.part.heard("c", RemovedEverywhere("ann", ""))
    assert not rig.part.holds(KEY, "ann")


async def test_a_peer_cannot_have_everything_removed_nor_hold_without_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()
    with pytest.raises(Refusal, match="without saying so"):
        await rig.part.heard("b", RemoveHere(None, ""))
    assert not rig.removed
    monkeypatch.setattr(limits, "PEER_REMOVALS_MAX", 1)
    await rig.part.heard("b", RemoveHere("ann", ""))
    await rig.part.heard("b", RemoveHere("ann", ""))
    with pytest.raises(Refusal, match="removals are under way"):
        await rig.part.heard("b", RemoveHere("bob", ""))

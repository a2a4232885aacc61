"""The launcher's word of an end is repeated, and does not claim what is true no more when it is heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from interlock.fleet.ended_lives import EndedLives
from interlock.host.real import RealHost
from interlock.wire.identity import load_identity


class Coordinator:
    """Answers what was said so far with an error, until `up`."""

    def __init__(self) -> None:
        self.up = False
        self.said: asyncio.Queue[tuple[str, int, bool]] = asyncio.Queue()

    async def member_gone(self, name: str, incarnation: int, timeout_s: float, *, again: bool) -> None:
        self.said.put_nowait((name, incarnation, again))
        if not self.up:
            raise ConnectionRefusedError("not yet")


@pytest.fixture
async def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    monkeypatch.setattr("interlock.fleet.ended_lives.AGAIN_SECONDS", 0.005)
    host, coordinator = RealHost(), Coordinator()
    ended = EndedLives(host, coordinator, tmp_path)  # type: ignore[arg-type]
    home = tmp_path / "e0"
    host.files.make_private_dir(home)
    yield ended, coordinator, lambda: load_identity(host, home, "e0").incarnation
    ended.close()
    host.close()


async def test_an_end_is_told_until_it_is_heard_and_says_from_when_on_the_next_life_may_be_there(
    ground: Any,
) -> None:
    ended, coordinator, begin = ground
    ended.next_begins("e0")
    life = begin()
    ended.tell("e0")
    async with asyncio.timeout(10):
        assert await coordinator.said.get() == (await coordinator.said.get()) == ("e0", life, False)
        ended.next_begins("e0")
        begin()
        ended.next_begins("e1")
        while (said := await coordinator.said.get()) == ("e0", life, False):
            """What was said before."""
        assert said == ("e0", life, True)
        coordinator.up = True
        await ended.all_told(10.0)
    assert not ended._tellers


async def test_a_life_that_never_began_is_not_told_of(ground: Any) -> None:
    ended, coordinator, _ = ground
    ended.next_begins("e0")
    ended.tell("e0")
    await ended.all_told(1.0)
    assert coordinator.said.empty()

"""The leader at work over scripted ranks and a clock that the test moves: whom it grants what, when, and whom it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from interlock.core.limits import (
    LOCKSTEP_BEAT_SECONDS,
    LOCKSTEP_FENCE_SECONDS_MAX,
    LOCKSTEP_SECONDS_PER_TOKEN,
    LOCKSTEP_STEP_SECONDS,
)
from interlock.core.lockstep import Fence, Grant, RankReport
from interlock.engines.lockstep.leader import Leader
from interlock.engines.lockstep.words import FenceWord, GrantWord, Said


class HandClock:
    """Moves when the test says so; whoever sleeps is woken when its time has come."""

    def __init__(self) -> None:
        self.now = 100.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def monotonic_s(self) -> float:
        return self.now

    def wall_ns(self) -> int:
        return int(self.now * 1e9)

    async def sleep_s(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now + seconds, future))
        await future

    async def beat(self, count: int = 1) -> None:
        for _ in range(count):
            await self.jump(LOCKSTEP_BEAT_SECONDS)

    async def jump(self, seconds: float) -> None:
        self.now += seconds
        due = [one for one in self._sleepers if one[0] <= self.now + 1e-9]
        self._sleepers = [one for one in self._sleepers if one not in due]
        for _, future in due:
            if not future.done():
                future.set_result(None)
        for _ in range(3):
            await asyncio.sleep(0)


class Table:
    """A leader of two ranks, what it said to each, and how it ended."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.heard: list[list[Fence | Grant]] = [[], []]
        self.ended: list[str] = []
        self.leader = Leader(self.clock, 1, 2, say=self._say, on_end=self.ended.append)

    def _say(self, rank: int, word: FenceWord | GrantWord) -> None:
        self.heard[rank].append(word.word)

    def said(self, rank: int, granted: int, reached: int, *, wants: int = 0, epoch: int = 1) -> None:
        self.leader.said(rank, Said(RankReport(rank, epoch, granted, reached), wants_tokens=wants))

    def both(self, granted: int, reached: int, *, wants: int = 0) -> None:
        for rank in range(2):
            self.said(rank, granted, reached, wants=wants)

    @property
    def newest(self) -> list[Fence | Grant]:
        return [words[-1] for words in self.heard]


@pytest.fixture
async def table() -> AsyncIterator[Table]:
    table = Table()
    table.leader.begin()
    await asyncio.sleep(0)  # its beat begins
    yield table
    table.leader.close()


async def test_every_rank_is_fenced_and_nothing_is_granted_before_all_have_answered(table: Table) -> None:
    assert table.newest == [Fence(1), Fence(1)]
    table.leader.proceed()
    table.said(0, 0, 0, wants=5)
    assert table.newest == [Fence(1), Fence(1)]
    table.said(1, 0, 0)
    assert table.newest == [Grant(1, 2, 5), Grant(1, 2, 5)], "one word grants both steps that may be granted"


async def test_a_new_leader_grants_the_maximum_that_any_rank_was_told(table: Table) -> None:
    table.said(0, 6, 6)
    table.said(1, 7, 6)
    assert table.newest == [Grant(1, 7, 0)] * 2
    assert not table.leader.paused
    table.both(7, 7)
    assert table.leader.paused


async def test_steps_are_granted_while_one_rank_wants_them_and_an_idle_group_is_left_alone(
    table: Table,
) -> None:
    table.both(0, 0)
    table.leader.proceed()
    assert table.leader.step == 0
    table.said(1, 0, 0, wants=3)
    assert table.leader.step == 2
    table.said(1, 2, 1, wants=1)
    assert table.leader.step == 2, "rank 0 is still in its first step"
    table.said(0, 2, 1)
    assert table.newest == [Grant(1, 3, 3)] * 2
    table.said(0, 3, 3)
    table.said(1, 3, 3)
    step = table.leader.step
    await table.clock.beat(40)
    assert (table.leader.step, table.ended) == (step, [])


async def test_a_pause_grants_no_more_and_stands_when_every_rank_has_reached_the_grant(table: Table) -> None:
    table.both(0, 0, wants=1)
    table.leader.proceed()
    table.leader.pause()
    table.said(0, 2, 2, wants=1)
    table.said(1, 2, 1, wants=1)
    assert not table.leader.paused
    table.said(1, 2, 2, wants=1)
    assert table.leader.paused
    assert table.leader.step == 2
    table.leader.proceed()
    assert table.leader.step == 4


async def test_what_a_rank_has_not_reported_is_said_again_at_every_beat_to_that_rank_alone(
    table: Table,
) -> None:
    table.both(0, 0)
    table.leader.proceed()
    table.said(0, 0, 0, wants=1)
    table.said(0, 2, 2, wants=1)
    said = [len(words) for words in table.heard]
    await table.clock.beat()
    assert [len(words) for words in table.heard] == [said[0], said[1] + 1]
    assert table.newest[1] == Grant(1, 2, 1)


async def test_a_step_past_its_deadline_ends_the_group_and_the_deadline_follows_from_the_tokens(
    table: Table,
) -> None:
    table.both(0, 0)
    table.leader.proceed()
    table.said(0, 0, 0, wants=500)
    deadline = 2 * (LOCKSTEP_STEP_SECONDS + 500 * LOCKSTEP_SECONDS_PER_TOKEN)
    await table.clock.beat(int(deadline / LOCKSTEP_BEAT_SECONDS) - 1)
    assert table.ended == []
    table.said(0, 2, 1)
    await table.clock.beat(2)
    assert len(table.ended) == 1
    assert "missed its deadline, waiting for rank 0, rank 1" in table.ended[0]


async def test_a_fence_that_is_not_answered_ends_the_group(table: Table) -> None:
    table.said(0, 0, 0)
    await table.clock.beat(int(LOCKSTEP_FENCE_SECONDS_MAX / LOCKSTEP_BEAT_SECONDS) + 1)
    assert table.ended == ["fencing missed its deadline, waiting for rank 1"]


async def test_a_leader_that_was_frozen_itself_first_hears_what_came_meanwhile(table: Table) -> None:
    table.both(0, 0)
    table.leader.proceed()
    table.said(0, 0, 0, wants=1)
    await table.clock.jump(3600.0)
    assert table.ended == [], "the reports that lie in its sockets are read before anybody is judged"
    table.both(2, 2)
    await table.clock.beat(2)
    assert table.ended == []


async def test_a_lost_rank_ends_the_group_at_once_and_late_words_are_ordinary(table: Table) -> None:
    table.both(0, 0)
    table.leader.lost(1)
    assert table.ended == ["rank 1 is lost"]
    table.said(0, 0, 0, wants=1)
    table.leader.pause()
    assert len(table.ended) == 1


async def test_a_rank_that_obeys_a_newer_leader_deposes_this_one(table: Table) -> None:
    table.both(0, 0)
    table.said(0, 0, 0, epoch=2)
    assert table.ended == ["a newer leader, 2, has taken this group over"]


async def test_a_rank_that_went_further_than_it_was_granted_ends_the_group(table: Table) -> None:
    table.both(0, 0)
    table.said(0, 1, 1)
    assert len(table.ended) == 1
    assert "two leaders use one epoch" in table.ended[0]

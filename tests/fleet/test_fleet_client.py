"""A pause is let go however its block is left; a command can be asked about; words come member by member."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from scripted_engine import ScriptedEngine

from interlock.core.errors import ChannelFault
from interlock.fleet.client import CommandFailed
from interlock.fleet.pausing import HoldLeft

if TYPE_CHECKING:
    from conftest import Fleet

ABLE = ("updates", "suspends")


async def begin(fleet: Fleet, *names: str) -> list[ScriptedEngine]:
    await fleet.start_coordinator()
    engines = [await fleet.engine(name, abilities=ABLE) for name in names]
    await fleet.start_dispatcher()
    await fleet.ready(*names)
    return engines


async def owners(fleet: Fleet) -> list[str]:
    return [hold.owner for hold in (await fleet.client.status()).holds]


# --- leaving a pause ----------------------------------------------------------------------------------------------


async def test_a_cancelled_block_releases_its_hold_though_it_is_cancelled_again(fleet: Fleet) -> None:
    (engine,) = await begin(fleet, "a")
    inside = asyncio.Event()

    async def work() -> None:
        async with fleet.client.paused():
            inside.set()
            await asyncio.Event().wait()

    working = asyncio.create_task(work())
    await inside.wait()
    assert engine.member.state == "PAUSED"
    engine.hold_steps.clear()
    working.cancel()
    await engine.until(lambda: engine.member.state == "UNPAUSING")
    working.cancel()
    engine.hold_steps.set()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert engine.member.state == "RUNNING"
    assert await owners(fleet) == []


async def test_a_pause_whose_waiter_is_cancelled_leaves_no_hold(fleet: Fleet) -> None:
    (engine,) = await begin(fleet, "a")
    engine.hold_steps.clear()

    async def work() -> None:
        async with fleet.client.paused():
            pytest.fail("it never stood")

    working = asyncio.create_task(work())
    await engine.until(lambda: engine.member.state == "PAUSING")
    working.cancel()
    await engine.until(lambda: engine.targets[-1].state == "RUNNING")
    engine.hold_steps.set()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert await owners(fleet) == []


async def test_a_pause_that_fails_leaves_no_hold_and_names_who_did_not_stand(fleet: Fleet) -> None:
    _, slow = await begin(fleet, "a", "slow")
    slow.hold_steps.clear()
    with pytest.raises(CommandFailed, match="slow did not get there") as failed:
        async with fleet.client.paused(timeout_s=0.3, release_s=0.3):
            pytest.fail("it never stood")
    slow.hold_steps.set()
    assert failed.value.progress is not None
    assert {m.name: m.outcome for m in failed.value.progress.members} == {"a": "standing", "slow": "waiting"}
    assert await owners(fleet) == []
    await fleet.ready("a", "slow")


async def test_two_blocks_of_one_client_hold_by_themselves(fleet: Fleet) -> None:
    (engine,) = await begin(fleet, "a")
    async with fleet.client.paused() as outer:
        async with fleet.client.paused() as inner:
            assert outer.owner != inner.owner
        assert engine.member.state == "PAUSED"
        assert await outer.held()
        assert not await inner.held()
    assert engine.member.state == "RUNNING"


async def test_a_hold_that_was_broken_ends_its_block_in_peace(fleet: Fleet) -> None:
    (engine,) = await begin(fleet, "a")
    async with fleet.client.paused(owner="trainer") as pause:
        await fleet.client.unpause(owner="operator", break_hold_of="trainer")
        assert not await pause.held()
        assert engine.member.state == "RUNNING"


async def test_a_refused_pause_does_not_end_what_its_owner_holds_already(fleet: Fleet) -> None:
    await begin(fleet, "a")
    await fleet.client.pause(owner="trainer")
    await fleet.client.suspend(owner="trainer")
    with pytest.raises(ChannelFault, match="RESUME"):
        async with fleet.client.paused(owner="trainer"):
            pytest.fail("it was refused")
    assert await owners(fleet) == ["trainer"]


async def test_a_failed_update_inside_a_block_says_that_the_fleet_stays_held(fleet: Fleet) -> None:
    (engine,) = await begin(fleet, "a")
    engine.fail_update = "shard 2 of 3 is torn"
    with pytest.raises(CommandFailed, match="a failed on the way") as failed:
        async with fleet.client.paused(owner="trainer") as pause:
            await pause.update_weights("v1", "/weights/v1")
    (note,) = failed.value.__notes__
    assert "still held by 'trainer'" in note
    assert "the weights are unknown" in note
    assert await owners(fleet) == ["trainer"], "half an update must not run"


async def test_a_block_that_swallows_the_failure_is_told_by_its_end(fleet: Fleet) -> None:
    (engine,) = await begin(fleet, "a")
    engine.fail_update = "torn"
    with pytest.raises(HoldLeft, match="ctl unpause --owner trainer"):
        async with fleet.client.paused(owner="trainer") as pause:
            with pytest.raises(CommandFailed):
                await pause.update_weights("v1", "/weights/v1")


@pytest.mark.parametrize("lose_state", [False, True])
async def test_a_coordinator_that_dies_within_unpauses_nobody_and_the_end_releases(
    fleet: Fleet, lose_state: bool
) -> None:
    (engine,) = await begin(fleet, "a")
    async with fleet.client.paused(owner="trainer") as pause:
        await fleet.stop_coordinator(lose_state=lose_state)
        assert engine.member.state == "PAUSED"
        ending = asyncio.create_task(fleet.client.update_weights("v1", "/weights/v1", owner=pause.owner))
        await fleet.start_coordinator(expected=["a"])
        await ending
    assert engine.member.state == "RUNNING"
    assert engine.member.version == "v1"
    assert await owners(fleet) == []


async def test_a_coordinator_that_stays_away_is_named_and_masks_no_error(fleet: Fleet) -> None:
    await begin(fleet, "a")
    with pytest.raises(ZeroDivisionError) as error:
        async with fleet.client.paused(owner="trainer", release_s=0.2):
            await fleet.stop_coordinator()
            raise ZeroDivisionError
    (note,) = error.value.__notes__
    assert "no coordinator confirmed the release within" in note
    await fleet.start_coordinator()
    assert await owners(fleet) == ["trainer"]
    with pytest.raises(HoldLeft, match="still held by 'trainer'"):
        async with fleet.client.paused(owner="trainer", release_s=0.2):
            await fleet.stop_coordinator()


async def test_weights_may_be_written_while_the_fleet_stands(fleet: Fleet) -> None:
    (engine,) = await begin(fleet, "a")
    seen: list[str] = []

    async def write() -> str:
        seen.append(engine.member.state)
        return "/weights/v1"

    def broken() -> str:
        raise OSError("disk full")

    async with fleet.client.paused() as pause:
        with pytest.raises(OSError, match="disk full"):
            await pause.update_weights("v1", broken)
        await pause.update_weights("v1", write)
    assert seen == ["PAUSED"]
    assert [(step.version, step.weights) for step in engine.taken if step.step == "UPDATE"] == [
        ("v1", "/weights/v1")
    ]


async def test_a_block_may_suspend_and_resume(fleet: Fleet) -> None:
    (engine,) = await begin(fleet, "a")
    async with fleet.client.paused() as pause:
        await pause.suspend()
        assert engine.member.state == "SUSPENDED"
        await pause.resume()
    assert engine.member.state == "RUNNING"


# --- asking ---------------------------------------------------------------------------------------------------------


async def test_progress_is_told_as_it_comes(fleet: Fleet) -> None:
    _, slow = await begin(fleet, "a", "slow")
    slow.hold_steps.clear()
    heard: list[dict[str, str]] = []

    def on_progress(progress: object) -> None:
        heard.append({m.name: m.outcome for m in progress.members})  # type: ignore[attr-defined]
        if heard[-1]["a"] == "standing":
            slow.hold_steps.set()

    await fleet.client.pause(owner="t", on_progress=on_progress)
    assert {"a": "standing", "slow": "waiting"} in heard
    assert heard[-1] == {"a": "standing", "slow": "standing"}


async def test_a_command_whose_client_is_gone_can_be_asked_about(fleet: Fleet) -> None:
    _, slow = await begin(fleet, "a", "slow")
    slow.hold_steps.clear()
    order = fleet.client.order("PAUSE", "trainer", 20.0)
    words = fleet.client.follow(order)
    await anext(words)
    await words.aclose()  # the client dies
    report = await fleet.client.command(order.command_id)
    assert (report.command, report.owner, report.wanted) == ("PAUSE", "trainer", "PAUSED")
    assert not report.progress.done
    assert "slow" in report.progress.message
    assert 0 < report.left_seconds <= 20.0
    slow.hold_steps.set()
    await fleet.until(lambda: slow.member.state == "PAUSED")
    async with asyncio.timeout(5):
        while not (report := await fleet.client.command(order.command_id)).progress.done:
            await asyncio.sleep(0.01)
    assert report.progress.ok
    assert report.left_seconds == 0.0
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    again = await fleet.client.command(order.command_id, owner="trainer")
    assert again.progress.ok, "it outlives the coordinator that ended it"
    with pytest.raises(ChannelFault, match="no command") as unknown:
        await fleet.client.command(order.command_id, owner="somebody else")
    assert unknown.value.code == "unknown_command"


# --- what has happened ----------------------------------------------------------------------------------------------


async def test_every_transition_hold_and_refusal_is_an_event_and_a_count(fleet: Fleet) -> None:
    await begin(fleet, "a")
    await fleet.client.pause(owner="trainer", hold_seconds=60.0)
    with pytest.raises(ChannelFault):
        await fleet.client.resume(owner="trainer")
    await fleet.client.unpause(owner="operator", break_hold_of="trainer")
    await fleet.client.pause(owner="brief", hold_seconds=60.0)
    fleet.end_holds()
    await fleet.ready("a")
    told = await fleet.client.events()
    assert [event.number for event in told.events] == list(range(1, told.last + 1))
    assert (told.missed, told.gap) == (0, "")
    happened = [(event.name, event.fields) for event in told.events]
    names = [name for name, _ in happened]
    assert {"phase", "member", "command", "command_done", "target", "hold", "hold_ended", "refused"} <= set(
        names
    )
    states = [fields["state"] for name, fields in happened if name == "member"]
    assert states.count("PAUSED") == 2
    assert states[-1] == "RUNNING"
    ends = [(f["owner"], f["how"]) for name, f in happened if name == "hold_ended"]
    assert ends == [("trainer", "broken"), ("brief", "expired")]
    (refused,) = [fields for name, fields in happened if name == "refused"]
    assert "the command is UNPAUSE" in str(refused["why"])
    text = await fleet.client.metrics()
    for line in (
        'interlock_coordinator_members{state="RUNNING"} 1.0',
        'interlock_coordinator_members{state="LOST"} 0.0',
        'interlock_coordinator_target_info{state="RUNNING"} 1.0',
        'interlock_target_transitions_total{after="PAUSED",before="RUNNING"} 2.0',
        'interlock_member_transitions_total{after="PAUSED",before="RUNNING"} 2.0',
        'interlock_placed_holds_total{mode="keep"} 2.0',
        'interlock_ended_holds_total{how="broken"} 1.0',
        'interlock_ended_holds_total{how="expired"} 1.0',
        'interlock_refused_commands_total{command="RESUME",target="PAUSED"} 1.0',
        'interlock_finished_commands_total{command="PAUSE",outcome="ok"} 2.0',
        'interlock_command_duration_seconds_count{command="PAUSE"} 2.0',
        "interlock_coordinator_holds",
    ):
        assert line in text, line


async def test_who_follows_events_is_told_of_what_it_missed(fleet: Fleet) -> None:
    await begin(fleet, "a")
    told = await fleet.client.events()
    ring, last = told.ring, told.last
    following = fleet.client.follow_events(last, ring)
    upcoming = asyncio.ensure_future(anext(following))
    await fleet.client.pause(owner="t")
    batch = await asyncio.wait_for(upcoming, 5.0)
    assert batch.events[0].number == last + 1
    assert batch.gap == ""
    upcoming = asyncio.ensure_future(anext(following))
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    while not (batch := await asyncio.wait_for(upcoming, 10.0)).gap:
        upcoming = asyncio.ensure_future(anext(following))
    assert batch.ring != ring, "in these tests a coordinator's events are in memory only"
    assert "another one" in batch.gap
    assert batch.events[0].number == 1
    await following.aclose()


async def test_numbers_that_no_ring_ever_told_are_a_gap_too(fleet: Fleet) -> None:
    await begin(fleet, "a")
    told = await fleet.client.events()
    ahead = await fleet.client.events(told.last + 1000, told.ring)
    assert "were lost" in ahead.gap
    assert ahead.events[0].number == 1


async def test_what_a_coordinators_life_begins_with_is_one_event_and_counts_nothing(fleet: Fleet) -> None:
    await begin(fleet, "a")
    await fleet.client.pause(owner="trainer")
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    first, *_ = (await fleet.client.events()).events
    assert (first.name, first.fields["state"], first.fields["holds"]) == ("began", "PAUSED", "trainer")
    text = await fleet.client.metrics()
    assert 'interlock_placed_holds_total{mode="keep"} 0.0' in text
    assert 'interlock_coordinator_holds{mode="keep"} 1.0' in text

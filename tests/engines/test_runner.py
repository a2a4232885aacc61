"""The runner over real sockets: what fronts ask, what the fleet wants, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from engine_rig import Rig
from hand_engine import expected_tokens

from interlock.core.identity import Epoch
from interlock.core.sampling import Sampling
from interlock.core.targets import Mode
from interlock.engines import desk
from interlock.engines.base import EngineGone, EngineStartError
from interlock.engines.runner import STATUS_FAILED, STATUS_STOPPED, STATUS_TOLD
from interlock.wire.engine_messages import Cursor, Dispatch
from interlock.wire.token_ids import pack_ids

P = [3, 1, 4]
Q = [2, 7]


async def test_tokens_of_all_requests_of_a_step_come_in_one_frame(rig: Any) -> None:
    await rig.running()
    front = await rig.front()
    await front.dispatch("a", P, 3)
    await front.dispatch("b", Q, 3)
    await rig.engine.until_works(2)
    await rig.engine.step(3)
    assert (await front.until_finish("a")).finish == "length"
    assert (await front.until_finish("b")).finish == "length"
    assert front.tokens("a") == expected_tokens(P, 3)
    assert front.tokens("b") == expected_tokens(Q, 3)
    assert [sorted(d.request for d in frame.deltas) for frame in front.frames] == [["a", "b"]] * 3
    assert front.deltas("a")[0].cached_tokens == 2


async def test_a_dispatch_of_an_older_epoch_is_refused_and_told_the_newer_one(rig: Any) -> None:
    await rig.running()
    await rig.coordinator.tell(5, "RUNNING")
    await rig.coordinator.until_standing(5)
    front = await rig.front()
    await front.dispatch("a", P, 3, epoch=4)
    await front.until(lambda: front.refusals)
    assert (front.refusals[0].code, front.refusals[0].epoch) == ("stale_epoch", Epoch(1, 5))
    assert not rig.engine.works


async def test_only_a_running_engine_begins_work(rig: Any) -> None:
    await rig.coordinator.tell(1, "PAUSED")
    await rig.coordinator.until_standing(1)
    front = await rig.front()
    await front.dispatch("a", P, 3)
    await front.dispatch("b", P, 3, epoch=9)  # an epoch that this engine has not heard
    await front.until(lambda: len(front.refusals) == 2)
    assert [refused.code for refused in front.refusals] == ["not_running", "not_running"]
    assert not rig.engine.works


async def test_impossible_parameters_are_refused_before_any_token(rig: Any) -> None:
    await rig.running()
    front = await rig.front()
    await front.dispatch("a", [-1], 3)
    await front.until(lambda: front.refusals)
    assert front.refusals[0].code == "invalid"
    assert "vocabulary" in front.refusals[0].message
    assert not front.frames


async def test_an_aborted_request_ends_with_abort_and_leaves_the_engine(rig: Any) -> None:
    await rig.running()
    front = await rig.front()
    await front.dispatch("a", P, 10)
    await rig.engine.until_works(1)
    await rig.engine.step()
    await front.until_count("a", 1)
    await front.abort("a")
    assert (await front.until_finish("a")).finish == "abort"
    assert front.tokens("a") == expected_tokens(P, 1)


async def test_an_abort_of_an_earlier_attempt_does_not_end_a_later_one(rig: Any) -> None:
    await rig.running()
    front = await rig.front()
    await front.dispatch("a", P, 2, attempt=2)
    await rig.engine.until_works(1)
    await front.abort("a", attempt=1)
    await front.dispatch("b", Q, 1)
    await rig.engine.until_works(2)  # the abort was heard by now
    await rig.engine.step(2)
    assert (await front.until_finish("a")).finish == "length"


async def test_a_repeated_dispatch_changes_nothing_and_a_later_attempt_replaces(rig: Any) -> None:
    await rig.running()
    front = await rig.front()
    await front.dispatch("a", P, 5)
    await rig.engine.until_works(1)
    await front.dispatch("a", P, 5)
    await front.dispatch("a", Q, 2, attempt=2)
    await rig.engine.until_works(2)
    await rig.engine.step(2)
    last = await front.until_finish("a")
    assert (last.attempt, [d.attempt for d in front.deltas("a")]) == (2, [2, 2])
    assert front.tokens("a") == expected_tokens(Q, 2)
    assert len(rig.engine.works) == 2
    assert len(rig.engine.left) == 2


async def test_everything_is_kept_until_the_end_was_acknowledged(rig: Any) -> None:
    await rig.running()
    first = await rig.front()
    await first.dispatch("a", P, 4)
    await rig.engine.until_works(1)
    await rig.engine.step(4)
    await first.until_finish("a")
    await first.close()
    second = await rig.front(wanted=[Cursor("a", 1, 0)])
    assert (await second.until_finish("a")).finish == "length"
    assert second.tokens("a") == expected_tokens(P, 4)
    await second.acknowledge("a")
    await second.close()
    third = await rig.front(wanted=[Cursor("a", 1, 0)])
    await third.until(lambda: third.refusals)
    assert third.refusals[0].code == "unknown"
    assert rig.runner.desk.requests == 0


async def test_a_front_that_comes_back_gets_the_rest_of_its_streams(rig: Any) -> None:
    await rig.running()
    first = await rig.front()
    await first.dispatch("a", P, 6)
    await rig.engine.until_works(1)
    await rig.engine.step(2)
    await first.until_count("a", 2)
    await first.close()
    await rig.engine.step(2)  # made while nobody listens
    second = await rig.front(wanted=[Cursor("a", 1, 2)])
    await second.until_count("a", 2)
    await rig.engine.step(2)
    await second.until_finish("a")
    assert second.deltas("a")[0].start == 2
    assert second.tokens("a") == expected_tokens(P, 6)[2:]
    rig.runner.desk.check_integrity()


async def test_what_a_returning_front_does_not_name_is_aborted(rig: Any) -> None:
    await rig.running()
    first = await rig.front()
    await first.dispatch("a", P, 6)
    await first.dispatch("b", Q, 6)
    await rig.engine.until_works(2)
    await first.close()
    await rig.front(wanted=[Cursor("b", 1, 0)])
    async with asyncio.timeout(5.0):
        while len(rig.engine.left) < 1:
            await asyncio.sleep(0.01)
    assert rig.engine.works[rig.engine.left[0]].prompt == P
    assert rig.runner.desk.requests == 1


async def test_requests_of_a_front_that_stays_away_are_aborted_after_the_grace(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "FRONT_GRACE_SECONDS", 0.05)
    await rig.running()
    front = await rig.front()
    await front.dispatch("a", P, 6)
    await rig.engine.until_works(1)
    await front.close()
    async with asyncio.timeout(5.0):
        while not rig.engine.left:
            await asyncio.sleep(0.01)
    assert rig.runner.desk.requests == 0


async def test_a_front_that_does_not_begin_with_resume_is_shown_the_door(rig: Any) -> None:
    await rig.running()
    front = await rig.front()
    await front.dispatch("a", P, 2)
    await rig.engine.until_works(1)
    await front.close()
    from interlock.wire.channel import connect_channel
    from interlock.wire.engine_messages import FromEngine
    from interlock.wire.identity import Identity

    rude = await connect_channel(
        rig.host, rig.address, me=Identity("rude", 1), role="front", accept=FromEngine, deadline_s=5.0
    )
    await rude.send(Dispatch("x", 1, Epoch(1, 1), pack_ids(P), Sampling(max_tokens=1), "s"))
    async with asyncio.timeout(5.0):
        assert [received async for received in rude.messages()] == []
    await rude.close()
    assert len(rig.engine.works) == 1


async def test_a_pause_in_mid_stream_freezes_and_an_unpause_goes_on_with_the_same_tokens(rig: Any) -> None:
    await rig.running()
    front = await rig.front()
    await front.dispatch("a", P, 6)
    await rig.engine.until_works(1)
    await rig.engine.step(2)
    await front.until_count("a", 2)
    await rig.coordinator.tell(2, "PAUSED", mode="keep")
    report = await rig.coordinator.until_standing(2)
    assert report.state == "PAUSED"
    await rig.engine.step(3)
    assert len(front.tokens("a")) == 2
    await rig.coordinator.tell(3, "RUNNING")
    await rig.coordinator.until_standing(3)
    await rig.engine.step(6)
    await front.until_finish("a")
    assert front.tokens("a") == expected_tokens(P, 6)


async def test_a_stricter_pause_overtakes_one_that_waits(rig: Any) -> None:
    await rig.running()
    front = await rig.front()
    await front.dispatch("a", P, 6)
    await rig.engine.until_works(1)
    rig.engine.finish_pause.clear()
    await rig.coordinator.tell(2, "PAUSED", mode="wait")
    await rig.coordinator.until(lambda report: report.state == "PAUSING")
    rig.engine.finish_pause.set()
    await rig.coordinator.tell(3, "PAUSED", mode="abort")
    await rig.coordinator.until_standing(3)
    assert rig.engine.pauses[-2:] == [Mode.WAIT, Mode.ABORT]
    assert (await front.until_finish("a")).finish == "abort"


async def test_a_target_of_an_older_epoch_changes_nothing_and_is_answered_with_the_newer(rig: Any) -> None:
    await rig.running()
    await rig.coordinator.tell(7, "PAUSED")
    await rig.coordinator.until_standing(7)
    count = len(rig.coordinator.reports)
    await rig.coordinator.tell(3, "RUNNING")
    report = await rig.coordinator.until(lambda _: len(rig.coordinator.reports) > count)
    assert (report.state, report.epoch, report.heard.epoch) == ("PAUSED", Epoch(1, 7), Epoch(1, 7))


async def test_a_coordinator_that_comes_back_is_found_again(rig: Any) -> None:
    await rig.running()
    for channel in list(rig.coordinator.channels):
        await channel.close()
    rig.coordinator.reports.clear()
    report = await rig.coordinator.until(lambda _: True)
    assert (report.state, report.standing) == ("RUNNING", Epoch(1, 1))


async def test_a_stopped_engine_says_so_and_leaves_with_status_zero(rig: Any) -> None:
    await rig.running()
    await rig.coordinator.tell(2, "STOPPED")
    async with asyncio.timeout(5.0):
        assert await rig.life == STATUS_STOPPED
    assert rig.engine.stopped
    report = await rig.coordinator.until(lambda report: report.state == "STOPPED")
    assert report.standing == Epoch(1, 2)


async def test_streams_that_a_stop_ends_are_no_death_of_the_engine(rig: Any) -> None:
    """Found with a real fleet: engines that were stopped with frozen streams seemed to have died, and were started once more."""
    await rig.running()
    front = await rig.front()
    await front.dispatch("a", P, 9)
    await rig.engine.until_works(1)
    await rig.coordinator.tell(2, "STOPPED")
    async with asyncio.timeout(5.0):
        assert await rig.life == STATUS_STOPPED
    await rig.coordinator.until(lambda report: report.state == "STOPPED")


async def test_an_engine_that_is_gone_when_it_shall_stop_is_stopped(rig: Any) -> None:
    async def gone() -> None:
        raise EngineGone("the core has exited")

    rig.engine.stop = gone
    await rig.running()
    await rig.coordinator.tell(2, "STOPPED")
    async with asyncio.timeout(5.0):
        assert await rig.life == STATUS_STOPPED


async def test_a_dead_engine_ends_its_runner_with_a_failure(rig: Any) -> None:
    await rig.running()
    rig.engine.death.set_result("the core was killed")
    async with asyncio.timeout(5.0):
        assert await rig.life == STATUS_FAILED


async def test_a_runner_that_is_told_to_leave_does_so_also_while_its_engine_starts(tmp_path: Any) -> None:
    rig = Rig(tmp_path)
    rig.engine.start_gate.clear()
    async with rig.stack:
        await rig.start()
        await asyncio.sleep(0)
        rig.runner.stop("got SIGTERM")
        async with asyncio.timeout(5.0):
            assert await rig.life == STATUS_TOLD


async def test_an_engine_that_cannot_start_says_why(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path)

    async def fail() -> None:
        raise EngineStartError("there is not enough memory; use fewer --engines")

    monkeypatch.setattr(rig.engine, "start", fail)
    async with rig.stack:
        await rig.start()
        with pytest.raises(EngineStartError, match="fewer --engines"):
            await rig.life


async def test_each_life_of_an_engine_has_a_higher_incarnation(rig: Any) -> None:
    import json

    await rig.running()
    before = json.loads((rig.directory / "state" / "identity.json").read_text())["incarnation"]
    from interlock.wire.identity import load_identity

    assert load_identity(rig.host, rig.directory / "state", "engine-0").incarnation > before

"""The fleet is where it was told to be, whoever dies, comes late, asks twice or forgets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from scripted_engine import continuation_of, read, read_some

from interlock.core.errors import ChannelFault
from interlock.core.identity import Epoch
from interlock.fleet.client import CommandFailed, FleetClient
from interlock.fleet.coordinator import Deposed
from interlock.fleet.coordinator_state import CoordinatorFile
from interlock.fleet.generation import NoMember
from interlock.wire.engine_messages import Dispatch
from interlock.wire.fleet_messages import Command, CommandProgress, MemberGone

PROMPT = [11, 22, 33]
Fleet = Any


async def start(fleet: Fleet, *names: str, **more: object) -> list[Any]:
    await fleet.start_coordinator()
    engines = [await fleet.engine(name, **more) for name in names]
    await fleet.start_dispatcher()
    await fleet.ready(*names)
    return engines


def outcomes(progress: CommandProgress) -> dict[str, str]:
    return {m.name: m.outcome for m in progress.members}


# --- pause and unpause --------------------------------------------------------------------------------------------


async def test_a_stream_paused_in_the_middle_goes_on_with_the_same_tokens(fleet: Fleet) -> None:
    a, b = await start(fleet, "a", "b", step_s=0.002)
    stream = fleet.ask(PROMPT, 400)
    head = await read_some(stream, 5)
    progress = await fleet.client.pause("keep", owner="trainer")
    assert outcomes(progress) == {"a": "standing", "b": "standing"}
    assert {a.member.state, b.member.state} == {"PAUSED"}
    waiting = fleet.ask([5], 4)
    await fleet.until(lambda: fleet.dispatcher.membership.target == "PAUSED")
    dispatched = len(a.said(Dispatch)) + len(b.said(Dispatch))
    await asyncio.sleep(0.1)
    assert len(a.said(Dispatch)) + len(b.said(Dispatch)) == dispatched  # nothing is dispatched meanwhile
    await fleet.client.unpause(owner="trainer")
    tail, finish = await read(stream)
    assert head + tail == continuation_of(PROMPT, 400)
    assert finish == "length"
    assert (await read(waiting))[0] == continuation_of([5], 4)
    assert stream.attempts == 1


async def test_a_pause_that_aborts_ends_streams_with_abort(fleet: Fleet) -> None:
    (a,) = await start(fleet, "a")
    stream = fleet.ask(PROMPT, 400)
    await a.until(lambda: a.streams)
    await a.step(2)
    await fleet.client.pause("abort", owner="trainer")
    tokens, finish = await read(stream)
    assert (tokens, finish) == (continuation_of(PROMPT, 2), "abort")


async def test_a_stricter_pause_is_a_new_epoch_and_not_ignored(fleet: Fleet) -> None:
    (a,) = await start(fleet, "a")
    first = await fleet.client.pause("keep", owner="one")
    second = await fleet.client.pause("abort", owner="two")
    assert second.epoch > first.epoch
    assert a.member.mode == "abort"


async def test_the_fleet_runs_only_when_no_hold_remains(fleet: Fleet) -> None:
    (a,) = await start(fleet, "a")
    await fleet.client.pause(owner="trainer")
    await fleet.client.pause(owner="operator")
    progress = await fleet.client.unpause(owner="operator")
    assert "trainer" in progress.message
    assert a.member.state == "PAUSED"
    with pytest.raises(ChannelFault, match="'operator' holds nothing"):
        await fleet.client.unpause(owner="operator")
    await fleet.client.unpause(owner="admin", break_hold_of="trainer")
    assert a.member.state == "RUNNING"


async def test_a_pause_repeated_by_its_owner_changes_nothing(fleet: Fleet) -> None:
    await start(fleet, "a")
    first = await fleet.client.pause(owner="trainer")
    again = await fleet.client.pause(owner="trainer")
    assert again.epoch == first.epoch
    await fleet.client.unpause(owner="trainer")
    await fleet.ready("a")


async def test_a_hold_ends_at_its_deadline(fleet: Fleet) -> None:
    (a,) = await start(fleet, "a")
    await fleet.client.pause(owner="trainer", hold_seconds=3600.0)
    assert a.member.state == "PAUSED"
    fleet.end_holds()
    await fleet.ready("a")


async def test_paused_holds_inside_its_block_and_releases_after_it(fleet: Fleet) -> None:
    (a,) = await start(fleet, "a")
    with pytest.raises(ZeroDivisionError):
        async with fleet.client.paused(mode="keep") as pause:
            assert pause.ok
            assert a.member.state == "PAUSED"
            raise ZeroDivisionError
    assert a.member.state == "RUNNING"


async def test_progress_names_who_is_waited_for(fleet: Fleet) -> None:
    _a, b = await start(fleet, "a", "b")
    b.hold_steps.clear()
    seen: list[dict[str, str]] = []
    async for progress in fleet.client.follow(fleet.client.order("PAUSE", "t", 10.0)):
        seen.append(outcomes(progress))
        if seen[-1] == {"a": "standing", "b": "waiting"}:
            assert "b" in progress.message
            b.hold_steps.set()
    assert {"a": "standing", "b": "waiting"} in seen
    assert seen[-1] == {"a": "standing", "b": "standing"}


async def test_pause_then_unpause_without_waiting_kills_nobody(fleet: Fleet) -> None:
    """megatron.md §4.3 hole 5: a signal that finds an engine PAUSING ended it."""
    (a,) = await start(fleet, "a")
    a.hold_steps.clear()
    pausing = asyncio.create_task(fleet.client.pause(owner="t"))
    await a.until(lambda: a.member.state == "PAUSING")
    unpausing = asyncio.create_task(fleet.client.unpause(owner="t"))
    await a.until(lambda: a.targets[-1].state == "RUNNING")
    a.hold_steps.set()
    await unpausing
    with pytest.raises(CommandFailed, match="superseded"):
        await pausing
    assert a.member.state == "RUNNING"
    assert (await one_request(fleet, a))[0] == continuation_of([9], 2)


async def one_request(fleet: Fleet, engine: Any) -> tuple[list[int], str]:
    await fleet.ready(engine.name)
    stream = fleet.ask([9], 2)
    await engine.until(lambda: engine.streams)
    await engine.step(2)
    return await read(stream)


# --- who comes late, or goes ----------------------------------------------------------------------------------------


async def test_a_late_joiner_adopts_the_target_before_it_gets_work(fleet: Fleet) -> None:
    """megatron.md §4.3 hole 8: a late joiner is told nothing and runs while the others stand."""
    await start(fleet, "a")
    await fleet.client.pause(owner="t")
    late = await fleet.engine("late")
    await fleet.ready("late", state="PAUSED")
    assert late.member.state == "PAUSED"
    fleet.ask(PROMPT, 3, engine="late")
    assert not late.said(Dispatch)
    await fleet.client.unpause(owner="t")
    await late.until(lambda: late.streams)


async def test_a_member_behind_in_weights_gets_no_work(fleet: Fleet) -> None:
    """megatron.md §4.3 hole 15: what was computed with other weights is served."""
    await start(fleet, "a")
    behind = await fleet.engine("behind", version="old")
    behind.hold_steps.clear()  # it cannot update
    await fleet.until(lambda: fleet.member("behind") is not None)
    for _ in range(4):
        fleet.ask(PROMPT, 3, engine="behind")
    await fleet.until(lambda: not fleet.dispatcher._requests.queue)
    assert not behind.said(Dispatch)


async def test_a_member_that_is_gone_does_not_hold_up_a_pause(fleet: Fleet) -> None:
    """megatron.md §4.3 hole 3: a dead rank hangs all, with no time-out and no report."""
    await fleet.start_coordinator()
    child = await fleet.engine_process("a", 0.01)
    b = await fleet.engine("b")
    await fleet.start_dispatcher()
    await fleet.ready("a", "b")
    b.hold_steps.clear()
    pausing = asyncio.create_task(fleet.client.pause(owner="t", timeout_s=20))
    await b.until(lambda: b.member.state == "PAUSING")
    assert await child.end_tree(5.0)
    b.hold_steps.set()
    assert outcomes(await pausing) == {"a": "gone", "b": "standing"}


async def test_who_is_silent_is_suspected_and_its_requests_go_on_elsewhere(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.fleet.members.SILENCE_SECONDS_MAX", 1.0)
    a, b = await start(fleet, "a", "b")
    stream = fleet.ask(PROMPT, 5, engine="a")
    await a.until(lambda: a.streams)
    await a.step(2)
    head = await read_some(stream, 2)
    for task in a._tasks:  # it reports no more, though its fronts still reach it
        task.cancel()
    await b.until(lambda: b.streams)
    await b.step(3)
    assert head + (await read(stream))[0] == continuation_of(PROMPT, 5)
    assert fleet.member("a").state == "SUSPECT"


async def test_the_exit_of_one_process_is_not_the_end_of_a_tree(fleet: Fleet) -> None:
    """Where a launcher answers for the tree, the runner's exit is suspicion, and MemberGone the proof."""
    await fleet.start_coordinator(exit_is_proof=False)
    child = await fleet.engine_process("a", 0.01)
    await fleet.engine("b")
    await fleet.start_dispatcher()
    await fleet.ready("a", "b")
    life = fleet.member("a").incarnation
    assert await child.end_tree(5.0)
    await fleet.until(lambda: fleet.member("a").state == "SUSPECT")
    with pytest.raises(CommandFailed, match="a cannot be seen") as failed:
        await fleet.client.pause(owner="t", timeout_s=0.5)
    assert outcomes(failed.value.progress) == {"a": "unknown", "b": "standing"}
    assert (await fleet.client.pause(owner="u", timeout_s=0.5, allow_unknown=True)).ok
    await fleet.client.member_gone("a", life)
    await fleet.until(lambda: fleet.member("a").state == "LOST")
    assert (await fleet.client.pause(owner="v")).ok


async def test_a_life_that_is_lost_stays_lost_when_it_speaks_again(fleet: Fleet) -> None:
    """hazards F5: a frozen engine that was declared gone thaws."""
    a, b = await start(fleet, "a", "b")
    stream = fleet.ask(PROMPT, 5, engine="a")
    await a.until(lambda: a.streams)
    await a.step(2)
    head = await read_some(stream, 2)
    await fleet.client.member_gone("a", a.me.incarnation)
    await fleet.until(lambda: fleet.member("a").state == "LOST")
    await b.until(lambda: b.streams)
    await b.step(3)
    assert head + (await read(stream))[0] == continuation_of(PROMPT, 5)
    before = a.reports
    await a.until(lambda: a.reports > before + 1)
    assert fleet.member("a").state == "LOST"
    assert (await fleet.client.status()).members[0].state == "LOST"


async def test_an_older_life_of_a_name_is_refused(fleet: Fleet) -> None:
    """megatron.md §4.3 hole 18: identities collide and requests go to a ghost."""
    (a,) = await start(fleet, "a")
    newer = await fleet.engine("a", directory="a again")
    assert newer.me.incarnation > a.me.incarnation
    await fleet.until(lambda: fleet.member("a").incarnation == newer.me.incarnation)
    refused = a.reports
    await fleet.ready("a")
    stream = fleet.ask(PROMPT, 2)
    await newer.until(lambda: newer.streams)
    await newer.step(2)
    assert (await read(stream))[0] == continuation_of(PROMPT, 2)
    assert not a.said(Dispatch)
    assert a.reports <= refused + 1  # it is not let in again


async def test_a_life_whose_end_was_told_before_its_first_word_is_never_a_member(fleet: Fleet) -> None:
    await start(fleet, "a")
    await fleet.client.member_gone("late", 1 << 62)
    late = await fleet.engine("late")
    await late.until(lambda: late.reports >= 2)
    assert [m.name for m in (await fleet.client.status()).members] == ["a"]
    assert not late.targets


async def test_nobody_left_is_no_pause(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    await asyncio.sleep(0.4)
    with pytest.raises(CommandFailed, match="no member"):
        await fleet.client.pause(owner="t", timeout_s=5)


# --- who forgets ----------------------------------------------------------------------------------------------------


async def test_a_coordinator_that_restarts_with_its_state_unpauses_nothing(fleet: Fleet) -> None:
    a, b = await start(fleet, "a", "b")
    before = await fleet.client.pause("abort", owner="trainer")
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    await fleet.ready("a", "b", state="PAUSED")
    status = await fleet.client.status()
    assert status.epoch > before.epoch
    assert [(h.owner, h.mode) for h in status.holds] == [("trainer", "abort")]
    assert "RUNNING" not in [t.state for t in a.targets + b.targets if t.epoch >= before.epoch]
    await fleet.client.unpause(owner="trainer")
    await fleet.ready("a", "b")


async def test_a_coordinator_that_lost_its_state_unpauses_nothing_and_leads_again(fleet: Fleet) -> None:
    """hazards F2."""
    a, b = await start(fleet, "a", "b")
    before = await fleet.client.pause(owner="trainer")
    await fleet.stop_coordinator(lose_state=True)
    coordinator = await fleet.start_coordinator(expected=["a", "b"], recovering_s=5.0)
    await fleet.until(lambda: coordinator.fleet.phase == "LEADING")
    await fleet.ready("a", "b", state="PAUSED")
    status = await fleet.client.status()
    assert status.target == "PAUSED"
    assert [h.owner for h in status.holds] == ["trainer"]
    assert "RUNNING" not in [t.state for t in a.targets + b.targets if t.epoch >= before.epoch]
    await fleet.client.unpause(owner="trainer")
    await fleet.ready("a", "b")


async def test_while_recovering_commands_wait_and_fronts_keep_what_they_know(fleet: Fleet) -> None:
    (a,) = await start(fleet, "a")
    known = fleet.dispatcher.membership
    await fleet.stop_coordinator(lose_state=True)
    await fleet.until(lambda: not fleet.dispatcher.coordinator_connected)
    coordinator = await fleet.start_coordinator(expected=["a", "never"], recovering_s=2.0)
    await fleet.until(lambda: fleet.dispatcher.coordinator_connected and coordinator._watchers)
    await asyncio.sleep(0.1)  # for a word that must not come
    assert coordinator.fleet.phase == "RECOVERING"
    with pytest.raises(ChannelFault, match="lost its state"):
        await fleet.client.status()
    assert fleet.dispatcher.membership == known
    assert (await one_request(fleet, a))[0] == continuation_of([9], 2)
    paused = await fleet.client.pause(
        owner="t", timeout_s=0.5, allow_unknown=True
    )  # asked again until it leads
    assert paused.ok
    assert coordinator.fleet.phase == "LEADING"


async def test_an_engine_that_is_expected_and_was_never_heard_is_unknown_until_it_is_excused(
    fleet: Fleet,
) -> None:
    """A coordinator without state cannot say what an engine does that it has not heard."""
    await fleet.start_coordinator(expected=["a", "silent"], recovering_s=0.2)
    await fleet.engine("a")
    with pytest.raises(CommandFailed, match="silent cannot be seen"):
        await fleet.client.pause(owner="t", timeout_s=1.0)
    await fleet.client.member_gone("silent", 7)
    assert (await fleet.client.pause(owner="u")).ok


async def test_a_restarted_coordinator_waits_for_members_it_has_not_heard_yet(fleet: Fleet) -> None:
    a, b = await start(fleet, "a", "b")
    await fleet.stop_coordinator()
    await b.close()  # away, not known to be gone
    await fleet.start_coordinator()
    with pytest.raises(CommandFailed, match="b cannot be seen") as failed:
        await fleet.client.pause(owner="t", timeout_s=1.0)
    assert outcomes(failed.value.progress) == {"a": "standing", "b": "unknown"}
    assert a.member.state == "PAUSED"


async def test_a_command_outlives_its_client_and_can_be_asked_for_again(fleet: Fleet) -> None:
    (a,) = await start(fleet, "a")
    a.hold_steps.clear()
    order = fleet.client.order("PAUSE", "trainer", 20.0)
    dying = asyncio.create_task(fleet.client.run(order))
    await a.until(lambda: a.member.state == "PAUSING")
    dying.cancel()
    await asyncio.gather(dying, return_exceptions=True)
    a.hold_steps.set()
    await fleet.ready("a", state="PAUSED")
    other = FleetClient(fleet.host, fleet.address)
    answered = await other.run(order)
    assert answered.ok
    assert answered.epoch == a.member.epoch  # not a second pause


async def test_a_command_outlives_its_coordinator(fleet: Fleet) -> None:
    (a,) = await start(fleet, "a")
    a.hold_steps.clear()
    order = fleet.client.order("PAUSE", "trainer", 20.0)
    asked = asyncio.create_task(fleet.client.run(order))
    await a.until(lambda: a.member.state == "PAUSING")
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    a.hold_steps.set()
    assert (await asked).ok
    assert a.member.state == "PAUSED"


async def test_the_outcome_of_a_finished_command_can_be_asked_of_the_next_coordinator(fleet: Fleet) -> None:
    await start(fleet, "a")
    await fleet.client.pause(owner="t")
    order = fleet.client.order("UNPAUSE", "t", 20.0)
    first = await fleet.client.run(order)
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    again = await fleet.client.run(order)  # judged anew it would be refused: nothing is paused
    assert (again.ok, again.epoch, again.message) == (True, first.epoch, first.message)


async def test_a_stop_from_running_goes_on_when_its_client_dies_between_the_halves(fleet: Fleet) -> None:
    """hazards F1; megatron.md §4.3 hole 10: STOP strands futures."""
    (a,) = await start(fleet, "a")
    a.hold_steps.clear()
    stopping = asyncio.create_task(fleet.client.stop(owner="t", composite=True))
    await a.until(lambda: a.member.state == "PAUSING")
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    a.hold_steps.set()
    await fleet.until(lambda: fleet.dispatcher.membership.target == "STOPPED")
    await a.until(lambda: a.member.state == "STOPPED")
    with pytest.raises(NoMember, match="stopped"):
        fleet.ask(PROMPT, 3)


async def test_what_is_told_is_told_again_until_it_is_repeated_back(fleet: Fleet) -> None:
    """A target that is lost on its way (megatron.md §4.3 hole 13: no sequence, no round)."""
    (a,) = await start(fleet, "a")
    hear, lost = a._hear, []
    a._hear = lost.append  # type: ignore[method-assign]
    pausing = asyncio.create_task(fleet.client.pause(owner="t"))
    await fleet.until(lambda: len(lost) >= 2)
    assert len({t.epoch for t in lost}) == 1
    a._hear = hear
    assert (await pausing).ok


async def test_a_coordinator_that_hears_of_a_higher_epoch_steps_down(fleet: Fleet) -> None:
    """hazards F3."""
    (a,) = await start(fleet, "a")
    target = a.member.heard
    higher = target.__class__(Epoch(target.epoch.term + 1, 0), target.state, target.mode, target.version)
    a.member = a.member.__class__(
        state=a.member.state, version=a.member.version, heard=higher, attempt=a.member.attempt
    )
    a._changed.set()
    with pytest.raises(Exception, match="higher epoch"):
        await asyncio.wait_for(asyncio.shield(fleet.running), 5)


async def test_a_coordinator_without_state_leads_above_the_epoch_that_only_a_front_remembers(
    fleet: Fleet,
) -> None:
    """Else the front drops its word until the clock has caught up: found by the simulator (seed 1012)."""
    await start(fleet, "a")
    before = fleet.dispatcher.membership
    await fleet.stop_coordinator()
    far = before.epoch.__class__(before.epoch.term + 10**15, 3)
    fleet.dispatcher._view.current = msgspec.structs.replace(before, epoch=far)
    coordinator = await fleet.start_coordinator()
    try:
        await asyncio.wait_for(asyncio.shield(fleet.running), 5)
    except Deposed:
        await fleet.stop_coordinator()
        coordinator = await fleet.start_coordinator()
    await fleet.until(lambda: fleet.dispatcher.membership.epoch > far)
    assert coordinator.fleet.epoch > far


async def test_a_life_below_one_that_a_front_saw_end_is_told_so_though_the_coordinator_forgot(
    fleet: Fleet,
) -> None:
    """Found by the simulator (seed 3275): state lost, clock back, coordinator restarted; the front took no such member."""
    (a,) = await start(fleet, "a")
    fleet.dispatcher._links.over["a"] = a.me.incarnation + 5
    coordinator = fleet.coordinator
    await fleet.until(lambda: coordinator._members._ends.get("a") == a.me.incarnation + 5)
    assert coordinator._members.record("a").sight == "HEARD"  # a front's word is no proof of an exit
    rejected = coordinator._members.report(SimpleNamespace(peer=a.me), a.report())
    assert rejected.known == a.me.incarnation + 5


async def test_what_cannot_be_kept_is_not_begun(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    (a,) = await start(fleet, "a")
    before = fleet.coordinator.fleet
    write = fleet.host.files.write_in_place

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fleet.host.files, "write_in_place", full)
    with pytest.raises(ChannelFault, match=r"could not keep.*No space") as refused:
        await fleet.client.pause(owner="t")
    assert refused.value.retryable
    assert fleet.coordinator.fleet == before
    assert a.targets[-1].epoch == before.epoch
    monkeypatch.setattr(fleet.host.files, "write_in_place", write)
    assert (await fleet.client.pause(owner="t")).ok


async def test_a_disk_that_fails_when_a_hold_ends_leaves_the_coordinator_answering(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something had changed and could not be told, so it did not wait: it tried again without letting anybody else run."""
    await start(fleet, "a")
    await fleet.client.pause(owner="t", hold_seconds=3600.0)
    coordinator, write, tries = fleet.coordinator, fleet.host.files.write_in_place, []

    def full(*_: object) -> None:
        tries.append(1)
        assert len(tries) < 1000, "it does nothing else any more"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fleet.host.files, "write_in_place", full)
    fleet.end_holds()
    coordinator._changed.set()
    await fleet.until(lambda: len(tries) >= 2 or fleet.running.done())
    assert not fleet.running.done()
    assert (await fleet.client.status()).target == "PAUSED"
    monkeypatch.setattr(fleet.host.files, "write_in_place", write)
    await fleet.ready("a")


async def test_an_update_whose_end_could_not_be_kept_at_first_ends_all_the_same(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights stayed unknown for ever: that they were there was not looked at again."""
    await start(fleet, "a", abilities=("updates",))
    await fleet.client.pause(owner="t")
    write, refused = fleet.host.files.write_in_place, []

    def full_once(path: Path, pieces: list[tuple[int, bytes]]) -> None:
        if not refused and b'"version":"v1","version_known":true' in pieces[0][1]:
            refused.append(path)
            raise OSError(28, "No space left on device")
        write(path, pieces)

    monkeypatch.setattr(fleet.host.files, "write_in_place", full_once)
    await fleet.client.update_weights("v1", "/weights/v1", owner="t")
    assert refused
    assert fleet.coordinator.fleet.version_known, "who hears that it is done may say UNPAUSE at once"
    await fleet.client.unpause(owner="t")
    await fleet.ready("a")


async def test_the_launcher_hears_that_an_end_is_known_once_it_is_kept(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a coordinator that starts again waits for that life, and nobody says its end again."""
    (a,) = await start(fleet, "a")
    coordinator, told = fleet.coordinator, []
    file = fleet.directory / "coordinator"

    def kept() -> list[str]:
        stored, _ = CoordinatorFile(fleet.host, file).load()
        return [member.name for member in stored.members]

    async def send(*_: object) -> None:
        told.append(kept())

    async def fault(_: object, code: str, *more: object, retryable: bool) -> None:
        assert retryable
        told.append(code)

    assert kept() == ["a"]
    launcher = SimpleNamespace(send=send, fault=fault)
    gone = MemberGone("a", a.me.incarnation)
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr(fleet.host.files, "write_in_place", full)
        await coordinator._gone(launcher, SimpleNamespace(number=1), gone)
    await coordinator._gone(launcher, SimpleNamespace(number=2), gone)
    assert told == ["not_kept", []]


async def test_a_state_file_that_cannot_be_read_is_a_lost_one(fleet: Fleet) -> None:
    await start(fleet, "a")
    await fleet.client.pause(owner="trainer")
    await fleet.stop_coordinator()
    (fleet.directory / "coordinator" / "coordinator.state").write_text('{"fleet": 1')
    coordinator = await fleet.start_coordinator(expected=["a"], recovering_s=5.0)
    await fleet.until(lambda: coordinator.fleet.phase == "LEADING")
    await fleet.ready("a", state="PAUSED")
    assert [h.owner for h in (await fleet.client.status()).holds] == ["trainer"]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (Command("UNPAUSE", "t", "1"), "UNPAUSE is refused at epoch .*RUNNING.*it runs"),
        (Command("RESUME", "t", "1"), "RESUME is refused at epoch .*RUNNING"),
        (Command("STOP", "t", "1"), "STOP is refused at epoch .*RUNNING.*PAUSE first"),
        (Command("UPDATE", "t", "1", version="7"), "UPDATE is refused at epoch .*RUNNING.*PAUSE first"),
        (Command("HALT", "t", "1"), "'HALT' is no command; there are"),
        (Command("PAUSE", "t", "1", mode="gently"), "'gently' is no pause mode; there are wait, keep, abort"),
        (Command("PAUSE", "t", "1", timeout_s=-1), "timeout_s must be above 0"),
        (Command("PAUSE", "t", "1", hold_seconds=0), "hold_seconds must be above 0"),
    ],
)
async def test_an_illegal_command_is_told_to_its_client_and_changes_nothing(
    fleet: Fleet, command: Command, sentence: str
) -> None:
    """megatron.md §4.3 hole 11: refusals are not told to the client."""
    coordinator = await fleet.start_coordinator()
    await fleet.engine("a")
    await fleet.until(lambda: coordinator.fleet.phase == "LEADING")
    before = coordinator.fleet
    with pytest.raises(ChannelFault, match=sentence):
        await fleet.client.run(command)
    assert coordinator.fleet == before


async def test_a_command_that_one_engine_cannot_follow_is_refused_by_its_name(fleet: Fleet) -> None:
    coordinator = (await start(fleet, "a")) and fleet.coordinator
    await fleet.client.pause(owner="t")
    before = coordinator.fleet
    for command in (Command("SUSPEND", "t", "1"), Command("UPDATE", "t", "2", version="7")):
        with pytest.raises(ChannelFault, match="a cannot do it; STOP the fleet"):
            await fleet.client.run(command)
    assert coordinator.fleet == before

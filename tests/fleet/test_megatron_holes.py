"""What a fleet of Megatron's coordinator cannot survive, ours does: any command in any phase, who joins, dies or is deaf in any phase.

The numbers are the twenty holes of that coordinator (docs/protocols/holes.md has the whole table, and where the others are tested).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from scripted_engine import ScriptedEngine, continuation_of, read, read_some

from interlock.core.errors import ChannelFault
from interlock.core.limits import TOMBSTONES_MAX
from interlock.fleet.client import CommandFailed
from interlock.fleet.generation import NoMember, RequestFailed
from interlock.wire.engine_messages import Dispatch
from interlock.wire.fleet_messages import CommandProgress

if TYPE_CHECKING:
    from conftest import Fleet

ABLE = ("updates", "suspends")
PROMPT = [11, 22, 33]
PHASES = ("PAUSING", "UPDATING", "SUSPENDING", "RESUMING", "UNPAUSING", "STOPPING")
"""Of a member that takes its time; each is on the way to a target."""
STANDS = {
    "PAUSING": "PAUSED",
    "UPDATING": "PAUSED",
    "SUSPENDING": "SUSPENDED",
    "RESUMING": "PAUSED",
    "UNPAUSING": "RUNNING",
    "STOPPING": "STOPPED",
}
COMMANDS = ("PAUSE", "UNPAUSE", "UPDATE", "SUSPEND", "RESUME", "STOP")
Asking = asyncio.Task[CommandProgress]


async def begin(fleet: Fleet, *names: str, **more: Any) -> list[ScriptedEngine]:
    await fleet.start_coordinator()
    engines = [await fleet.engine(name, abilities=ABLE, **more) for name in names]
    await fleet.start_dispatcher()
    await fleet.ready(*names)
    return engines


def ask(fleet: Fleet, command: str, owner: str = "trainer", timeout_s: float = 20.0) -> Asking:
    """Not awaited: its end is the test's to see."""
    client = fleet.client
    asking: dict[str, Callable[[], Awaitable[CommandProgress]]] = {
        "PAUSE": lambda: client.pause("keep", owner=owner, timeout_s=timeout_s),
        "UNPAUSE": lambda: client.unpause(owner=owner, timeout_s=timeout_s),
        "UPDATE": lambda: client.update_weights("v1", "/weights/v1", owner=owner, timeout_s=timeout_s),
        "SUSPEND": lambda: client.suspend(owner=owner, timeout_s=timeout_s),
        "RESUME": lambda: client.resume(owner=owner, timeout_s=timeout_s),
        "STOP": lambda: client.stop(owner=owner, timeout_s=timeout_s),
    }
    return asyncio.ensure_future(asking[command]())  # type: ignore[return-value]


async def reach(fleet: Fleet, engine: ScriptedEngine, phase: str) -> Asking:
    """`engine` is in that phase and stays there until `hold_steps` is set; the others go on. Returns the command that it answers."""
    before = {"PAUSING": (), "RESUMING": ("PAUSE", "SUSPEND")}.get(phase, ("PAUSE",))
    for command in before:
        await ask(fleet, command)
    engine.hold_steps.clear()
    command = {"PAUSING": "PAUSE", "UPDATING": "UPDATE", "SUSPENDING": "SUSPEND"}.get(phase)
    command = command or {"RESUMING": "RESUME", "UNPAUSING": "UNPAUSE", "STOPPING": "STOP"}[phase]
    asking = ask(fleet, command)
    await engine.until(lambda: engine.member.state == phase)
    return asking


async def outcome(asking: Asking) -> str:
    """ "ok", or why not."""
    try:
        progress = await asking
    except (ChannelFault, CommandFailed) as error:
        return str(error)
    assert progress.ok
    return "ok"


async def run_again(fleet: Fleet) -> None:
    """By any way that is legal from where it is."""
    for _ in range(6):
        status = await fleet.client.status()
        if status.target == "RUNNING":
            return
        if status.target == "SUSPENDED":
            await fleet.client.resume(owner="somebody")
        for hold in status.holds:
            with contextlib.suppress(ChannelFault):
                await fleet.client.unpause(owner="somebody", break_hold_of=hold.owner)
    pytest.fail(f"it does not run again: {status}")


async def serves(fleet: Fleet, *engines: ScriptedEngine) -> None:
    """One request an engine, whole and right."""
    await fleet.ready(*(engine.name for engine in engines))
    for engine in engines:
        generation = fleet.ask(PROMPT, 3, engine=engine.name)
        await engine.until(lambda engine=engine: engine.streams)
        await engine.step(3)
        assert await read(generation) == (continuation_of(PROMPT, 3), "length")


# --- 5 and 11: any command in any phase ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("phase", PHASES)
async def test_any_command_in_any_phase_is_obeyed_or_refused_in_words_and_ends_no_engine(
    fleet: Fleet, phase: str, command: str
) -> None:
    """Holes 5 and 11: a signal that finds an engine on its way kills it, or is dropped in silence."""
    slow, quick = await begin(fleet, "a", "b")
    first = await reach(fleet, slow, phase)
    second = ask(fleet, command, owner="operator")
    epoch = (await fleet.client.status()).epoch
    await asyncio.wait({second}, timeout=0.2)
    refused = second.done() and isinstance(second.exception(), ChannelFault)
    if refused:
        assert "is refused at epoch" in str(second.exception())
        assert (await fleet.client.status()).epoch == epoch, "what is refused changes nothing"
    slow.hold_steps.set()
    ends = {await outcome(first), await outcome(second)}
    assert "ok" in ends, ends
    if (await fleet.client.status()).target == "STOPPED":
        await slow.until(lambda: slow.member.state == "STOPPED")
        return
    await run_again(fleet)
    await serves(fleet, slow, quick)
    assert not slow.member.failed


async def test_a_suspend_without_a_pause_is_refused_at_once(fleet: Fleet) -> None:
    """Hole 11: it was dropped, and its caller waited for a state that could not come."""
    (engine,) = await begin(fleet, "a")
    with pytest.raises(ChannelFault, match=r"SUSPEND is refused at epoch .* RUNNING.*PAUSE first"):
        await asyncio.wait_for(ask(fleet, "SUSPEND"), 2.0)
    assert engine.member.state == "RUNNING"


async def test_two_clients_whose_commands_cross_each_learn_what_became_of_theirs(fleet: Fleet) -> None:
    """No owner, no answer: two clients interleaved freely."""
    (engine,) = await begin(fleet, "a")
    for _ in range(5):
        asked = [ask(fleet, "PAUSE", owner) for owner in ("one", "two")]
        assert {await outcome(asking) for asking in asked} == {"ok"}
        asked = [ask(fleet, "SUSPEND", owner) for owner in ("one", "two")]
        ends = sorted([await outcome(asking) for asking in asked], key=len)
        assert ends[0] == "ok"
        assert "it is suspended" in ends[1]
        assert engine.member.state == "SUSPENDED"
        asked = [ask(fleet, "RESUME", owner) for owner in ("one", "two")]
        assert "ok" in {await outcome(asking) for asking in asked}
        await ask(fleet, "UNPAUSE", "one")
        assert engine.member.state == "PAUSED", "the other one holds it"
        await ask(fleet, "UNPAUSE", "two")
    await serves(fleet, engine)


# --- 3 and 8: who comes or goes in any phase ------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
async def test_who_joins_in_any_phase_adopts_target_and_weights_before_it_gets_work(
    fleet: Fleet, phase: str
) -> None:
    """Hole 8: a late joiner is told nothing."""
    slow, _ = await begin(fleet, "a", "b")
    asking = await reach(fleet, slow, phase)
    late = await fleet.engine("late", abilities=ABLE)
    await late.until(lambda: late.member.state == STANDS[phase])
    updated = [step for step in late.taken if step.step == "UPDATE"]
    assert bool(updated) == (phase == "UPDATING")
    slow.hold_steps.set()
    progress = await asking
    assert {member.name for member in progress.members} == {"a", "b", "late"}
    assert not late.said(Dispatch) or phase == "UNPAUSING"


@pytest.mark.parametrize("phase", PHASES)
async def test_who_dies_in_any_phase_is_reported_gone_and_holds_nobody_up(fleet: Fleet, phase: str) -> None:
    """Hole 3: a dead rank hangs the others, with no time-out and no report."""
    slow, quick = await begin(fleet, "a", "b")
    asking = await reach(fleet, slow, phase)
    await slow.close()
    await fleet.client.member_gone("a", slow.me.incarnation)
    progress = await asking
    assert {m.name: m.outcome for m in progress.members} == {"a": "gone", "b": "standing"}
    assert quick.member.state == STANDS[phase]
    if phase != "STOPPING":
        await run_again(fleet)
        await serves(fleet, quick)


@pytest.mark.parametrize("phase", PHASES)
async def test_a_coordinator_that_dies_in_any_phase_finishes_what_it_began(fleet: Fleet, phase: str) -> None:
    """Hole 4: nobody notices its death, and nothing comes of the command."""
    slow, quick = await begin(fleet, "a", "b")
    asking = await reach(fleet, slow, phase)
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    slow.hold_steps.set()
    assert (await asking).ok
    assert slow.member.state == quick.member.state == STANDS[phase]
    if phase != "STOPPING":
        await run_again(fleet)
        await serves(fleet, slow, quick)


# --- 7: who was away --------------------------------------------------------------------------------------------------------


async def test_a_member_that_missed_twenty_rounds_takes_no_step_for_them(fleet: Fleet) -> None:
    """Hole 7: what a busy rank did not read was repaid, one broadcast a loop, at the next UNPAUSE."""
    slow, quick = await begin(fleet, "a", "b")
    hear = slow._hear
    slow._hear = lambda told: None  # type: ignore[method-assign]
    for _ in range(10):
        paused = ask(fleet, "PAUSE", timeout_s=60.0)
        await quick.until(lambda: quick.member.state == "PAUSED")
        unpaused = ask(fleet, "UNPAUSE", timeout_s=60.0)
        await quick.until(lambda: quick.member.state == "RUNNING")
        paused.cancel()
        unpaused.cancel()
    assert len(quick.taken) >= 20
    taken = len(slow.taken)
    slow._hear = hear  # type: ignore[method-assign]
    await serves(fleet, slow, quick)
    assert len(slow.taken) == taken, "it hears where the fleet is now, and is there"


# --- 10: what a stop leaves -------------------------------------------------------------------------------------------------


async def test_a_stop_ends_running_and_waiting_requests_by_name(fleet: Fleet) -> None:
    """Hole 10: the futures of requests in flight stayed pending for ever."""
    (engine,) = await begin(fleet, "a")
    running = fleet.ask(PROMPT, 400)
    await engine.until(lambda: engine.streams)
    await engine.step(2)
    assert await read_some(running, 2) == continuation_of(PROMPT, 2)
    await ask(fleet, "PAUSE")
    waiting = fleet.ask([5], 4)
    await ask(fleet, "STOP")
    with pytest.raises(RequestFailed, match="stopped"):
        await read(waiting)
    await engine.close()
    await fleet.client.member_gone("a", engine.me.incarnation)
    with pytest.raises((RequestFailed, NoMember), match="stopped"):
        await read(running)
    assert fleet.dispatcher is not None
    assert not len(fleet.dispatcher.ledger)
    with pytest.raises(NoMember, match="stopped"):
        fleet.ask([1], 1)


# --- 16: a step that fails on one engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["SUSPEND", "RESUME"])
async def test_a_step_that_fails_on_one_engine_is_told_by_its_name_and_can_be_asked_for_again(
    fleet: Fleet, step: str
) -> None:
    """Hole 16: an exception in suspend or resume killed that rank and hung the others; nothing was rolled back."""
    bad, good = await begin(fleet, "a", "b")
    running = fleet.ask(PROMPT, 6, engine="a")
    await bad.until(lambda: bad.streams)
    await bad.step(2)
    await ask(fleet, "PAUSE")
    if step == "RESUME":
        await ask(fleet, "SUSPEND")
    bad.fails[step] = True
    with pytest.raises(CommandFailed, match="a failed on the way") as failed:
        await ask(fleet, step)
    assert failed.value.progress is not None
    assert {m.name: m.outcome for m in failed.value.progress.members} == {"a": "failed", "b": "standing"}
    assert bad.member.state == ("SUSPENDED" if step == "RESUME" else "PAUSED"), "as it was before"
    assert bad.member.failed == f"no {step} today"
    bad.fails.clear()
    if step == "RESUME":
        await ask(fleet, "SUSPEND")  # back to where all are alike
        await ask(fleet, "RESUME")
    else:
        await ask(fleet, "RESUME")
        await ask(fleet, "SUSPEND")
        await ask(fleet, "RESUME")
    await ask(fleet, "UNPAUSE")
    await fleet.ready("a", "b")
    await bad.step(4)
    assert await read(running) == (continuation_of(PROMPT, 6), "length")
    await serves(fleet, good)


async def test_a_suspend_that_failed_half_way_ends_that_engine_and_no_other(fleet: Fleet) -> None:
    """Hole 16: memory that nobody can describe is not served from."""
    bad, good = await begin(fleet, "a", "b")
    running = fleet.ask(PROMPT, 6, engine="a")
    await bad.until(lambda: bad.streams)
    await bad.step(2)
    await ask(fleet, "PAUSE")
    bad.fails["SUSPEND"] = False
    asking = ask(fleet, "SUSPEND")
    await bad.until(lambda: bad.member.state == "STOPPED")
    await bad.close()
    await fleet.client.member_gone("a", bad.me.incarnation)
    assert "a failed on the way" in await outcome(asking) or asking.result().ok
    await run_again(fleet)
    await good.until(lambda: good.streams)
    await good.step(4)
    assert await read(running) == (continuation_of(PROMPT, 6), "length")


# --- 1.6: who speaks nonsense -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["coordinator", "engine"])
@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"\x00\x00\x00\x05junk!",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x02\x93\x01",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(range(256)) * 64,
    ],
    ids=["nothing", "no message", "a length without end", "half a message", "http", "noise"],
)
async def test_bytes_that_are_no_message_end_their_own_connection_alone(
    fleet: Fleet, where: str, words: bytes
) -> None:
    """megatron.md §1.6: bytes that are not msgpack, a wrong frame, an unknown header: traceback, and exit 1."""
    (engine,) = await begin(fleet, "a")
    path = (fleet.address if where == "coordinator" else engine.address).removeprefix("unix:")
    for _ in range(3):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(words)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 10.0)
        writer.close()
    await ask(fleet, "PAUSE")
    await ask(fleet, "UNPAUSE")
    await serves(fleet, engine)


# --- 20: nothing grows ----------------------------------------------------------------------------------------------------------


async def test_requests_that_have_ended_leave_nothing_in_any_table(fleet: Fleet) -> None:
    """Hole 20: request maps, hash tables and sets of aborted ids that only grew."""
    await begin(fleet, "a", instant=True)
    dispatcher = fleet.dispatcher
    assert dispatcher is not None
    for _ in range(20):
        generations = [fleet.ask([n], 1 + n % 3) for n in range(20)]
        await generations[0].abort()
        await asyncio.gather(*(read(generation) for generation in generations[1:]))
    await fleet.until(lambda: not len(dispatcher.ledger))
    requests = dispatcher._requests
    tables = (
        requests._generations,
        requests.avoided,
        requests.queue,
        requests.deadlines,
        requests.unread,
        dispatcher._errands,
        requests.ledger._of_life,
    )
    assert not any(tables), tables
    assert len(requests.deadlines._reminders) < TOMBSTONES_MAX
    assert dispatcher.in_flight() == {"": 0}


# --- the whole life, one command after the other ------------------------------------------------------------------------------


async def test_the_whole_life_of_a_fleet(fleet: Fleet) -> None:
    """What Megatron's own lifecycle test looks at, in our words (megatron.md §5, test_control_logic_lifecycle)."""
    a, b = await begin(fleet, "a", "b")
    for command in ("SUSPEND", "RESUME", "STOP"):
        assert "is refused" in await outcome(ask(fleet, command)), "from RUNNING"
    in_flight = fleet.ask(PROMPT, 10, engine="a")
    await a.until(lambda: a.streams)
    await a.step(3)
    first = await ask(fleet, "PAUSE")
    assert (await ask(fleet, "PAUSE")).epoch == first.epoch, "a second one changes nothing"
    assert len(a.streams) == 1, "what was running is kept, not drained"
    waiting = [fleet.ask([n], 2) for n in range(4)]
    await ask(fleet, "SUSPEND")
    for _ in range(2):
        assert "RESUME makes it PAUSED" in await outcome(ask(fleet, "PAUSE"))
    assert a.member.state == b.member.state == "SUSPENDED"
    assert (await fleet.client.status()).target == "SUSPENDED"
    assert "RESUME first" in await outcome(ask(fleet, "UNPAUSE"))
    await ask(fleet, "RESUME")
    assert a.member.state == b.member.state == "PAUSED"
    assert not any(engine.said(Dispatch) for engine in (b,)), "nothing began while it stood"
    await ask(fleet, "UNPAUSE")
    await fleet.ready("a", "b")
    await fleet.until(lambda: len(a.streams) + len(b.streams) == 5)
    await a.step(7)
    await b.step(2)
    assert await read(in_flight) == (continuation_of(PROMPT, 10), "length")
    for n, generation in enumerate(waiting):
        assert (await read(generation))[0] == continuation_of([n], 2)
    doomed = fleet.ask(PROMPT, 10)
    await fleet.until(lambda: len(a.streams) + len(b.streams) == 1)
    await ask(fleet, "PAUSE")
    await ask(fleet, "STOP")
    assert a.member.state == b.member.state == "STOPPED"
    assert fleet.dispatcher is not None
    await fleet.dispatcher.close()
    with pytest.raises(RequestFailed, match="shutting down"):
        await read(doomed)


@pytest.mark.parametrize("phase", PHASES)
async def test_an_abort_in_any_phase_ends_the_request_everywhere(fleet: Fleet, phase: str) -> None:
    """An ABORT while suspended raised AttributeError and ended the engine."""
    slow, _ = await begin(fleet, "a", "b")
    generation = fleet.ask(PROMPT, 50, engine="a")
    await slow.until(lambda: slow.streams)
    await slow.step(2)
    asking = await reach(fleet, slow, phase)
    await generation.abort()
    await slow.until(lambda: not slow.streams)
    slow.hold_steps.set()
    assert (await asking).ok
    assert fleet.dispatcher is not None
    assert not len(fleet.dispatcher.ledger)

"""Requests outlive their processes: suspended to disk and started again, or recovered from the engine by a front's next life.

Real coordinator, runner and dispatcher over real sockets, the model alone is scripted: its tokens are a function of the whole
sequence, so that what was lost, repeated or changed shows. A *crash* lets nobody say a last word. (Real processes, SIGKILLed:
tests/real/test_suspend_and_restart.py.)
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from scripted_engine import continuation_of, read, read_some
from step_model import StepModel

from interlock.core.errors import ChannelFault
from interlock.engines.keeping import RequestsFile
from interlock.engines.runner import Runner, RunnerConfig
from interlock.fleet.client import CommandFailed
from interlock.fleet.dispatcher import Dispatcher
from interlock.fleet.generation import Generation, RequestFailed
from interlock.host.files import RealFiles
from interlock.telemetry.events import EventLog
from interlock.wire.identity import load_identity

if TYPE_CHECKING:
    from conftest import Fleet

PROMPT = [11, 22, 33]
OWNER = "t"


class Machine:
    """One machine's fleet of one engine: its processes live and die here, its directories stay."""

    def __init__(self, fleet: Fleet, *, moves: bool = False) -> None:
        self.fleet, self.moves = fleet, moves
        self.model = StepModel(moves=moves)
        self.runner: Runner | None = None
        self.front: Dispatcher | None = None
        self.events = EventLog(fleet.host.clock)
        self._life: asyncio.Task[int] | None = None

    @property
    def state(self) -> str:
        assert self.runner is not None
        return self.runner.member_state.state

    def file_of(self, part: str) -> Path:
        return self.fleet.directory / part / "requests.bin"

    async def boot(self, state: str = "RUNNING") -> None:
        await self.fleet.start_coordinator()
        self.start_engine()
        await self.start_front()
        await self.fleet.ready("engine", state=state)

    def start_engine(self) -> None:
        home = self.fleet.directory / "engine"
        self.model = StepModel(moves=self.moves)
        config = RunnerConfig(
            name="engine",
            address=f"unix:{self.fleet.directory}/engine.sock",
            coordinator=self.fleet.address,
            state_dir=home,
            version="0",
        )
        self.runner = Runner(self.fleet.host, self.model, config)  # type: ignore[arg-type]
        self._life = asyncio.create_task(self.runner.run())

    async def start_front(self) -> Dispatcher:
        home = self.fleet.directory / "front"
        self.fleet.host.files.make_private_dir(home)
        me = load_identity(self.fleet.host, home, "front")
        self.front = Dispatcher(self.fleet.host, me, self.fleet.address, events=self.events, keep_in=home)
        self.fleet.dispatcher = self.front
        await self.front.start()
        return self.front

    async def crash_front(self) -> None:
        assert self.front is not None
        front, self.front, self.fleet.dispatcher = self.front, None, None
        for task in [*front._tasks, *front._errands]:
            task.cancel()
        await asyncio.gather(*front._tasks, *front._errands, return_exceptions=True)
        assert front._view is not None
        await front._view.close()
        await asyncio.gather(*(link.close() for link in front._links.values()))

    async def crash_engine(self) -> None:
        assert self._life is not None
        self._life.cancel()
        await asyncio.gather(self._life, return_exceptions=True)

    async def crash_all(self) -> None:
        await self.crash_front()
        await self.crash_engine()
        await self.fleet.stop_coordinator()

    async def suspend(self) -> None:
        await self.fleet.client.pause(owner=OWNER)
        await self.fleet.client.suspend(owner=OWNER)

    async def go_on(self) -> None:
        await self.fleet.client.resume(owner=OWNER)
        await self.fleet.client.unpause(owner=OWNER)
        await self.fleet.ready("engine")

    async def begun(self, count: int, made: int, **more: Any) -> tuple[Generation, list[int]]:
        """A stream that has read `made` of its `count` tokens."""
        generation = self.fleet.ask(PROMPT, count, **more)
        await self.model.until_running(1)
        await self.model.step(made)
        return generation, await read_some(generation, made)

    async def finish(self, generation: Generation, steps: int) -> tuple[list[int], str]:
        await self.model.until_running(1)
        await self.model.step(steps)
        return await read(generation)

    def names(self) -> list[str]:
        return [event.name for event in self.events.since(0)]


@pytest.fixture
async def machine(fleet: Fleet) -> Any:
    made: list[Machine] = []

    def make(*, moves: bool = False) -> Machine:
        made.append(Machine(fleet, moves=moves))
        return made[-1]

    yield make
    for one in made:
        if one.front is not None:
            await one.front.close()
        if one._life is not None:
            await one.crash_engine()


Make = Callable[..., Machine]


def full_for(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """The disk takes this file no more."""
    write = RealFiles.write_durably

    def full(self: RealFiles, where: Path, data: bytes) -> None:
        if where == path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, where, data)

    monkeypatch.setattr(RealFiles, "write_durably", full)


@pytest.mark.parametrize("moves", [False, True])
async def test_a_suspended_fleet_that_was_ended_whole_goes_on_where_it_was(
    machine: Make, moves: bool
) -> None:
    one = machine(moves=moves)
    await one.boot()
    generation, head = await one.begun(12, 5, logprobs=0)
    await one.suspend()
    await one.crash_all()
    await one.boot("SUSPENDED")
    with pytest.raises(ChannelFault, match="RESUME first"):
        await one.fleet.client.unpause(owner=OWNER)
    assert not one.model.sequences, "nothing is computed before the fleet runs"
    await one.go_on()
    assert one.front is not None
    taken_up = one.front.take_up(generation.request.id)
    tokens, finish = await one.finish(taken_up, 7)
    assert tokens[:5] == head
    assert (tokens, finish) == (continuation_of(PROMPT, 12), "length")
    assert taken_up.attempts == 1, "its engine had it still: nothing was dispatched again"
    assert bool(one.model.put_back) == moves
    assert not one.front.ledger.entries()


async def test_what_the_engine_made_and_nobody_heard_before_the_end_comes_exactly_once(machine: Make) -> None:
    """The front's file has fewer tokens than the engine's, which are heard when the fleet runs."""
    one = machine()
    await one.boot()
    generation, head = await one.begun(9, 2)
    assert one.front is not None
    (link,) = one.front._links.values()
    hears, link._owner.on_tokens = link._owner.on_tokens, _deaf  # type: ignore[method-assign]
    await one.model.step(3)
    await one.suspend()
    link._owner.on_tokens = hears  # type: ignore[method-assign]
    await one.crash_all()
    await one.boot("SUSPENDED")
    await one.go_on()
    tokens, _ = await one.finish(one.front.take_up(generation.request.id), 4)
    assert len(head) == 2
    assert tokens == continuation_of(PROMPT, 9)
    assert len(one.model.generated) == 1


def _deaf(*_: object) -> None:
    return


async def test_logprobs_and_versions_of_delivered_tokens_outlive_the_front(machine: Make) -> None:
    one = machine()
    await one.boot()
    generation, _ = await one.begun(6, 4, logprobs=0)
    await one.suspend()
    await one.crash_all()
    await one.boot("SUSPENDED")
    await one.go_on()
    assert one.front is not None
    taken_up = one.front.take_up(generation.request.id)
    await one.model.until_running(1)
    await one.model.step(2)
    pieces = [piece async for piece in taken_up]
    logprobs = [entry.logprob for piece in pieces for entry in piece.logprobs]
    assert logprobs == [-float(len(PROMPT) + n) for n in range(1, 7)]
    assert sum(span.tokens for piece in pieces for span in piece.made) == 6
    assert {span.version for piece in pieces for span in piece.made} == {"0"}


@pytest.mark.parametrize("harm", ["torn", "foreign", "lost"])
async def test_without_the_engines_file_the_front_continues_from_what_was_delivered(
    machine: Make, harm: str
) -> None:
    one = machine()
    await one.boot()
    generation, _ = await one.begun(8, 3)
    await one.suspend()
    await one.crash_all()
    _harm(one.file_of("engine"), harm, other=one.file_of("front"))
    await one.boot("SUSPENDED")
    await one.go_on()
    assert one.front is not None
    taken_up = one.front.take_up(generation.request.id)
    tokens, _ = await one.finish(taken_up, 5)
    assert tokens == continuation_of(PROMPT, 8)
    assert taken_up.attempts == 2
    assert (list(one.file_of("engine").parent.glob("*unreadable*")) != []) == (harm != "lost")


@pytest.mark.parametrize("harm", ["torn", "foreign", "lost"])
async def test_without_the_fronts_file_the_engine_tells_it_what_it_had(machine: Make, harm: str) -> None:
    one = machine()
    await one.boot()
    generation, _ = await one.begun(8, 3)
    await one.suspend()
    await one.crash_all()
    _harm(one.file_of("front"), harm, other=one.file_of("engine"))
    await one.boot("SUSPENDED")
    await one.go_on()
    assert one.front is not None
    taken_up = one.front.take_up(generation.request.id)
    tokens, _ = await one.finish(taken_up, 5)
    assert tokens == continuation_of(PROMPT, 8)
    assert taken_up.attempts == 1
    assert ("kept_requests_unreadable" in one.names()) == (harm != "lost")


def _harm(path: Path, harm: str, other: Path) -> None:
    match harm:
        case "torn":
            path.write_bytes(path.read_bytes()[:-7])
        case "foreign":
            path.write_bytes(other.read_bytes())
        case "lost":
            path.unlink()


async def test_a_disk_that_takes_no_requests_leaves_the_engine_paused_and_the_command_says_why(
    machine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = machine()
    await one.boot()
    generation, _ = await one.begun(6, 2)
    with monkeypatch.context() as patch:
        full_for(patch, one.file_of("engine"))
        with pytest.raises(
            CommandFailed,
            match=r"engine failed on the way: .*No space left.*make room there: it is tried again by itself",
        ):
            await one.suspend()
    assert one.state == "PAUSED"
    assert "suspend" not in one.model.calls, "its memory is not given up"
    await one.fleet.client.resume(owner=OWNER)
    await one.fleet.client.suspend(owner=OWNER)
    assert one.state == "SUSPENDED"
    await one.go_on()
    assert (await one.finish(generation, 4))[0] == continuation_of(PROMPT, 6)[2:]


async def test_a_front_that_cannot_keep_its_requests_keeps_the_fleet_from_being_suspended(
    machine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = machine()
    await one.boot()
    generation, _ = await one.begun(6, 2)
    with monkeypatch.context() as patch:
        full_for(patch, one.file_of("front"))
        with pytest.raises(CommandFailed, match=r"front could not keep its requests: .*No space left"):
            await one.suspend()
    await one.fleet.client.resume(owner=OWNER)
    await one.fleet.client.suspend(owner=OWNER)
    await one.go_on()
    assert (await one.finish(generation, 4))[0] == continuation_of(PROMPT, 6)[2:]


async def test_an_engine_does_not_step_while_what_it_kept_cannot_be_taken_back(
    machine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that came true again after more tokens were told would be a lie."""
    one = machine()
    await one.boot()
    await one.begun(6, 2)
    await one.suspend()
    await one.fleet.client.resume(owner=OWNER)
    with monkeypatch.context() as patch:
        full_for(patch, one.file_of("engine"))
        with pytest.raises(CommandFailed, match="cannot be taken back"):
            await one.fleet.client.unpause(owner=OWNER)
        assert one.model.paused is not None
    await one.fleet.client.pause(owner=OWNER)
    await one.fleet.client.unpause(owner=OWNER)
    assert one.model.paused is None


async def test_an_engine_whose_disk_was_full_at_the_unpause_runs_once_it_is_not_though_nobody_asks_again(
    machine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command was answered with the failure, and the fleet runs: an UNPAUSE would be refused."""
    monkeypatch.setattr("interlock.engines.member.STEP_RETRY_SECONDS_MIN", 0.05)
    one = machine()
    await one.boot()
    generation, _ = await one.begun(6, 2)
    await one.suspend()
    await one.fleet.client.resume(owner=OWNER)
    with monkeypatch.context() as patch:
        full_for(patch, one.file_of("engine"))
        with pytest.raises(CommandFailed, match="cannot be taken back"):
            await one.fleet.client.unpause(owner=OWNER)
        assert one.model.paused is not None
    await one.fleet.ready("engine")
    assert (await one.finish(generation, 4))[0] == continuation_of(PROMPT, 6)[2:]


async def test_requests_on_disk_are_not_there_once_the_fleet_runs(machine: Make) -> None:
    """A second start after the fleet ran on must not bring back what was delivered past."""
    one = machine()
    await one.boot()
    generation, _ = await one.begun(20, 3)
    await one.suspend()
    await one.go_on()
    await one.model.step(4)
    assert len(await read_some(generation, 4)) == 4
    await one.crash_all()
    await one.boot()
    assert one.front is not None
    assert one.front.known(generation.request.id) is None
    assert not one.model.sequences


async def test_a_front_that_died_finds_its_streams_with_the_engine_and_no_token_changes(
    machine: Make,
) -> None:
    one = machine()
    await one.boot()
    generation, _ = await one.begun(10, 3)
    await one.crash_front()
    await one.model.step(2)
    front = await one.start_front()
    await one.fleet.until(lambda: front.recovered, "the engine has told what it holds")
    taken_up = front.take_up(generation.request.id)
    tokens, finish = await one.finish(taken_up, 5)
    assert (tokens, finish, taken_up.attempts) == (continuation_of(PROMPT, 10), "length", 1)
    assert len(one.model.generated) == 1


async def test_an_answer_that_ended_before_its_client_came_back_is_read_whole_and_twice_if_need_be(
    machine: Make,
) -> None:
    one = machine()
    await one.boot()
    generation, _ = await one.begun(5, 2)
    await one.crash_front()
    await one.model.step(3)
    front = await one.start_front()
    await one.fleet.until(lambda: not one.model.sequences and not front.ledger.entries() and front.recovered)
    for _ in range(2):
        assert await read(front.take_up(generation.request.id)) == (continuation_of(PROMPT, 5), "length")


async def test_a_newer_reader_cuts_an_older_one_off_who_can_end_the_request_no_more(machine: Make) -> None:
    one = machine()
    await one.boot()
    generation, _ = await one.begun(6, 2)
    assert one.front is not None
    newer = one.front.take_up(generation.request.id)
    with pytest.raises(RequestFailed, match="another connection"):
        await read(generation)
    await generation.abort()
    assert await one.finish(newer, 4) == (continuation_of(PROMPT, 6), "length")


async def test_what_nobody_takes_up_in_time_is_ended_in_the_engine_too(
    machine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.fleet.parked.TAKE_UP_SECONDS_MAX", 0.3)
    one = machine()
    await one.boot()
    generation, _ = await one.begun(10, 3)
    await one.crash_front()
    front = await one.start_front()
    await one.fleet.until(lambda: one.model.aborted, "the engine was told to end it")
    with pytest.raises(KeyError):
        front.take_up(generation.request.id)
    assert not front.ledger.entries()


async def test_time_stands_still_for_deadlines_and_absent_clients_while_the_fleet_is_suspended(
    machine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.fleet.parked.TAKE_UP_SECONDS_MAX", 0.3)
    one = machine()
    await one.boot()
    generation, _ = await one.begun(6, 2, deadline_s=1.0)
    await one.suspend()
    await one.crash_all()
    await one.boot("SUSPENDED")
    await asyncio.sleep(1.2)  # longer than both
    assert one.front is not None
    assert one.front.known(generation.request.id) is not None
    taken_up = one.front.take_up(generation.request.id)
    await one.go_on()
    assert (await one.finish(taken_up, 4))[0] == continuation_of(PROMPT, 6)


async def test_a_request_that_was_never_dispatched_outlives_the_suspension_too(machine: Make) -> None:
    one = machine()
    await one.boot()
    await one.fleet.client.pause(owner=OWNER)
    waiting = one.fleet.ask(PROMPT, 3)
    await one.fleet.client.suspend(owner=OWNER)
    await one.crash_all()
    await one.boot("SUSPENDED")
    await one.go_on()
    assert one.front is not None
    assert await one.finish(one.front.take_up(waiting.request.id), 3) == (
        continuation_of(PROMPT, 3),
        "length",
    )


async def test_a_front_that_leaves_in_order_leaves_a_suspended_fleets_requests_alone(machine: Make) -> None:
    """Ctrl-C on a suspended fleet ends no request: its reader is told, the engine and the disk are not."""
    one = machine()
    await one.boot()
    generation, _ = await one.begun(7, 3)
    await one.suspend()
    assert one.front is not None
    await one.front.close()
    with pytest.raises(RequestFailed, match="shutting down"):
        await read(generation)
    await generation.abort()
    await one.crash_all()
    await one.boot("SUSPENDED")
    await one.go_on()
    taken_up = one.front.take_up(generation.request.id)
    assert await one.finish(taken_up, 4) == (continuation_of(PROMPT, 7), "length")
    assert taken_up.attempts == 1


async def test_a_stopped_engines_next_life_finds_no_request_of_the_suspension_before(machine: Make) -> None:
    one = machine()
    await one.boot()
    await one.begun(7, 3)
    await one.suspend()
    stopping = asyncio.create_task(one.fleet.client.stop(owner=OWNER))
    assert one._life is not None
    async with asyncio.timeout(10):
        assert await asyncio.shield(one._life) == 0
    await one.fleet.client.member_gone("engine", 0)
    assert (await stopping).ok
    assert RequestsFile(one.fleet.host, one.file_of("engine").parent, "engine").load() == []


async def test_an_answer_that_ended_under_a_slow_reader_outlives_its_front(machine: Make) -> None:
    """Its end was heard and not read, so it was not acknowledged: the engine has all of it still."""
    one = machine()
    await one.boot()
    generation, _ = await one.begun(5, 2)
    await one.model.step(3)
    front = one.front
    assert front is not None
    await one.fleet.until(lambda: not front.ledger.entries(), "the front has heard its end")
    await one.crash_front()
    front = await one.start_front()
    await one.fleet.until(lambda: front.recovered, "the engine has told what it holds")
    assert await read(front.take_up(generation.request.id)) == (continuation_of(PROMPT, 5), "length")
    assert len(one.model.generated) == 1


async def test_an_answer_that_was_read_to_its_end_is_nowhere_any_more(machine: Make) -> None:
    one = machine()
    await one.boot()
    generation, _ = await one.begun(5, 2)
    assert await one.finish(generation, 3) == (continuation_of(PROMPT, 5)[2:], "length")
    assert one.runner is not None
    desk = one.runner.desk
    assert desk is not None
    await one.fleet.until(lambda: not desk.requests, "the engine has forgotten it")
    await one.crash_front()
    front = await one.start_front()
    await one.fleet.until(lambda: front.recovered, "the engine has told what it holds")
    with pytest.raises(KeyError):
        front.take_up(generation.request.id)

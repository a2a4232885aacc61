"""An engine that speaks the wire and follows core's member protocol, whose tokens are a function of what it was given.

Greedy by construction: the next token depends on the whole sequence so far, so a continuation from prompt + delivered tokens
gives the undisturbed tokens if, and only if, nothing was lost, repeated or changed. Steps are taken by hand (`step`) or by a
clock (`step_s`). Run as a program it is a process of its own, to be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from interlock.core.errors import InterlockError
from interlock.core.lifecycle import (
    Admission,
    Begin,
    MemberEvent,
    MemberState,
    StepFailed,
    StepFinished,
    TargetHeard,
    admission,
    transition,
)
from interlock.core.targets import Mode, State
from interlock.fleet.generation import Generation
from interlock.fleet.words import target_in_types, target_in_words
from interlock.host.base import Host, Listener
from interlock.host.real import RealHost
from interlock.wire import fleet_messages as wire
from interlock.wire.channel import Channel, connect_channel, serve_channels
from interlock.wire.engine_messages import (
    Abort,
    Acknowledge,
    AcknowledgeAll,
    Cursor,
    Delta,
    Dispatch,
    DispatchAll,
    FromFront,
    Refused,
    Resume,
    Tokens,
)
from interlock.wire.identity import load_identity
from interlock.wire.token_ids import unpack_ids

MODEL_TOKENS = 4096
READ_SECONDS = 20.0


def next_token(sequence: Sequence[int]) -> int:
    digest = hashlib.blake2b(array("I", sequence).tobytes(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 50_000


def continuation_of(prompt: Sequence[int], count: int) -> list[int]:
    """What any number of engines, however disturbed, must deliver."""
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(next_token(sequence))
    return sequence[len(prompt) :]


async def read(generation: Generation) -> tuple[list[int], str]:
    """All tokens, and the end."""
    tokens: list[int] = []
    finish = ""
    async with asyncio.timeout(READ_SECONDS):
        async for piece in generation:
            tokens += piece.token_ids
            finish = piece.finish
    return tokens, finish


async def read_some(generation: Generation, count: int) -> list[int]:
    """At least so many tokens, perhaps a few more."""
    tokens: list[int] = []
    async with asyncio.timeout(READ_SECONDS):
        while len(tokens) < count:
            tokens += (await anext(generation)).token_ids
    return tokens


class Stream(msgspec.Struct):
    dispatch: Dispatch
    tokens: list[int] = []
    sent: int = 0
    finish: str = ""


class ScriptedEngine:
    """`start`, then it registers by itself; `close`. What fronts said stands in `heard`."""

    def __init__(
        self,
        host: Host,
        directory: Path,
        name: str,
        coordinator: str,
        *,
        step_s: float | None = None,
        version: str = "0",
        instant: bool = False,
        abilities: Sequence[str] = (),
    ) -> None:
        host.files.make_private_dir(directory)
        self.host, self.name, self.coordinator = host, name, coordinator
        self.me = load_identity(host, directory, name)
        self.address = f"unix:{directory}/engine.sock"
        self.step_s, self.version, self.instant = step_s, version, instant
        self.abilities = list(abilities)
        self.member = MemberState()
        self.streams: dict[str, Stream] = {}
        self.heard: list[object] = []
        self.targets: list[wire.Target] = []
        self.taken: list[Begin] = []
        self.fail_update: str | None = None
        self.fails: dict[str, bool] = {}
        """Steps that fail, and whether they leave everything as it was."""
        self.refuse_with: str | None = None
        self.repeat_frames = False
        self.hold_steps = asyncio.Event()
        """Clear: a lifecycle step begun is not finished until it is set again."""
        self.hold_steps.set()
        self.load = wire.Load()
        self.reports = 0
        self.channel: Channel | None = None
        self._changed = asyncio.Event()
        self._moved = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: Listener | None = None

    async def start(self) -> None:
        self._listener = await serve_channels(
            self.host, self.address, me=self.me, accept=FromFront, on_channel=self._serve
        )
        self._apply(StepFinished(self.member.attempt, self.version))
        self._spawn(self._keep_connected())
        if self.step_s is not None:
            self._spawn(self._run())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            await self._listener.close()

    async def __aenter__(self) -> ScriptedEngine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- for tests ------------------------------------------------------------------------------------------------

    async def until(self, condition: object) -> None:
        """Waits (bounded by the test's own time-out) until `condition()` is true; it is asked after each event."""
        async with asyncio.timeout(10), self._moved:
            await self._moved.wait_for(condition)  # type: ignore[arg-type]

    def said(self, kind: type) -> list[object]:
        return [body for body in self.heard if isinstance(body, kind)]

    async def step(self, count: int = 1) -> None:
        """So many tokens for each stream that runs, one frame a step."""
        for _ in range(count):
            if self.member.state is not State.RUNNING:
                return
            for stream in self.streams.values():
                self._advance(stream)
            await self.flush()

    async def flush(self) -> None:
        deltas = [d for s in self.streams.values() if (d := self._delta(s)) is not None]
        if deltas and self.channel is not None:
            with contextlib.suppress(ConnectionError):
                for _ in range(2 if self.repeat_frames else 1):
                    await self.channel.send(Tokens(deltas))

    async def say(self, *deltas: Delta) -> None:
        """A frame as the test wants it, true or not."""
        assert self.channel is not None
        await self.channel.send(Tokens(list(deltas)))

    async def drop_front(self) -> None:
        """The connection breaks; the process lives."""
        channel, self.channel = self.channel, None
        assert channel is not None
        await channel.close()

    # --- generation -----------------------------------------------------------------------------------------------

    def _advance(self, stream: Stream) -> None:
        if stream.finish:
            return
        sampling = stream.dispatch.sampling
        stream.tokens.append(next_token([*unpack_ids(stream.dispatch.prompt), *stream.tokens]))
        if stream.tokens[-1] in sampling.stop_token_ids:
            stream.finish = "stop"
        elif len(stream.tokens) >= sampling.max_tokens:
            stream.finish = "length"

    def _delta(self, stream: Stream) -> Delta | None:
        if stream.sent == len(stream.tokens) and not stream.finish:
            return None
        start, stream.sent = stream.sent, len(stream.tokens)
        name, attempt = stream.dispatch.request, stream.dispatch.attempt
        return Delta(
            name, attempt, start, stream.tokens[start:], [], stream.finish, 0, "", self.member.version or ""
        )

    async def _run(self) -> None:
        assert self.step_s is not None
        while True:
            await self.host.clock.sleep_s(self.step_s)
            await self.step()

    # --- fronts ---------------------------------------------------------------------------------------------------

    async def _serve(self, channel: Channel) -> None:
        async for received in channel.messages():
            body = received.body
            self.heard += body.dispatches if isinstance(body, DispatchAll) else [body]
            match body:
                case DispatchAll(dispatches):
                    for dispatch in dispatches:
                        await self._dispatch(channel, dispatch)
                case Resume(streams):
                    self.channel = channel
                    await self._resume(channel, streams)
                case Dispatch() as dispatch:
                    await self._dispatch(channel, dispatch)
                case Abort(request, attempt) | Acknowledge(request, attempt):
                    self._end(request, attempt)
                case AcknowledgeAll(ends):
                    for end in ends:
                        self._end(end.request, end.attempt)
            await self._notify()

    def _end(self, request: str, attempt: int) -> None:
        stream = self.streams.get(request)
        if stream is not None and stream.dispatch.attempt <= attempt:
            del self.streams[request]

    async def _resume(self, channel: Channel, cursors: list[Cursor]) -> None:
        wanted = {cursor.request: cursor for cursor in cursors}
        self.streams = {r: s for r, s in self.streams.items() if r in wanted}
        for request, cursor in wanted.items():
            stream = self.streams.get(request)
            if stream is None or stream.dispatch.attempt != cursor.attempt:
                await channel.send(Refused(request, cursor.attempt, "unknown", "?", self.member.epoch))
            else:
                stream.sent = cursor.start
        await self.flush()

    async def _dispatch(self, channel: Channel, dispatch: Dispatch) -> None:
        verdict = admission(self.member, dispatch.epoch)
        code = self.refuse_with
        if code is None and verdict is not Admission.ADMIT:
            code = "stale_epoch" if verdict is Admission.SENDER_BEHIND else "not_running"
        if code is not None:
            message = f"refused: {verdict}"
            await channel.send(Refused(dispatch.request, dispatch.attempt, code, message, self.member.epoch))
            return
        stream = self.streams[dispatch.request] = Stream(dispatch)
        if self.instant:
            while not stream.finish:
                self._advance(stream)
            delta = self._delta(stream)
            assert delta is not None
            await channel.send(Tokens([delta]))

    # --- membership -----------------------------------------------------------------------------------------------

    def _apply(self, event: MemberEvent) -> None:
        self.member, effects = transition(self.member, event)
        for effect in effects:
            if isinstance(effect, Begin):
                self._spawn(self._take(effect))
        self._changed.set()

    async def _take(self, begin: Begin) -> None:
        await self.hold_steps.wait()
        if begin.step == "PAUSE" and begin.mode is Mode.ABORT:
            for stream in self.streams.values():
                stream.finish = stream.finish or "abort"
            await self.flush()
        self.taken.append(begin)
        if begin.step == "UPDATE" and self.fail_update is not None:
            self._apply(StepFailed(begin.attempt, self.fail_update))
        elif begin.step in self.fails:
            self._apply(StepFailed(begin.attempt, f"no {begin.step} today", self.fails[begin.step]))
        else:
            version = begin.version if begin.step == "UPDATE" else self.member.version
            self._apply(StepFinished(begin.attempt, version))
        await self._notify()

    async def _keep_connected(self) -> None:
        while True:
            with contextlib.suppress(OSError, TimeoutError, InterlockError):
                channel = await connect_channel(
                    self.host,
                    self.coordinator,
                    me=self.me,
                    role="engine",
                    accept=wire.Target,
                    deadline_s=5.0,
                )
                reporter = self._spawn(self._report(channel))
                try:
                    async for received in channel.messages():
                        if isinstance(received.body, wire.Target):
                            self._hear(received.body)
                            await self._notify()
                finally:
                    reporter.cancel()
                    await channel.close()
            await self.host.clock.sleep_s(0.02)

    def _hear(self, told: wire.Target) -> None:
        self.targets.append(told)
        self._apply(TargetHeard(target_in_types(told)))

    async def _report(self, channel: Channel) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                self._changed.clear()
                await channel.send(self.report())
                self.reports += 1
                await self._notify()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await self._changed.wait()

    def report(self) -> wire.MemberReport:
        facts = wire.EngineFacts(self.address, "scripted", MODEL_TOKENS, "scripted", self.abilities)
        told = None
        if self.member.heard is not None:
            told = target_in_words(self.member.heard)
        m = self.member
        return wire.MemberReport(facts, m.state, m.epoch, m.standing, m.version, self.load, told, m.failed)

    async def _notify(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    def _spawn(self, work: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def main(directory: str, name: str, coordinator: str, step_s: str) -> None:
    """`step_s` is "instant" for an engine that answers each dispatch whole and at once."""
    pace: dict[str, Any] = {"instant": True} if step_s == "instant" else {"step_s": float(step_s)}
    abilities = ("updates", "suspends")
    async with ScriptedEngine(RealHost(), Path(directory), name, coordinator, abilities=abilities, **pace):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

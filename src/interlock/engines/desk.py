"""What fronts have asked of this engine: every request with all its tokens, until its end was acknowledged.

Nothing hangs on a message arriving once. A connection to a front may break at any time; the front comes back and says with
`Resume` which streams it still wants and how much of each it holds, and gets the rest. What it does not name is aborted and
forgotten, so neither an abort nor an acknowledgement can be lost with a connection. A front that does not come back within
the grace is treated as one that came back wanting nothing.

A request is named by (front, request) and its attempts only grow: a dispatch of an attempt that is known, or of one before
it, is a repetition and changes nothing; a later one replaces what runs.

Tokens leave in frames: all that one engine step made, of all of a front's requests, in one.

Requests of an earlier life of this engine (`keeping`) wait here until it steps (`go_on`), and are their front's as before. A
front that has died itself asks (`Recover`) what is here of its earlier lives, before it says what it wants of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine

from interlock.core.errors import ChannelClosed, RemoteProtocolError
from interlock.core.identity import Epoch
from interlock.core.lifecycle import Admission
from interlock.core.limits import (
    FRONT_GRACE_SECONDS,
    HELD_BYTES_PER_CALL,
    REQUESTS_IN_FLIGHT_MAX,
)
from interlock.engines.base import (
    Engine,
    EngineGone,
    Progress,
    RequestRejected,
    RequestState,
    Unable,
)
from interlock.engines.continuing import steps_of
from interlock.engines.keeping import KeepFailed, KeptStream
from interlock.engines.streams import (
    DETAIL_CHARS_MAX,
    Front,
    Stream,
    collect,
    kept_stream,
    waiting_stream,
)
from interlock.host.base import Clock
from interlock.wire.channel import Channel
from interlock.wire.engine_messages import (
    Abort,
    Acknowledge,
    AcknowledgeAll,
    Cursor,
    Dispatch,
    DispatchAll,
    Held,
    HeldAll,
    Recover,
    Refused,
    Resume,
    Tokens,
)

_log = logging.getLogger(__name__)

Judge = Callable[[Epoch], tuple[Admission, Epoch, str]]
"""Whether work of this epoch is admitted now; the epoch known here, and the state in words."""

REFUSALS = {
    Admission.SENDER_BEHIND: ("stale_epoch", "a newer epoch, {epoch}, is known here"),
    Admission.MEMBER_BEHIND: ("not_running", "that epoch was not heard here yet, {epoch} is the highest"),
    Admission.NOT_RUNNING: ("not_running", "this engine is {state} at epoch {epoch}"),
}
KEEP_SECONDS_MAX = 5.0
"""What a paused engine's last tokens take to reach the desk."""
KEEP_POLL_SECONDS = 0.005


class Desk:
    """Serves fronts. `judge` says whether a dispatch may begin now; `on_gone` hears that the engine has died."""

    def __init__(
        self,
        clock: Clock,
        engine: Engine,
        judge: Judge,
        on_gone: Callable[[str], None],
        version: Callable[[], str | None] = lambda: None,
        *,
        computes: Callable[[], bool] = lambda: True,
        moves_requests: bool = False,
        max_model_tokens: int | None = None,
    ) -> None:
        self._clock, self._engine, self._judge, self._on_gone = clock, engine, judge, on_gone
        self._version = version  # of the weights, while tokens are made
        self._computes = computes  # whether the engine steps: a front's grace runs only then
        self._moves_requests, self._max_model_tokens = moves_requests, max_model_tokens
        self._fronts: dict[str, Front] = {}
        self._works = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def requests(self) -> int:
        return sum(len(front.streams) for front in self._fronts.values())

    async def serve(self, channel: Channel) -> None:
        """One connection of one front, until it ends. Raises what `Channel.messages` raises."""
        front = self._fronts.setdefault(channel.peer.name, Front(channel.peer.name))
        older, front.channel, front.resumed = front.channel, channel, False
        if older is not None:
            await older.close()  # the newest connection is the one that counts
        if front.expiry is not None:
            front.expiry.cancel()
        sender = asyncio.create_task(self._send_all(front, channel))
        try:
            async for received in channel.messages():
                if front.channel is not channel:  # replaced, perhaps while the older one was closing
                    break
                await self._hear(front, channel, received.body)
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            if front.channel is channel:
                front.channel = None
                front.expiry = self._spawn(self._expire(front))

    async def close(self) -> None:
        """Ends all work here; nothing more is said to anybody."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check_integrity(self) -> None:
        """Raises `AssertionError` when a finished stream still runs, or more went out than there is."""
        for front in self._fronts.values():
            for request, stream in front.streams.items():
                assert request == stream.dispatch.request
                assert stream.sent <= len(stream.tokens)
                assert not stream.logprobs or len(stream.logprobs) == len(stream.tokens)
                running = stream.task is not None and not stream.task.done()
                assert stream.finish or running or not stream.begun, request

    # --- from one life of the engine to the next -----------------------------------------------------------------

    async def kept(self) -> list[KeptStream]:
        """All that is here, for the disk; the engine stands. Raises `KeepFailed`, `EngineGone`."""
        states = {state.work.key: state for state in await self._states()}
        await self._hear_out(states)
        return [
            kept_stream(front, stream, states.get(stream.key, stream.state))
            for front in self._fronts.values()
            for stream in front.streams.values()
        ]

    async def _states(self) -> list[RequestState]:
        if not self._moves_requests:
            return []
        try:
            return await self._engine.states()
        except Unable:
            return []

    async def _hear_out(self, states: dict[str, RequestState]) -> None:
        """What the engine made last may still be on its way from its thread to here."""
        streams = {s.key: s for front in self._fronts.values() for s in front.streams.values()}
        deadline_s = self._clock.monotonic_s() + KEEP_SECONDS_MAX
        for key, state in states.items():
            stream = streams.get(key)
            while stream is not None and not stream.finish and stream.tokens != state.tokens:
                if self._clock.monotonic_s() > deadline_s:
                    heard, made = len(stream.tokens), len(state.tokens)
                    raise KeepFailed(
                        f"request {stream.dispatch.request} has {made} tokens in the engine and {heard} here, though it stands"
                    )
                await self._clock.sleep_s(KEEP_POLL_SECONDS)

    def restore(self, kept: list[KeptStream]) -> None:
        """At the start, before anybody is served: requests of the last life, which wait for `go_on`."""
        for one in kept[:REQUESTS_IN_FLIGHT_MAX]:
            front = self._fronts.setdefault(one.front, Front(one.front))
            front.incarnation = max(front.incarnation, one.front_life)
            self._works += 1
            key = f"{self._works}-{one.dispatch.request}"
            front.streams[one.dispatch.request] = waiting_stream(one, key)
        for front in self._fronts.values():
            front.expiry = self._spawn(self._expire(front))

    def go_on(self) -> None:
        """The engine is about to step: what waited from its last life is given to it."""
        for front, stream in self._waiting():
            stream.begun = True
            stream.task = self._spawn(self._run(front, stream))

    def abort_waiting(self) -> None:
        """A pause that aborts: of what waits for `go_on`, nothing is the engine's to abort."""
        for front, stream in self._waiting():
            self._end(front, stream, "abort", "")

    def _waiting(self) -> list[tuple[Front, Stream]]:
        return [
            (front, stream)
            for front in self._fronts.values()
            for stream in front.streams.values()
            if not stream.begun and not stream.finish
        ]

    # --- what fronts say -----------------------------------------------------------------------------------------

    async def _hear(self, front: Front, channel: Channel, body: object) -> None:
        if not front.resumed and not isinstance(body, Resume | Recover):
            raise RemoteProtocolError(f"{channel.peer} began with {type(body).__name__}, not with Resume")
        match body:
            case Recover(after):
                await self._tell_held(front, channel, after)
            case Resume(streams):
                await self._resume(front, channel, streams)
            case Dispatch() as dispatch:
                await self._dispatch(front, channel, dispatch)
            case DispatchAll(dispatches):
                for dispatch in dispatches:
                    await self._dispatch(front, channel, dispatch)
            case Abort(request, attempt):
                stream = front.streams.get(request)
                if stream is not None and stream.dispatch.attempt <= attempt:
                    self._spawn(self._abort(front, stream))
            case Acknowledge(request, attempt):
                self._acknowledged(front, request, attempt)
            case AcknowledgeAll(ends):
                for end in ends:
                    self._acknowledged(front, end.request, end.attempt)

    def _acknowledged(self, front: Front, request: str, attempt: int) -> None:
        stream = front.streams.get(request)
        if stream is not None and stream.dispatch.attempt <= attempt and stream.finish:
            self._forget(front, stream)

    async def _tell_held(self, front: Front, channel: Channel, after: int) -> None:
        """Some at a time: all prompts together are more than a channel may have waiting."""
        streams = list(front.streams.values())
        told = 0
        for stream in streams[after:]:
            asked = stream.dispatch
            if told > HELD_BYTES_PER_CALL:
                break
            after, told = after + 1, told + len(asked.prompt) + len(asked.note)
            await channel.send(
                Held(asked.request, asked.attempt, asked.prompt, len(stream.tokens), asked.note)
            )
        await channel.send(HeldAll(after, more=after < len(streams)))

    async def _resume(self, front: Front, channel: Channel, cursors: list[Cursor]) -> None:
        wanted = {cursor.request: cursor for cursor in cursors}
        for request, stream in list(front.streams.items()):
            cursor = wanted.get(request)
            if cursor is None or cursor.attempt != stream.dispatch.attempt:
                self._forget(front, stream)
            else:
                stream.sent = min(cursor.start, len(stream.tokens))
                stream.end_sent = False
        if channel.peer.incarnation != front.incarnation:
            front.incarnation = channel.peer.incarnation
            front.forgotten.clear()  # a new life may use its request names again
        front.resumed = True
        for cursor in cursors:
            if cursor.request not in front.streams:
                await self._refuse(channel, cursor, "unknown", "this engine does not run that request")
        front.dirty.set()

    async def _dispatch(self, front: Front, channel: Channel, dispatch: Dispatch) -> None:
        newest = front.newest_attempt(dispatch.request)
        if dispatch.attempt <= newest:
            return  # said again, or late
        verdict, epoch, state = self._judge(dispatch.epoch)
        if verdict is not Admission.ADMIT:
            code, words = REFUSALS[verdict]
            await self._refuse(channel, dispatch, code, words.format(epoch=epoch, state=state))
            return
        if self.requests >= REQUESTS_IN_FLIGHT_MAX:
            words = f"this engine has {self.requests} requests, which is its limit"
            await self._refuse(channel, dispatch, "overloaded", words)
            return
        if (older := front.streams.get(dispatch.request)) is not None:
            self._forget(front, older)
        self._works += 1
        stream = Stream(dispatch, key=f"{self._works}-{dispatch.request}")
        front.streams[dispatch.request] = stream
        stream.task = self._spawn(self._run(front, stream))

    async def _refuse(self, channel: Channel, what: Dispatch | Cursor, code: str, message: str) -> None:
        _, epoch, _ = self._judge(Epoch())
        await channel.send(Refused(what.request, what.attempt, code, message[:DETAIL_CHARS_MAX], epoch))

    # --- what the engine makes -----------------------------------------------------------------------------------

    async def _run(self, front: Front, stream: Stream) -> None:
        try:
            async with contextlib.aclosing(steps_of(self._engine, stream, self._max_model_tokens)) as steps:
                async for progress in steps:
                    self._add(front, stream, progress)
                    if progress.finish:
                        return
            self._end(front, stream, "error", "the engine ended this request without saying how")
        except RequestRejected as error:
            if stream.tokens:  # too late to refuse: what was delivered stands
                self._end(front, stream, "error", str(error))
            else:
                await self._reject(front, stream, str(error))
        except EngineGone as error:
            self._on_gone(str(error))
        except Exception as error:
            _log.exception("request %s failed", stream.key)
            self._end(front, stream, "error", f"the engine failed: {type(error).__name__}: {error}")

    def _add(self, front: Front, stream: Stream, progress: Progress) -> None:
        version = self._version() or ""
        if progress.tokens and (not stream.versions or stream.versions[-1][1] != version):
            stream.versions.append((len(stream.tokens), version))
        stream.tokens += progress.tokens
        stream.logprobs += progress.logprobs
        stream.cached_tokens = progress.cached_tokens
        stream.finish, stream.detail = progress.finish, progress.detail
        front.dirty.set()

    def _end(self, front: Front, stream: Stream, finish: str, detail: str) -> None:
        stream.finish, stream.detail = finish, detail
        front.dirty.set()

    async def _reject(self, front: Front, stream: Stream, why: str) -> None:
        self._forget(front, stream)
        if front.channel is not None and front.resumed:
            with contextlib.suppress(ChannelClosed):
                await self._refuse(front.channel, stream.dispatch, "invalid", why)

    async def _abort(self, front: Front, stream: Stream) -> None:
        if not stream.begun and not stream.finish:
            self._end(front, stream, "abort", "")
            return
        try:
            await self._engine.abort(stream.key)
        except EngineGone as error:
            self._on_gone(str(error))

    def _forget(self, front: Front, stream: Stream) -> None:
        """Nobody wants it any more: it leaves the engine, if it is still there."""
        request = stream.dispatch.request
        if front.streams.get(request) is stream:
            del front.streams[request]
        front.bury(request, stream.dispatch.attempt)
        if stream.task is not None and stream.task is not asyncio.current_task():
            stream.task.cancel()

    # --- what goes out -------------------------------------------------------------------------------------------

    async def _send_all(self, front: Front, channel: Channel) -> None:
        try:
            while True:
                await front.dirty.wait()
                front.dirty.clear()
                # What is collected counts as sent: a connection that was replaced must not take it along.
                while front.channel is channel and front.resumed and (deltas := collect(front)):
                    await channel.send(Tokens(deltas))
        except ChannelClosed:
            return  # what is here goes out on the next connection
        except Exception:  # a defect of ours: the front must not wait for words that nobody sends
            _log.exception("tokens for %s could not be sent; its connection is closed", channel.peer)
            await channel.close()

    async def _expire(self, front: Front) -> None:
        """The front is away. If it stays away for the grace, nobody waits for what it asked. The grace is time in which the engine
        computes: a fleet that stands still is waited for, however long."""
        await self._clock.sleep_s(FRONT_GRACE_SECONDS)
        while not self._computes():
            await self._clock.sleep_s(FRONT_GRACE_SECONDS)
        if front.streams:
            _log.info("front %s is gone: its %d requests are aborted", front.name, len(front.streams))
        for stream in list(front.streams.values()):
            self._forget(front, stream)
        if front.channel is None:
            self._fronts.pop(front.name, None)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

"""What fronts have asked of this engine: every request with all its tokens, until its end was acknowledged.

Nothing hangs on a message arriving once. A connection to a front may break at any time; the front comes back and says with
`Resume` which streams it still wants and how much of each it holds, and gets the rest. What it does not name is aborted and
forgotten, so neither an abort nor an acknowledgement can be lost with a connection. A front that does not come back within
the grace is treated as one that came back wanting nothing.

A request is named by (front, request) and its attempts only grow: a dispatch of an attempt that is known, or of one before
it, is a repetition and changes nothing; a later one replaces what runs.

Tokens leave in frames: all that one engine step made, of all of a front's requests, in one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine

import msgspec

from interlock.core.errors import ChannelClosed, RemoteProtocolError
from interlock.core.identity import Epoch
from interlock.core.lifecycle import Admission
from interlock.core.limits import (
    FRONT_GRACE_SECONDS,
    REQUESTS_IN_FLIGHT_MAX,
    TOKENS_PER_FRAME_MAX,
    TOMBSTONES_MAX,
)
from interlock.engines.base import Engine, EngineGone, Progress, RequestRejected, Work
from interlock.host.base import Clock
from interlock.wire.channel import Channel
from interlock.wire.engine_messages import (
    Abort,
    Acknowledge,
    Cursor,
    Delta,
    Dispatch,
    Refused,
    Resume,
    TokenLogprobs,
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
DETAIL_CHARS_MAX = 512
"""Of an engine's own words: some exceptions quote their whole input, and a frame must stay one that is taken."""


class Stream(msgspec.Struct):
    """One attempt at one request. `sent` counts its tokens that went out on the front's current connection."""

    dispatch: Dispatch
    key: str
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    cached_tokens: int = 0
    finish: str = ""
    detail: str = ""
    versions: list[tuple[int, str]] = []
    """Weights versions that made the tokens: each from which token on."""
    sent: int = 0
    end_sent: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def waits(self) -> bool:
        """Whether something is here that did not go out."""
        return self.sent < len(self.tokens) or (bool(self.finish) and not self.end_sent)


class Front:
    """All that one front, in its current life, has here."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.incarnation = 0
        self.streams: dict[str, Stream] = {}
        self.forgotten: OrderedDict[str, int] = OrderedDict()
        """Highest attempt of requests that are no more, so that a late dispatch does not begin one again."""
        self.channel: Channel | None = None
        self.resumed = False
        self.dirty = asyncio.Event()
        self.expiry: asyncio.Task[None] | None = None

    def bury(self, request: str, attempt: int) -> None:
        self.forgotten[request] = max(attempt, self.forgotten.pop(request, 0))
        if len(self.forgotten) > TOMBSTONES_MAX:
            self.forgotten.popitem(last=False)

    def newest_attempt(self, request: str) -> int:
        stream = self.streams.get(request)
        return stream.dispatch.attempt if stream else self.forgotten.get(request, 0)


class Desk:
    """Serves fronts. `judge` says whether a dispatch may begin now; `on_gone` hears that the engine has died."""

    def __init__(
        self,
        clock: Clock,
        engine: Engine,
        judge: Judge,
        on_gone: Callable[[str], None],
        version: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._clock, self._engine, self._judge, self._on_gone = clock, engine, judge, on_gone
        self._version = version  # of the weights, while tokens are made
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
                assert stream.finish or (stream.task is not None and not stream.task.done()), request

    # --- what fronts say -----------------------------------------------------------------------------------------

    async def _hear(self, front: Front, channel: Channel, body: object) -> None:
        if not front.resumed and not isinstance(body, Resume):
            raise RemoteProtocolError(f"{channel.peer} began with {type(body).__name__}, not with Resume")
        match body:
            case Resume(streams):
                await self._resume(front, channel, streams)
            case Dispatch() as dispatch:
                await self._dispatch(front, channel, dispatch)
            case Abort(request, attempt):
                stream = front.streams.get(request)
                if stream is not None and stream.dispatch.attempt <= attempt:
                    self._spawn(self._abort(stream))
            case Acknowledge(request, attempt):
                stream = front.streams.get(request)
                if stream is not None and stream.dispatch.attempt <= attempt and stream.finish:
                    self._forget(front, stream)

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
        asked = stream.dispatch
        work = Work(
            key=stream.key,
            prompt=asked.prompt,
            sampling=asked.sampling,
            cache_salt=asked.cache_salt,
            priority=asked.priority,
        )
        try:
            async with contextlib.aclosing(self._engine.generate(work)) as steps:
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

    async def _abort(self, stream: Stream) -> None:
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
                while front.channel is channel and front.resumed and (deltas := _collect(front)):
                    await channel.send(Tokens(deltas))
        except ChannelClosed:
            return  # what is here goes out on the next connection
        except Exception:  # a defect of ours: the front must not wait for words that nobody sends
            _log.exception("tokens for %s could not be sent; its connection is closed", channel.peer)
            await channel.close()

    async def _expire(self, front: Front) -> None:
        """The front is away. If it stays away for the grace, nobody waits for what it asked."""
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


def _version_at(stream: Stream, start: int) -> tuple[str, int]:
    """Which weights made the token at `start`, and the first token after it that others made."""
    until, version = len(stream.tokens), ""
    for begin, name in reversed(stream.versions):
        if begin <= start:
            version = name
            break
        until = begin
    return version, until


def _collect(front: Front) -> list[Delta]:
    """What did not go out yet, up to one frame's worth, marked as sent; the rest is the next frame's."""
    deltas, room = [], TOKENS_PER_FRAME_MAX
    for stream in front.streams.values():
        if not stream.waits or room <= 0:
            continue
        start = stream.sent
        version, until = _version_at(stream, start)
        stop = min(until, start + room)
        last = stop == len(stream.tokens)
        finish = stream.finish if last else ""
        deltas.append(
            Delta(
                stream.dispatch.request,
                stream.dispatch.attempt,
                start,
                stream.tokens[start:stop],
                stream.logprobs[start:stop],
                finish,
                stream.cached_tokens,
                stream.detail[:DETAIL_CHARS_MAX] if finish else "",
                version,
            )
        )
        room -= stop - start
        stream.sent, stream.end_sent = stop, bool(finish)
    return deltas

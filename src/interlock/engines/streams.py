"""What one front has asked of this engine: its streams, and what of them goes out next."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import msgspec

from interlock.core.limits import TOKENS_PER_FRAME_MAX, TOMBSTONES_MAX
from interlock.engines.base import RequestState
from interlock.engines.keeping import KeptStream
from interlock.wire.channel import Channel
from interlock.wire.engine_messages import Delta, Dispatch, TokenLogprobs

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
    begun: bool = True
    """False: it came from an earlier life of this engine, and waits until the engine steps again."""
    state: RequestState | None = None
    """What that life's engine knew of it beyond its tokens."""

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


def _version_at(stream: Stream, start: int) -> tuple[str, int]:
    """Which weights made the token at `start`, and the first token after it that others made."""
    until, version = len(stream.tokens), ""
    for begin, name in reversed(stream.versions):
        if begin <= start:
            version = name
            break
        until = begin
    return version, until


def collect(front: Front) -> list[Delta]:
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


def kept_stream(front: Front, stream: Stream, state: RequestState | None) -> KeptStream:
    """For the disk; `state` is what the engine knows of it beyond its tokens."""
    return KeptStream(
        front=front.name,
        front_life=front.incarnation,
        dispatch=stream.dispatch,
        tokens=list(stream.tokens),
        logprobs=list(stream.logprobs),
        cached_tokens=stream.cached_tokens,
        finish=stream.finish,
        detail=stream.detail,
        versions=list(stream.versions),
        state=None if stream.finish else state,
    )


def waiting_stream(kept: KeptStream, key: str) -> Stream:
    """One of an earlier life of the engine, which waits until that steps again."""
    return Stream(
        kept.dispatch,
        key=key,
        tokens=kept.tokens,
        logprobs=kept.logprobs,
        cached_tokens=kept.cached_tokens,
        finish=kept.finish,
        detail=kept.detail,
        versions=kept.versions,
        begun=False,
        state=kept.state,
    )

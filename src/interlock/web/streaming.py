"""Answers on their way to a client: as one JSON body, or as server-sent events.

Until the first token there is still an HTTP status to send, so a stream's headers wait for it, though not for ever. After
that an error can only be an event: the stream then ends without `[DONE]`, so that nobody takes it for whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

import msgspec

from interlock.core.errors import InterlockError
from interlock.core.limits import HTTP_HEADERS_WAIT_SECONDS
from interlock.web.answers import Answer, Gathered, choose_best, encoder
from interlock.web.errors import ApiError, from_failure
from interlock.web.front import Front
from interlock.web.generating import Choices, Piece
from interlock.web.http import EVENTS, Headers, Reply
from interlock.web.requests import Job
from interlock.web.shapes import Usage, usage_of

DONE = b"data: [DONE]\n\n"
STREAM_HEADERS: Headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


def event(chunk: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + encoder.encode(chunk) + b"\n\n"


def events(chunks: Iterable[msgspec.Struct]) -> bytes:
    """Several, for one write."""
    return b"".join(map(event, chunks))


class Run:
    """One job's answer, from `submit` to its last byte. Whatever happens, nothing of it runs on afterwards."""

    def __init__(
        self,
        front: Front,
        job: Job,
        answer: Answer,
        reply: Reply,
        started_s: float,
        choices: Choices | None = None,
    ) -> None:
        """`choices`: of an answer that is taken up; else they are begun here."""
        self._front, self._job, self._answer, self._reply = front, job, answer, reply
        self._started_s = started_s
        self._first_seen = False
        self._choices = choices or Choices(front, job)

    async def send(self) -> None:
        """Raises `ApiError` and `InterlockError` while nothing was sent, and `Disconnected`."""
        try:
            self._choices.begin()
            async with aclosing(self._choices.pieces()) as pieces:
                if self._job.stream:
                    await self._send_stream(pieces)
                else:
                    await self._send_whole(pieces)
        finally:
            await self._choices.close()
            self._count()

    async def _send_whole(self, pieces: AsyncGenerator[Piece, None]) -> None:
        gathered = [Gathered(index) for index in range(len(self._job.prompts) * self._job.best_of)]
        async for piece in pieces:
            self._see(piece)
            gathered[piece.index].add(piece)
        best = choose_best(gathered, self._job.n, self._job.best_of)
        body = encoder.encode(self._answer.whole(best, self._usage()))
        await self._reply.whole(200, body, headers=self._engine_header())

    async def _send_stream(self, pieces: AsyncGenerator[Piece, None]) -> None:
        first = asyncio.ensure_future(anext(pieces))
        try:
            await asyncio.wait((first,), timeout=HTTP_HEADERS_WAIT_SECONDS)
            if first.done():
                first.result()  # a refusal is still a status
            await self._reply.start(200, EVENTS, [*STREAM_HEADERS, *self._engine_header()])
            opening = events(self._answer.opening())
            if opening:
                await self._reply.more(opening)
            await self._send_events(await first, pieces)
        except (InterlockError, ApiError) as error:
            if not self._reply.begun:
                raise
            await self._end_broken(error if isinstance(error, ApiError) else from_failure(error))
            raise
        finally:
            if not first.done():  # or the generator could not be closed
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)

    async def _send_events(self, first: Piece, pieces: AsyncGenerator[Piece, None]) -> None:
        await self._send_piece(first)
        async for piece in pieces:
            await self._send_piece(piece)
        last = DONE
        if self._job.include_usage:
            last = event(self._answer.usage_chunk(self._usage())) + DONE
        await self._reply.more(last)
        await self._reply.end()

    async def _send_piece(self, piece: Piece) -> None:
        self._see(piece)
        data = events(self._answer.chunks(piece))
        if data:
            await self._reply.more(data)

    async def _end_broken(self, error: ApiError) -> None:
        await self._reply.more(b"data: " + error.body + b"\n\n")
        await self._reply.end()

    def _see(self, piece: Piece) -> None:
        if piece.token_ids and not self._first_seen:
            self._first_seen = True
            self._front.metrics.first_token.observe(self._elapsed_s())
        if piece.finish_reason == "abort" and self._front.leaving:
            raise ApiError(503, "This server is shutting down; send the request again.", code="closed")

    def _usage(self) -> Usage:
        choices = self._choices
        return usage_of(choices.prompt_tokens, choices.generated_tokens, choices.cached_tokens, choices.made)

    def _engine_header(self) -> Headers:
        engine = self._choices.engine
        return [(b"x-interlock-engine", engine.encode())] if engine else []

    def _elapsed_s(self) -> float:
        return self._front.host.clock.monotonic_s() - self._started_s

    def _count(self) -> None:
        metrics, choices = self._front.metrics, self._choices
        metrics.duration.observe(self._elapsed_s())
        if self._first_seen:
            metrics.prompt_tokens.inc(choices.prompt_tokens)
            metrics.cached_tokens.inc(choices.cached_tokens)
            metrics.generated_tokens.inc(choices.generated_tokens)

"""One request's answer as its reader sees it: pieces as they come, an end, or an error by name.

The reader may be slow: pieces wait here, joined into one, up to a bound, and nobody else waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from interlock.core.errors import InterlockError
from interlock.core.limits import RETRY_AFTER_SECONDS, STREAM_TOKENS_BUFFER_MAX
from interlock.fleet.ledger import GenerationRequest
from interlock.fleet.made import Made, extended
from interlock.wire.engine_messages import TokenLogprobs

__all__ = [
    "Generated",
    "Generation",
    "Made",
    "NoMember",
    "Overloaded",
    "RequestFailed",
    "extended",
]


class Overloaded(InterlockError):  # noqa: N818 - what is, as in core/errors
    """No room for this request now; it was not begun. Ask again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = RETRY_AFTER_SECONDS) -> None:
        super().__init__(message, retryable=True, hint=f"ask again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class NoMember(InterlockError):  # noqa: N818
    """The fleet has no engine that could ever take this request as things stand."""


class RequestFailed(InterlockError):  # noqa: N818
    """The request ended without its end. `code`: "invalid", "deadline", "cannot_continue", "engine_failed", "slow_reader",
    "no_member", "stopped", "closed", "taken_up", "not_taken_up"."""

    def __init__(self, code: str, message: str, *, hint: str = "", retryable: bool = False) -> None:
        super().__init__(message, hint=hint, retryable=retryable, code=code)
        self.code = code
        self.message = message


class Generated(msgspec.Struct, frozen=True, gc=False):
    """New tokens since the last piece. `finish` is not empty in the last one: "stop", "length" or "abort".

    `logprobs` has one entry a token when the request asked for them. `made`: by which weights, in order. `cached_tokens` counts the tokens of the client's
    prompt whose KV was reused where the request first ran. `detail`: the stop token's id, if one ended it.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish: str
    cached_tokens: int
    detail: str = ""
    made: list[Made] = []


class Generation:
    """Async iterator of `Generated`, made by `Dispatcher.submit`. Leave it by `abort()` if not by its end.

    Iterating raises `Overloaded`, `NoMember` or `RequestFailed`.
    """

    def __init__(
        self,
        request: GenerationRequest,
        abort: Callable[[str], Awaitable[None]],
        on_end_read: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`abort` and `on_end_read` are called with the request's name: its reader leaves it, its reader has its end."""
        self.request = request
        self.engine = ""
        """Name of the engine that runs it, or ran it last; empty before the first dispatch."""
        self.attempts = 0
        """Dispatches so far."""
        self._abort, self._on_end_read = abort, on_end_read
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._made: list[Made] = []
        self._finish = self._detail = ""
        self._cached: int | None = None
        self._error: InterlockError | None = None
        self._reader: asyncio.Future[None] | None = None
        """Waits for something to read: one reader at a time."""
        self._over = False

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Generated:
        if self._over:
            raise StopAsyncIteration
        while not (self._tokens or self._finish or self._error is not None or self._over):
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if self._tokens or self._finish:
            return self._take()
        self._over = True
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def _take(self) -> Generated:
        piece = Generated(
            self._tokens, self._logprobs, self._finish, self._cached or 0, self._detail, self._made
        )
        self._tokens, self._logprobs, self._made = [], [], []
        if self._finish:
            self._over = True
            self._on_end_read(self.request.id)
        return piece

    async def abort(self) -> None:
        """Nobody reads on: the request is ended wherever it runs. Idempotent, harmless after the end."""
        await self._abort(self.request.id)

    # --- the dispatcher's side ------------------------------------------------------------------------------------

    def push(
        self,
        tokens: list[int],
        logprobs: list[TokenLogprobs],
        finish: str,
        cached: int,
        detail: str,
        version: str = "",
    ) -> bool:
        """False: the reader is so far behind that nothing more is kept for it."""
        if len(self._tokens) + len(tokens) > STREAM_TOKENS_BUFFER_MAX:
            return False
        if self._cached is None:
            self._cached = min(cached, len(self.request.prompt))
        self._tokens += tokens
        if tokens:
            self._made = extended(self._made, Made(version, len(tokens)))
        self._logprobs += logprobs
        if finish:
            self._finish, self._detail = finish, detail
        if tokens or finish:
            self._wake()
        return True

    def replay(
        self,
        tokens: list[int],
        logprobs: list[TokenLogprobs],
        made: list[Made],
        cached: int,
    ) -> None:
        """For a reader who takes it up: all that was delivered before, as its first piece."""
        self._tokens, self._logprobs, self._made = list(tokens), list(logprobs), list(made)
        self._cached = min(cached, len(self.request.prompt))
        if tokens:
            self._wake()

    def fail(self, error: InterlockError) -> None:
        """What was delivered before can still be read; then `error` is raised."""
        if not self._finish and self._error is None:
            self._error = error
            self._wake()

    def cut_off(self, error: InterlockError) -> None:
        """The request goes on without this reader, who can end it no more."""
        self._abort, self._on_end_read = _nothing, lambda _: None
        self.fail(error)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def close(self) -> None:
        """Aborted by its own reader: nothing more comes."""
        self._over = True
        self._tokens, self._logprobs, self._made = [], [], []
        self._wake()


async def _nothing(_: str) -> None:
    return

"""The two generation endpoints: who asks, what for, and how it ended."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from starlette.types import Receive, Scope, Send

from interlock.core.errors import InterlockError
from interlock.core.limits import HTTP_BODY_INLINE_BYTES_MAX, NAME_CHARS_MAX, RETRY_AFTER_SECONDS
from interlock.web.answers import Answer
from interlock.web.chat import ChatAnswer
from interlock.web.completions import CompletionAnswer
from interlock.web.errors import SERVER, UNAVAILABLE, ApiError, from_failure, invalid
from interlock.web.front import Front
from interlock.web.http import Body, Disconnected, Reply, bearer_token, header, while_connected
from interlock.web.requests import Job, chat_job, completion_job
from interlock.web.schema import ChatRequest, CompletionRequest, decode
from interlock.web.streaming import Run

log = logging.getLogger(__name__)

R = TypeVar("R", CompletionRequest, ChatRequest)
OUTCOME_OF_STATUS = {401: "refused", 429: "overloaded", 503: "unavailable"}


class GenerationEndpoint(Generic[R]):
    """An ASGI application for one path."""

    def __init__(
        self,
        front: Front,
        name: str,
        kind: type[R],
        job: Callable[[Front, R, str | None], Awaitable[Job]],
        answer: Callable[[Front, Job], Answer],
    ) -> None:
        self._front, self._name, self._answer = front, name, answer
        self._kind: type[R] = kind
        self._job: Callable[[Front, R, str | None], Awaitable[Job]] = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = self._front.host.clock.monotonic_s()
        reply = Reply(send)
        outcome = "ok"
        try:
            await self._serve(scope, receive, reply, started_s)
        except Disconnected:
            outcome = "disconnected"
        except (ApiError, InterlockError) as error:
            said = error if isinstance(error, ApiError) else from_failure(error)
            outcome = OUTCOME_OF_STATUS.get(said.status, "invalid" if said.status < 500 else "failed")
            await self._tell(reply, said)
        except Exception:
            log.exception("a request to %s failed by a defect of ours", scope["path"])
            outcome = "failed"
            message = "The server failed at this request; its log says why."
            await self._tell(reply, ApiError(500, message, kind=SERVER, code="internal_error"))
        finally:
            self._front.metrics.count_request(self._name, outcome)

    async def _serve(self, scope: Scope, receive: Receive, reply: Reply, started_s: float) -> None:
        front = self._front
        check_use(front, scope)
        if front.leaving:
            raise ApiError(
                503,
                "This server is shutting down; ask another.",
                kind=UNAVAILABLE,
                code="closed",
                retry_after_s=RETRY_AFTER_SECONDS,
            )
        engine = header(scope, b"x-interlock-engine")
        if engine is not None and not 0 < len(engine) <= NAME_CHARS_MAX:
            raise invalid("The header x-interlock-engine must name an engine.", "x-interlock-engine")
        body = Body(front)
        try:
            data = await body.read(scope, receive)
            request = await front.off_loop_if_long(
                len(data), lambda: decode(data, self._kind), HTTP_BODY_INLINE_BYTES_MAX
            )
            job = await self._job(front, request, engine)
        finally:
            body.release()
        reply.request_id = job.id
        run = Run(front, job, self._answer(front, job), reply, started_s)
        await while_connected(receive, run.send())

    async def _tell(self, reply: Reply, error: ApiError) -> None:
        """Where nothing was sent yet; a stream that was begun has been told by an event."""
        if reply.begun:
            return
        with contextlib.suppress(Disconnected):
            await reply.error(error)


def check_use(front: Front, scope: Scope) -> None:
    """Raises `ApiError` 401 in OpenAI's words."""
    if not front.access.may_use(bearer_token(scope)):
        raise ApiError(
            401,
            "Incorrect API key provided; send this server's key as `Authorization: Bearer …`.",
            code="invalid_api_key",
        )


def completions_endpoint(front: Front) -> GenerationEndpoint[CompletionRequest]:
    """`POST /v1/completions`."""
    return GenerationEndpoint(front, "completions", CompletionRequest, completion_job, CompletionAnswer)


def chat_endpoint(front: Front) -> GenerationEndpoint[ChatRequest]:
    """`POST /v1/chat/completions`."""
    return GenerationEndpoint(front, "chat", ChatRequest, chat_job, ChatAnswer)

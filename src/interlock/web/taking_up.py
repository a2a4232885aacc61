"""GET /interlock/streams/{id}: an answer whose front has died, or whose fleet was suspended and started again, is read on.

`id` is the answer's own (`cmpl-…`, `chatcmpl-…`; the header x-request-id). `after` says how many tokens of each choice the client
has: a number, or one for each choice, `3,5`. What follows is the rest of the same stream, token for token; `stream=false` gives the
whole answer once it has ended. A request that was sent with `cache_salt` asks for the same in the header x-interlock-cache-salt:
a tenant's answer is nobody else's, and to everybody else it does not exist.

A newer connection that takes an answer up cuts an older one off.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
from collections.abc import Iterator
from typing import Annotated

from msgspec import Meta, Struct
from starlette.types import Receive, Scope, Send

from interlock.core.errors import InterlockError
from interlock.core.limits import FRONT_GRACE_SECONDS, GENERATIONS_PER_REQUEST_MAX, NAME_CHARS_MAX
from interlock.fleet.ledger import GenerationRequest
from interlock.web.answers import Answer
from interlock.web.chat import ChatAnswer
from interlock.web.completions import CompletionAnswer
from interlock.web.endpoints import OUTCOME_OF_STATUS, check_use
from interlock.web.errors import SERVER, ApiError, from_failure, invalid
from interlock.web.front import Front
from interlock.web.generating import Choices
from interlock.web.http import Disconnected, Reply, header, while_connected
from interlock.web.kept_jobs import job_of, kept_in
from interlock.web.queries import read_query
from interlock.web.requests import Job
from interlock.web.shapes import Chat, Completion
from interlock.web.streaming import Run

log = logging.getLogger(__name__)

POLL_SECONDS = 0.02
NUMBERS_CHARS_MAX = 16 * GENERATIONS_PER_REQUEST_MAX


class TakeUpQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`after`: for each choice, how many tokens are had already."""

    after: Annotated[str, Meta(max_length=NUMBERS_CHARS_MAX, pattern=r"^[0-9]{1,9}(,[0-9]{1,9})*$")] = "0"
    stream: bool = True


class TakeUpEndpoint:
    """An ASGI application for `/interlock/streams/{id}`."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = self._front.host.clock.monotonic_s()
        reply = Reply(send)
        outcome = "ok"
        try:
            check_use(self._front, scope)
            await while_connected(receive, self._serve(scope, reply, started_s))
        except Disconnected:
            outcome = "disconnected"
        except (ApiError, InterlockError) as error:
            said = error if isinstance(error, ApiError) else from_failure(error)
            outcome = OUTCOME_OF_STATUS.get(said.status, "invalid" if said.status < 500 else "failed")
            if not reply.begun:
                with contextlib.suppress(Disconnected):
                    await reply.error(said)
        except Exception:
            log.exception("a request to %s failed by a defect of ours", scope["path"])
            outcome = "failed"
            if not reply.begun:
                message = "The server failed at this request; its log says why."
                with contextlib.suppress(Disconnected):
                    await reply.error(ApiError(500, message, kind=SERVER, code="internal_error"))
        finally:
            self._front.metrics.count_request("streams", outcome)

    async def _serve(self, scope: Scope, reply: Reply, started_s: float) -> None:
        front = self._front
        name = str(scope["path_params"]["id"])
        query = read_query(scope, TakeUpQuery)
        try:
            requests = await self._requests(name, header(scope, b"x-interlock-cache-salt") or "")
            job = job_of(requests, stream=query.stream)
        except ValueError as error:
            raise ApiError(
                500, f"Answer {name} cannot be taken up: {error}.", kind=SERVER, code="internal_error"
            ) from error
        after = _numbers(query, job)
        reply.request_id = job.id
        choices = Choices(front, job, taken_up=(requests, after))
        await Run(front, job, _answer(front, job, any(after)), reply, started_s, choices).send()

    async def _requests(self, name: str, salt: str) -> list[GenerationRequest]:
        """All generations of it. Raises `ApiError` 404, and 410 where one of them is lost."""
        first = await self._find(f"{name}-0") if 0 < len(name) <= NAME_CHARS_MAX else None
        if first is None or not hmac.compare_digest(first.tenant.encode(), salt.encode("latin-1", "replace")):
            raise ApiError(
                404,
                f"There is no answer {name[:NAME_CHARS_MAX]} to take up: it was read to its end, nobody took it up in time, or its "
                "front and its engine were lost together. Send the request again.",
                code="not_found",
            )
        requests = [first]
        for index in range(1, kept_in(first.note).generations):
            request = self._front.fleet.known(f"{name}-{index}")
            if request is None:
                raise ApiError(
                    410,
                    f"Choice {index} of answer {name} is over or was lost with its front and its engine. Send the request again.",
                    code="gone",
                )
            requests.append(request)
        return requests

    async def _find(self, request: str) -> GenerationRequest | None:
        """A front that has just started is told by its engines what they hold: that is waited for."""
        fleet, clock = self._front.fleet, self._front.host.clock
        until_s = clock.monotonic_s() + FRONT_GRACE_SECONDS
        while (found := fleet.known(request)) is None:
            if fleet.recovered or clock.monotonic_s() > until_s:
                return None
            await clock.sleep_s(POLL_SECONDS)
        return found if found.note else None


def _numbers(query: TakeUpQuery, job: Job) -> list[int]:
    """How much of each choice the client has."""
    given = [int(number) for number in query.after.split(",")]
    generations = len(job.prompts) * job.best_of
    if len(given) == 1:
        given *= generations
    if len(given) != generations:
        raise invalid(f"after names {len(given)} choices, and the answer has {generations}.", "after")
    if any(given) and (not query.stream or job.best_of != job.n):
        raise invalid("An answer that is sent whole is sent from its beginning; leave after out.", "after")
    return given


def _answer(front: Front, job: Job, goes_on: bool) -> Answer:
    """A stream whose beginning the client has has no opening."""
    if job.chat:
        return _GoingOnChat(front, job) if goes_on else ChatAnswer(front, job)
    return _GoingOnCompletion(front, job) if goes_on else CompletionAnswer(front, job)


class _GoingOnChat(ChatAnswer):
    def opening(self) -> Iterator[Chat]:
        return iter(())


class _GoingOnCompletion(CompletionAnswer):
    def opening(self) -> Iterator[Completion]:
        return iter(())

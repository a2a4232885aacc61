"""GET /interlock/status, command, events, POST /interlock/pause, unpause, update, suspend, resume, drain, stop: the coordinator
over HTTP.

Who may: the admin token of the run directory, or the API key. Where neither exists nobody may.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta
from starlette.types import Receive, Scope, Send

from interlock.core.errors import ChannelFault, InterlockError
from interlock.core.limits import (
    COMMAND_SECONDS_DEFAULT,
    ENGINE_START_SECONDS_MAX,
    EVENTS_WAIT_SECONDS_MAX,
    FACT_CHARS_MAX,
    NAME_CHARS_MAX,
    REQUEST_SECONDS_MAX,
    RETRY_AFTER_SECONDS,
)
from interlock.fleet.client import CommandFailed
from interlock.web.answers import encoder
from interlock.web.errors import SERVER, UNAVAILABLE, ApiError
from interlock.web.front import Front
from interlock.web.http import Disconnected, Reply, bearer_token, header, while_connected
from interlock.web.queries import read_query

Owner = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Seconds = Annotated[float, Meta(gt=0, le=REQUEST_SECONDS_MAX)]
T = TypeVar("T", bound=msgspec.Struct)


class PauseQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /interlock/pause`."""

    mode: Literal["keep", "wait", "abort"] = "keep"
    owner: Owner = "http"
    timeout_s: Seconds = COMMAND_SECONDS_DEFAULT
    hold_seconds: Seconds | None = None
    """The pause ends by itself after so long."""
    allow_unknown: bool = False


class UnpauseQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /interlock/unpause`. `break_hold_of`: an administrator ends the hold of this owner."""

    owner: Owner = "http"
    timeout_s: Seconds = COMMAND_SECONDS_DEFAULT
    break_hold_of: Owner | None = None


class UpdateQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /interlock/update`."""

    version: Owner
    weights: Annotated[str, Meta(min_length=1, max_length=FACT_CHARS_MAX)]
    """Checkpoint directory, as the engines see it."""
    kv: Literal["recompute", "keep"] = "recompute"
    owner: Owner = "http"
    timeout_s: Seconds = COMMAND_SECONDS_DEFAULT


class PlainQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of commands that say no more than whose they are."""

    owner: Owner = "http"
    timeout_s: Seconds = COMMAND_SECONDS_DEFAULT


class CommandQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`GET /interlock/command`: what became of it."""

    id: Owner
    owner: Annotated[str, Meta(max_length=NAME_CHARS_MAX)] = ""


class EventsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`GET /interlock/events`."""

    after: Annotated[int, Meta(ge=0)] = 0
    """The last number that was seen."""
    ring: Annotated[str, Meta(max_length=NAME_CHARS_MAX)] = ""
    """Whose number that is, as the last answer said."""
    wait_seconds: Annotated[float, Meta(ge=0, le=EVENTS_WAIT_SECONDS_MAX)] = 0.0


class StartQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /interlock/start`."""

    version: Owner | None = None
    """What the weights are called; without it those that the fleet had."""
    weights: Annotated[str, Meta(max_length=FACT_CHARS_MAX)] = ""
    owner: Owner = "http"
    timeout_s: Seconds = ENGINE_START_SECONDS_MAX


VERBS = ("pause", "unpause", "update", "suspend", "resume", "drain", "stop", "start")
QUESTIONS = ("status", "command", "events")


class AdminEndpoint:
    """An ASGI application for one admin path; `verb` is one of `VERBS` or `QUESTIONS`."""

    def __init__(self, front: Front, verb: str) -> None:
        self._front, self._verb = front, verb

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        try:
            self._check_access(scope)
            self._check_no_body(scope)
            answer = await while_connected(receive, self._ask(scope))
            await reply.whole(200, encoder.encode(answer))
        except ApiError as error:
            await reply.error(error)
        except Disconnected:
            return

    def _check_no_body(self, scope: Scope) -> None:
        """Who writes `{"mode": "abort"}` into a body must not get another pause than that one, and a 200."""
        if header(scope, b"content-length") in (None, "0") and header(scope, b"transfer-encoding") is None:
            return
        raise ApiError(
            400,
            f"What a command is to be stands in the query, as in /interlock/{self._verb}?owner=me; a body is not read.",
            code="unexpected_body",
        )

    def _check_access(self, scope: Scope) -> None:
        access = self._front.access
        if access.may_command(bearer_token(scope)):
            return
        if access.api_key is None and access.admin_token is None:
            raise ApiError(
                403,
                "This front has neither an admin token nor an API key, so it takes no commands.",
                code="forbidden",
            )
        raise ApiError(
            401,
            "Commands need the admin token of the run directory, or the API key, as `Authorization: Bearer …`.",
            code="invalid_api_key",
        )

    async def _ask(self, scope: Scope) -> msgspec.Struct:
        coordinator = self._front.coordinator
        try:
            match self._verb:
                case "pause":
                    asked = read_query(scope, PauseQuery)
                    return await coordinator.pause(
                        asked.mode,
                        owner=asked.owner,
                        timeout_s=asked.timeout_s,
                        hold_seconds=asked.hold_seconds,
                        allow_unknown=asked.allow_unknown,
                    )
                case "unpause":
                    query = read_query(scope, UnpauseQuery)
                    return await coordinator.unpause(
                        owner=query.owner, timeout_s=query.timeout_s, break_hold_of=query.break_hold_of
                    )
                case "update":
                    update = read_query(scope, UpdateQuery)
                    return await coordinator.update_weights(
                        update.version,
                        update.weights,
                        kv=update.kv,
                        owner=update.owner,
                        timeout_s=update.timeout_s,
                    )
                case "suspend" | "resume" | "drain" as verb:
                    plain = read_query(scope, PlainQuery)
                    ask = getattr(coordinator, verb)
                    progress: msgspec.Struct = await ask(owner=plain.owner, timeout_s=plain.timeout_s)
                    return progress
                case "stop":
                    plain = read_query(scope, PlainQuery)
                    return await coordinator.stop(
                        owner=plain.owner, timeout_s=plain.timeout_s, composite=True
                    )
                case "command":
                    named = read_query(scope, CommandQuery)
                    return await coordinator.command(named.id, owner=named.owner)
                case "events":
                    wanted = read_query(scope, EventsQuery)
                    return await coordinator.events(
                        wanted.after, wanted.ring, wait_seconds=wanted.wait_seconds
                    )
                case "start":
                    start = read_query(scope, StartQuery)
                    return await coordinator.start(
                        owner=start.owner,
                        timeout_s=start.timeout_s,
                        version=start.version,
                        weights=start.weights,
                    )
                case _:
                    return await coordinator.status()
        except (InterlockError, OSError, TimeoutError) as error:
            raise explain(error) from error


def explain(error: Exception) -> ApiError:
    """What the coordinator said, or that it said nothing."""
    match error:
        case ChannelFault(code=code, retryable=retryable) if code == "recovering" or retryable:
            return _unavailable(str(error), code)
        case ChannelFault(code="unknown_command"):
            return ApiError(404, str(error), code="unknown_command")
        case ChannelFault(code=code):
            return ApiError(409, str(error), code=code)
        case CommandFailed():
            return ApiError(504, str(error), kind=SERVER, code="command_failed")
        case TimeoutError():
            return ApiError(
                504, f"The coordinator did not answer in time: {error}", kind=SERVER, code="deadline"
            )
        case _:
            return _unavailable(f"The coordinator cannot be asked: {error}", "no_coordinator")


def _unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, kind=UNAVAILABLE, code=code, retry_after_s=RETRY_AFTER_SECONDS)

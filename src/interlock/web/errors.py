"""Every refusal of the HTTP API in OpenAI's shape: {"error": {"message", "type", "param", "code"}} and the right status."""

from __future__ import annotations

import math

import msgspec

from interlock.core.errors import InterlockError
from interlock.core.limits import RETRY_AFTER_SECONDS
from interlock.fleet.generation import NoMember, Overloaded, RequestFailed
from interlock.text.errors import PromptError

INVALID = "invalid_request_error"
UNAVAILABLE = "service_unavailable_error"
SERVER = "server_error"

STATUS_OF_FAILURE = {
    "invalid": 400,
    "deadline": 504,
    "no_member": 503,
    "stopped": 503,
    "closed": 503,
    "aborted": 503,
    "taken_up": 409,
    "not_taken_up": 410,
}
"""By `RequestFailed.code`; the others are 500: an engine's or our own fault."""


class ApiError(Exception):
    """What a client is told. `param` names the field at fault, `retry_after_s` becomes a Retry-After header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after_s = param, code, retry_after_s

    @property
    def body(self) -> bytes:
        """In OpenAI's shape."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.kind,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Besides the content's; whole seconds, at least one, as RFC 9110 has Retry-After."""
        if self.retry_after_s is None:
            return []
        return [(b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode())]


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be served as it is; `param` is at fault."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, what: str | None = None) -> ApiError:
    """400: `param` is known and not supported; `what` says more."""
    return invalid(
        f"{what or param} is not supported by this server yet; leave it out", param, "unsupported_parameter"
    )


def no_engine(message: str) -> ApiError:
    """503: nobody could serve it now."""
    return ApiError(503, message, kind=UNAVAILABLE, code="no_engine", retry_after_s=RETRY_AFTER_SECONDS)


def context_too_long(limit: int, prompt_tokens: int, asked: int | None, param: str | None) -> ApiError:
    """OpenAI's sentence with both numbers; `asked` is what max_tokens asks for beside the prompt."""
    if asked is None:
        said = f"your prompt has {prompt_tokens} tokens, which leaves no room for an answer; shorten it"
    else:
        said = (
            f"you asked for {prompt_tokens + asked} tokens ({prompt_tokens} in the prompt, {asked} for the completion); "
            "shorten the prompt or ask for less"
        )
    return invalid(
        f"This model's maximum context length is {limit} tokens, but {said}.",
        param,
        "context_length_exceeded",
    )


def from_failure(error: InterlockError) -> ApiError:
    """What the fleet or the text layer said, as a client is told."""
    match error:
        case Overloaded():
            return ApiError(
                429, str(error), kind="rate_limit_error", code="overloaded", retry_after_s=error.retry_after_s
            )
        case NoMember():
            return no_engine(str(error))
        case PromptError():
            return invalid(str(error))
        case RequestFailed(code=code):
            status = STATUS_OF_FAILURE.get(code, 500)
            kind = INVALID if status == 400 else UNAVAILABLE if status == 503 else SERVER
            retry = RETRY_AFTER_SECONDS if status == 503 else None
            return ApiError(status, str(error), kind=kind, code=code, retry_after_s=retry)
        case _:
            return ApiError(500, str(error), kind=SERVER, code="internal_error")

"""What a front and an engine say to each other: dispatches one way, tokens the other, one frame per engine step."""

from __future__ import annotations

from typing import Annotated

import msgspec

from interlock.core.identity import Epoch
from interlock.core.limits import DISPATCHES_PER_FRAME_MAX, NOTE_BYTES_MAX, REQUESTS_IN_FLIGHT_MAX
from interlock.core.sampling import Sampling


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, gc=False):
    """`gc=False`, here and below: they refer to no cycle, and a collector that never looks at them costs their tokens nothing."""


# --- front -> engine ---------------------------------------------------------------------------------------------


class Dispatch(Message, frozen=True):
    """Generate. `attempt` fences: what an earlier attempt still says is dropped by the front.

    `prompt` are token ids, packed (`token_ids`); on a continuation the tokens already delivered stand at its end, and `sampling` is restated
    for the remainder. `cache_salt` separates tenants and weights versions in every prefix cache.
    """

    request: str
    attempt: int
    epoch: Epoch
    prompt: bytes
    sampling: Sampling
    cache_salt: str
    priority: int = 0
    note: Annotated[bytes, msgspec.Meta(max_length=NOTE_BYTES_MAX)] = b""
    """The front's own: what it needs besides to own this request again after its death. The engine keeps it, no more."""


class DispatchAll(Message, frozen=True):
    """`Dispatch` for each of these, in order: what waited together."""

    dispatches: Annotated[list[Dispatch], msgspec.Meta(max_length=DISPATCHES_PER_FRAME_MAX)]


class Abort(Message, frozen=True):
    """Stop this attempt; what it still says is dropped. Answered by nothing: the engine may not have it any more."""

    request: str
    attempt: int


class Acknowledge(Message, frozen=True):
    """The end of this attempt was heard: the engine may forget the request."""

    request: str
    attempt: int


class End(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One attempt that is over."""

    request: str
    attempt: int


class AcknowledgeAll(Message, frozen=True):
    """`Acknowledge` for each of these: the ends that one frame of tokens told of."""

    ends: Annotated[list[End], msgspec.Meta(max_length=REQUESTS_IN_FLIGHT_MAX)]


class Cursor(msgspec.Struct, frozen=True, array_like=True):
    """How much of one stream the front holds: the first `start` tokens of this attempt."""

    request: str
    attempt: int
    start: int


class Resume(Message, frozen=True):
    """First message of a front on each connection: every stream that it still wants from this engine.

    The engine goes on with each from its `start`, on this connection; one that it does not know it answers with
    `Refused` "unknown". Whatever else it runs for a front of this name is aborted and forgotten: a level, so neither an
    abort nor an acknowledgement can be lost with a connection.
    """

    streams: Annotated[list[Cursor], msgspec.Meta(max_length=REQUESTS_IN_FLIGHT_MAX)]


class Recover(Message, frozen=True):
    """Before the first `Resume` of a front's new life: what is here of its earlier ones, after the first `after`? Answered by one
    `Held` a request and `HeldAll`; nothing else happens until then."""

    after: Annotated[int, msgspec.Meta(ge=0)] = 0


# --- engine -> front ---------------------------------------------------------------------------------------------


class Held(Message, frozen=True):
    """One request of an earlier life of this front, as it was dispatched, with the tokens made so far counted."""

    request: str
    attempt: int
    prompt: bytes
    """Packed, as it was dispatched."""
    tokens: int
    note: bytes


class HeldAll(Message, frozen=True):
    """So many have been told by now; if there are `more`, ask again after them."""

    requests: int
    more: bool = False


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probability of the sampled token, and of the most likely ones (token id, logprob), best first."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Delta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one request. `start` counts tokens of this attempt before them: a gap or a repeat shows.

    `finish`: "" while it goes on, else "stop" (end token or stop id), "length", "abort", "error".
    """

    request: str
    attempt: int
    start: int
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish: str
    cached_tokens: int
    """Prompt tokens whose KV was reused, from whatever cache; meaningful from the first delta on."""
    detail: str = ""
    """For "error": what happened, in words. For "stop": the stop token id, if one ended it."""
    version: str = ""
    """Of the weights that made these tokens, all of them."""


class Tokens(Message, frozen=True):
    """What one step of the engine made, for every request of this front that it made something of."""

    deltas: Annotated[list[Delta], msgspec.Meta(max_length=REQUESTS_IN_FLIGHT_MAX)]


class Refused(Message, frozen=True):
    """This dispatch was not begun. `code`: "stale_epoch", "not_running", "invalid", "overloaded", "unknown" (answers `Resume`)."""

    request: str
    attempt: int
    code: str
    message: str
    epoch: Epoch


FromFront = Dispatch | DispatchAll | Abort | Acknowledge | AcknowledgeAll | Resume | Recover
FromEngine = Tokens | Refused | Held | HeldAll

"""A request as it outlives its front: on the front's disk while the fleet is suspended, or as a note with its engine.

The two differ in what is beside them. On disk stands all of it. An engine holds the prompt it was given (what was delivered
before stands at its end) and the tokens of its own attempt, so the note says only what cannot be told from those.
"""

from __future__ import annotations

import msgspec

from interlock.core.limits import NOTE_BYTES_MAX
from interlock.fleet.ledger import Entry, GenerationRequest
from interlock.fleet.made import Made
from interlock.wire.engine_messages import Held, TokenLogprobs
from interlock.wire.token_ids import unpack_ids

_encoder = msgspec.msgpack.Encoder()


class KeptRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One line of the ledger. In `request` stand the deadline that is left, and in a note no prompt."""

    request: GenerationRequest
    prompt_tokens: int
    delivered: list[int] = []
    logprobs: list[TokenLogprobs] = []
    made: list[Made] = []
    cached_tokens: int | None = None
    attempt: int = 0
    base: int = 0
    failures: int = 0
    told: int = 0
    engine: str = ""
    """Who had the attempt; empty: nobody."""


def kept_whole(entry: Entry, left_s: float) -> KeptRequest:
    """For the disk. Shares its lists with the entry: to be encoded before they change."""
    return KeptRequest(
        request=msgspec.structs.replace(entry.request, deadline_s=left_s),
        prompt_tokens=len(entry.request.prompt),
        delivered=entry.delivered,
        logprobs=entry.logprobs,
        made=entry.made,
        cached_tokens=entry.cached_tokens,
        attempt=entry.attempt,
        base=entry.base,
        failures=entry.failures,
        told=entry.told,
        engine=entry.life.name if entry.life is not None else entry.home,
    )


def note_of(entry: Entry, left_s: float) -> bytes:
    """To go with a dispatch; empty where it would be too long: then this attempt dies with the front."""
    request = msgspec.structs.replace(entry.request, prompt=[], deadline_s=left_s)
    kept = KeptRequest(
        request=request,
        prompt_tokens=len(entry.request.prompt),
        logprobs=entry.logprobs,
        made=entry.made,
        cached_tokens=entry.cached_tokens,
        attempt=entry.attempt,
        base=entry.base,
        failures=entry.failures,
    )
    note = _encoder.encode(kept)
    return note if len(note) <= NOTE_BYTES_MAX else b""


def from_held(held: Held, engine: str) -> KeptRequest:
    """What an engine holds, as a line of the ledger again. Raises `ValueError` where the note does not fit what it is about."""
    try:
        note = msgspec.msgpack.decode(held.note, type=KeptRequest)
        prompt = unpack_ids(held.prompt)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ValueError(f"its note or its prompt cannot be read: {error}") from error
    delivered = prompt[note.prompt_tokens :]
    logprobs = len(note.logprobs) if note.request.sampling.logprobs is not None else len(delivered)
    if (
        note.request.id != held.request
        or not 0 < note.prompt_tokens <= len(prompt)
        or len(delivered) != note.base
        or logprobs != len(delivered)
        or sum(span.tokens for span in note.made) != len(delivered)
    ):
        raise ValueError("its note and what the engine holds of it do not fit together")
    request = msgspec.structs.replace(note.request, prompt=prompt[: note.prompt_tokens])
    return msgspec.structs.replace(
        note,
        request=request,
        delivered=delivered,
        attempt=held.attempt,
        told=len(delivered) + held.tokens,
        engine=engine,
    )

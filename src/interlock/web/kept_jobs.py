"""An HTTP request as it outlives its front: all that a later life needs to answer whoever takes it up again.

It travels as the `note` of each of its generations, which already have the prompts' ids and the parameters.
"""

from __future__ import annotations

import msgspec

from interlock.fleet.ledger import GenerationRequest
from interlock.web.prompts import Prompt
from interlock.web.requests import Job


class KeptJob(msgspec.Struct, frozen=True, kw_only=True):
    """`Job`, less what its generations say themselves."""

    id: str
    chat: bool
    created_s: int
    prompts: int
    n: int
    best_of: int
    logprobs: int | None
    stops: list[str]
    include_stop: bool
    skip_special: bool
    end_ids: list[int]
    stream: bool
    include_usage: bool
    return_token_ids: bool
    echo: bool
    text: str | None = None
    """Of this generation's prompt, where it came as text and is echoed."""

    @property
    def generations(self) -> int:
        return self.prompts * self.best_of


def note_of(job: Job, index: int) -> bytes:
    """For the generation of this index."""
    kept = KeptJob(
        id=job.id,
        chat=job.chat,
        created_s=job.created_s,
        prompts=len(job.prompts),
        n=job.n,
        best_of=job.best_of,
        logprobs=job.logprobs,
        stops=job.stops,
        include_stop=job.include_stop,
        skip_special=job.skip_special,
        end_ids=sorted(job.end_ids),
        stream=job.stream,
        include_usage=job.include_usage,
        return_token_ids=job.return_token_ids,
        echo=job.echo,
        text=job.prompts[index // job.best_of].text if job.echo else None,
    )
    return msgspec.msgpack.encode(kept)


def kept_in(note: bytes) -> KeptJob:
    """Raises `ValueError` for what is no note of this version."""
    try:
        return msgspec.msgpack.decode(note, type=KeptJob)
    except msgspec.MsgspecError as error:
        raise ValueError(f"the request's description cannot be read: {error}") from error


def job_of(requests: list[GenerationRequest], *, stream: bool) -> Job:
    """From all generations of one, in order. Raises `ValueError`."""
    kept = [kept_in(request.note) for request in requests]
    first, firsts = kept[0], range(0, len(requests), kept[0].best_of)
    return Job(
        id=first.id,
        chat=first.chat,
        created_s=first.created_s,
        prompts=[Prompt(requests[i].prompt, kept[i].text) for i in firsts],
        sampling=[requests[i].sampling for i in firsts],
        n=first.n,
        best_of=first.best_of,
        logprobs=first.logprobs,
        stops=first.stops,
        include_stop=first.include_stop,
        skip_special=first.skip_special,
        end_ids=frozenset(first.end_ids),
        tenant=requests[0].tenant,
        priority=requests[0].priority,
        stream=stream,
        include_usage=first.include_usage,
        return_token_ids=first.return_token_ids,
        echo=first.echo,
        engine=requests[0].engine,
    )

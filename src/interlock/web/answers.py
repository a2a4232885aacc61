"""How the two endpoints write an answer: whole, or as the chunks of a stream. What both share is in `Answer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET

from interlock.web.front import Front
from interlock.web.generating import Piece
from interlock.web.requests import Job
from interlock.web.shapes import Usage
from interlock.wire.engine_messages import TokenLogprobs

encoder = msgspec.json.Encoder()


class Answer(Protocol):
    """One endpoint's way of writing. Chunks are structs of `shapes`."""

    def opening(self) -> Iterator[msgspec.Struct]:
        """Chunks that come before any token."""
        ...

    def chunks(self, piece: Piece) -> Iterator[msgspec.Struct]:
        """Of a stream; none while text is held back."""
        ...

    def usage_chunk(self, usage: Usage) -> msgspec.Struct: ...

    def whole(self, gathered: Sequence[Gathered], usage: Usage) -> msgspec.Struct: ...


class Gathered(msgspec.Struct):
    """All pieces of one choice, joined."""

    index: int
    text: list[str] = []
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason

    @property
    def mean_logprob(self) -> float:
        """What best_of compares."""
        return sum(entry.logprob for entry in self.logprobs) / max(1, len(self.logprobs))


def choose_best(gathered: Sequence[Gathered], n: int, best_of: int) -> list[Gathered]:
    """Of each prompt's `best_of` the `n` likeliest per token, likeliest first, numbered anew."""
    if best_of == n:
        return list(gathered)
    chosen = []
    for first in range(0, len(gathered), best_of):
        group = sorted(gathered[first : first + best_of], key=lambda choice: -choice.mean_logprob)
        chosen += group[:n]
    return [msgspec.structs.replace(choice, index=index) for index, choice in enumerate(chosen)]


class Envelope:
    """What every chunk and whole answer of one request repeats."""

    def __init__(self, front: Front, job: Job) -> None:
        self.job, self.text = job, front.text
        self.model = front.served_model_name
        self.fingerprint = front.system_fingerprint()
        self.usage = None if job.include_usage else UNSET
        """In chunks before the last: null where usage comes at the end, absent where it does not."""

    def shows(self, piece: Piece) -> bool:
        """Whether a piece has anything to tell before its end: a token may be held back, or be part of a character."""
        return bool(piece.text) or (
            bool(piece.token_ids) and (self.job.logprobs is not None or self.job.return_token_ids)
        )

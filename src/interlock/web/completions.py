"""POST /v1/completions: how its answers are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import UNSET, UnsetType

from interlock.web.answers import Envelope, Gathered
from interlock.web.front import Front
from interlock.web.generating import Piece
from interlock.web.requests import Job
from interlock.web.shapes import Completion, CompletionChoice, CompletionLogprobs, Usage
from interlock.wire.engine_messages import TokenLogprobs

OBJECT = "text_completion"


class CompletionAnswer:
    """How one completion is answered (`answers.Answer`)."""

    def __init__(self, front: Front, job: Job) -> None:
        self._front = Envelope(front, job)
        self._job = job
        self._echoes = (
            [self._echo_of(n // job.n) for n in range(len(job.prompts) * job.n)] if job.echo else []
        )
        self._offsets = [len(echo) for echo in self._echoes] or [0] * (len(job.prompts) * job.best_of)
        self._begun: set[int] = set()

    def opening(self) -> Iterator[Completion]:
        for index, echo in enumerate(self._echoes):
            yield self._made([CompletionChoice(index, echo, None, None)])

    def chunks(self, piece: Piece) -> Iterator[Completion]:
        if piece.skipped and self._job.logprobs is not None:
            show = self._front.text.token_text
            self._offsets[piece.index] += sum(len(show(token_id)) for token_id in piece.skipped)
        if not self._front.shows(piece) and piece.finish_reason is None:
            return
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        yield self._made(
            [
                CompletionChoice(
                    piece.index,
                    piece.text,
                    self._logprobs(piece.index, piece.token_ids, piece.logprobs),
                    piece.finish_reason,
                    token_ids=piece.token_ids if self._job.return_token_ids else UNSET,
                    prompt_token_ids=self._prompt_ids(piece.index) if first else UNSET,
                )
            ]
        )

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._made([], usage)

    def whole(self, gathered: Sequence[Gathered], usage: Usage) -> Completion:
        choices = []
        for choice in gathered:
            echo = self._echoes[choice.index] if self._echoes else ""
            choices.append(
                CompletionChoice(
                    choice.index,
                    echo + "".join(choice.text),
                    self._logprobs(choice.index, choice.token_ids, choice.logprobs),
                    choice.finish_reason,
                    token_ids=choice.token_ids if self._job.return_token_ids else UNSET,
                    prompt_token_ids=self._prompt_ids(choice.index),
                )
            )
        return self._made(choices, usage)

    def _made(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        front = self._front
        return Completion(
            self._job.id,
            OBJECT,
            self._job.created_s,
            front.model,
            front.fingerprint,
            choices,
            usage if usage is not None else front.usage,
        )

    def _echo_of(self, number: int) -> str:
        prompt = self._job.prompts[number]
        return self._front.text.decode(prompt.ids) if prompt.text is None else prompt.text

    def _prompt_ids(self, index: int) -> list[int] | UnsetType:
        return self._job.prompts[index // self._job.n].ids if self._job.return_token_ids else UNSET

    def _logprobs(
        self, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> CompletionLogprobs | None:
        """`text_offset` counts characters of the tokens as they are shown, from the start of the text (echo included)."""
        count = self._job.logprobs
        if count is None:
            return None
        show = self._front.text.token_text
        offsets, tokens, tops = [], [], []
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            shown = show(token_id)
            offsets.append(self._offsets[index])
            self._offsets[index] += len(shown)
            tokens.append(shown)
            top = {shown: entry.logprob}  # always among them, as vLLM and OpenAI have it
            for other, value in entry.top[:count]:
                top.setdefault(show(other), value)
            tops.append(top)
        return CompletionLogprobs(offsets, [entry.logprob for entry in logprobs], tokens, tops)

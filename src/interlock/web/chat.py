"""POST /v1/chat/completions: how its answers are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import UNSET, UnsetType

from interlock.web.answers import Envelope, Gathered
from interlock.web.front import Front
from interlock.web.generating import Piece
from interlock.web.requests import Job
from interlock.web.shapes import (
    Alternative,
    Chat,
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    Delta,
    Message,
    TokenLogprob,
    Usage,
)
from interlock.wire.engine_messages import TokenLogprobs

WHOLE, CHUNK = "chat.completion", "chat.completion.chunk"


class ChatAnswer:
    """How one chat is answered (`answers.Answer`)."""

    def __init__(self, front: Front, job: Job) -> None:
        self._front = Envelope(front, job)
        self._job = job

    def opening(self) -> Iterator[Chat]:
        prompt_ids = self._job.prompts[0].ids if self._job.return_token_ids else UNSET
        for index in range(self._job.n):
            choice = ChatChunkChoice(index, Delta(role="assistant", content=""), None, None)
            yield self._made(CHUNK, [choice], prompt_ids=prompt_ids)

    def chunks(self, piece: Piece) -> Iterator[Chat]:
        """The end stands in a chunk of its own with an empty delta, as OpenAI sends it."""
        if self._front.shows(piece):
            yield self._made(
                CHUNK,
                [
                    ChatChunkChoice(
                        piece.index,
                        Delta(content=piece.text),
                        self._logprobs(piece.token_ids, piece.logprobs),
                        None,
                        token_ids=piece.token_ids if self._job.return_token_ids else UNSET,
                    )
                ],
            )
        if piece.finish_reason is not None:
            yield self._made(CHUNK, [ChatChunkChoice(piece.index, Delta(), None, piece.finish_reason)])

    def usage_chunk(self, usage: Usage) -> Chat:
        return self._made(CHUNK, [], usage=usage)

    def whole(self, gathered: Sequence[Gathered], usage: Usage) -> Chat:
        choices = [
            ChatChoice(
                choice.index,
                Message("assistant", "".join(choice.text)),
                self._logprobs(choice.token_ids, choice.logprobs),
                choice.finish_reason,
                token_ids=choice.token_ids if self._job.return_token_ids else UNSET,
            )
            for choice in gathered
        ]
        prompt_ids = self._job.prompts[0].ids if self._job.return_token_ids else UNSET
        return self._made(WHOLE, choices, usage=usage, prompt_ids=prompt_ids)

    def _made(
        self,
        kind: str,
        choices: list[ChatChoice] | list[ChatChunkChoice],
        *,
        usage: Usage | None = None,
        prompt_ids: list[int] | UnsetType = UNSET,
    ) -> Chat:
        front = self._front
        return Chat(
            self._job.id,
            kind,
            self._job.created_s,
            front.model,
            front.fingerprint,
            choices,
            usage if usage is not None else front.usage,
            prompt_ids,
        )

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        count = self._job.logprobs
        if count is None:
            return None
        content = []
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            alternatives = [self._alternative(other, value) for other, value in entry.top[:count]]
            own = self._alternative(token_id, entry.logprob)
            content.append(TokenLogprob(own.token, own.logprob, own.bytes, alternatives))
        return ChatLogprobs(content)

    def _alternative(self, token_id: int, logprob: float) -> Alternative:
        text = self._front.text
        return Alternative(text.token_text(token_id), logprob, list(text.token_bytes(token_id)))

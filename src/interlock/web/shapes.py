"""OpenAI's answers, field by field. What OpenAI sends as null is null here; what vLLM adds is left out unless asked for."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from interlock.fleet.generation import Made


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """How many tokens of the prompt came from the cache."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of the prompt and of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    weights: list[list[Made]] | UnsetType = UNSET
    """Ours: of each choice, as it was generated, how many tokens in a row were made by which version of the weights."""


def usage_of(prompt_tokens: int, generated_tokens: int, cached_tokens: int, made: list[list[Made]]) -> Usage:
    """`made`: of each choice, which weights made its tokens; left out where no version is known."""
    return Usage(
        prompt_tokens,
        generated_tokens,
        prompt_tokens + generated_tokens,
        PromptTokensDetails(cached_tokens),
        made if any(span.version for spans in made for span in spans) else UNSET,
    )


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Lists of one length: an entry a token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float]] | None


class CompletionChoice(msgspec.Struct, frozen=True):
    """One answer, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True):
    """Whole answer, and chunk of a stream: `usage` is null in chunks when it comes at the end, absent when it does not."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class Alternative(msgspec.Struct, frozen=True):
    """A token that might have come instead; `bytes`: its UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token, and the likeliest in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """An entry a token."""

    content: list[TokenLogprob]
    refusal: None = None


class Message(msgspec.Struct, frozen=True):
    """What the assistant says, whole."""

    role: str
    content: str
    refusal: None = None


class Delta(msgspec.Struct, frozen=True):
    """A piece of what the assistant says; its role comes once, first."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One whole answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET


class Chat(msgspec.Struct, frozen=True):
    """An answer, or a chunk of a stream; `object` says which."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice] | list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET

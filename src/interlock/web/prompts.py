"""What a request's prompts become: token ids, made once, before routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import msgspec

from interlock.core.limits import PROMPTS_PER_REQUEST_MAX
from interlock.web.errors import context_too_long, invalid, unsupported
from interlock.web.front import Front
from interlock.web.schema import ChatMessage, ChatRequest, CompletionRequest

T = TypeVar("T")
MESSAGE_COST_CHARS = 64
"""What a template takes for a message, however short, in the time that so many characters take to tokenise."""


class Prompt(msgspec.Struct, frozen=True):
    """Token ids, and the text they were made from where it came as text."""

    ids: list[int]
    text: str | None = None
    """As it came, if it came as text."""


def check_ids(front: Front, ids: Sequence[int], param: str) -> None:
    """Raises `ApiError` for an id that the model does not have."""
    if ids and not (min(ids) >= 0 and max(ids) < front.text.vocabulary_size):
        raise invalid(
            f"{param} holds a token id outside this model's vocabulary (0 to {front.text.vocabulary_size - 1}).",
            param,
        )


async def completion_prompts(front: Front, request: CompletionRequest) -> list[Prompt]:
    """A string, token ids, or a list of either kind. Raises `ApiError` and `PromptError`."""
    given = request.prompt
    if isinstance(given, list) and not isinstance(next(iter(given), None), str):
        return await front.off_loop_if_long(len(given), lambda: _id_prompts(front, given))
    texts = [given] if isinstance(given, str) else given
    _check_count(len(texts))
    add_special = request.add_special_tokens is not False

    def make() -> list[Prompt]:
        return [Prompt(front.text.encode(text, add_special), text) for text in _all_of(str, texts)]

    return _checked(await front.off_loop_if_long(sum(len(t) for t in texts if isinstance(t, str)), make))


def _id_prompts(front: Front, given: list[str | int | list[int]]) -> list[Prompt]:
    """Lengths are looked at before ids: a body may hold millions."""
    if given and isinstance(given[0], int):
        _check_length(front, len(given))
        lists = [_all_of(int, given)]
    else:
        _check_count(len(given))
        lists = _all_of(list, given)
    for ids in lists:
        _check_length(front, len(ids))
        check_ids(front, ids, "prompt")
    return _checked([Prompt(ids) for ids in lists])


def _all_of(kind: type[T], given: Sequence[object]) -> list[T]:
    # Exact types: what was decoded has no others, and a prompt may have a hundred thousand ids.
    if not set(map(type, given)) <= {kind}:
        raise invalid("prompt mixes strings, token ids and lists; send one kind.", "prompt")
    return cast("list[T]", given)


def _check_length(front: Front, tokens: int) -> None:
    limit = front.max_model_tokens()
    if tokens >= limit:
        raise context_too_long(limit, tokens, None, "prompt")


def _check_count(count: int) -> None:
    if count > PROMPTS_PER_REQUEST_MAX:
        raise invalid(
            f"{count} prompts are more than the {PROMPTS_PER_REQUEST_MAX} that one request may hold; send several.",
            "prompt",
        )


def _checked(prompts: list[Prompt]) -> list[Prompt]:
    if not prompts or not all(prompt.ids for prompt in prompts):
        raise invalid("A prompt is empty; it must become at least one token.", "prompt")
    return prompts


async def chat_prompt(front: Front, request: ChatRequest) -> Prompt:
    """The conversation through the model's template; templates write special tokens themselves. Raises `PromptError`."""
    messages = [_message(message, index) for index, message in enumerate(request.messages)]
    variables = request.chat_template_kwargs or {}
    for name in ("messages", "tools", "documents", "add_generation_prompt", *front.text.special_tokens):
        if name in variables:
            raise invalid(f"chat_template_kwargs must not set {name}.", "chat_template_kwargs")

    def make() -> Prompt:
        text = front.text.apply_chat_template(
            messages, add_generation_prompt=request.add_generation_prompt is not False, variables=variables
        )
        return Prompt(front.text.encode(text, add_special=bool(request.add_special_tokens)), text)

    size = sum(len(message["content"]) + MESSAGE_COST_CHARS for message in messages)
    prompt = await front.off_loop_if_long(size, make)
    if not prompt.ids:
        raise invalid("The chat template made no prompt of these messages.", "messages")
    return prompt


def _message(message: ChatMessage, index: int) -> dict[str, str]:
    """As templates want it: text parts joined by line breaks, as vLLM does for templates that take strings."""
    where = f"messages[{index}]"
    for name in ("audio", "function_call", "tool_calls"):
        if getattr(message, name):
            raise unsupported(f"{where}.{name}")
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type != "text":
                raise unsupported(f"{where}.content[{number}].type", f"content of type {part.type!r}")
            if part.text is None:
                raise invalid("A part of type 'text' has no text.", f"{where}.content[{number}].text")
        content = "\n".join(part.text or "" for part in content)
    if content is None and message.role != "assistant":
        raise invalid(f"A message of role {message.role!r} needs content.", f"{where}.content")
    made = {"role": message.role, "content": content or ""}
    return made if message.name is None else made | {"name": message.name}

"""What clients may send: OpenAI's fields and vLLM's extensions, each with its bounds. An unknown field is an error.

The annotation is the schema; what an annotation cannot say (one field against another, against the model) stands in
`requests.py`. Fields of OpenAI's that nothing here acts on are refused by name (`UNSUPPORTED`), except in the values that
ask for nothing: a client library that always sends them must work.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from interlock.core.limits import (
    CHAT_MESSAGES_MAX,
    CHOICES_MAX,
    LOGIT_BIAS_MAX,
    LOGPROBS_MAX,
    NAME_CHARS_MAX,
    STOP_STRING_CHARS_MAX,
    STOP_STRINGS_MAX,
    STOP_TOKEN_IDS_MAX,
    TENANT_CHARS_MAX,
)
from interlock.web.errors import ApiError, invalid, unsupported

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1

StopString = Annotated[str, Meta(min_length=1, max_length=STOP_STRING_CHARS_MAX)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Positive = Annotated[int, Meta(ge=1, le=INT32_MAX)]
Choices = Annotated[int, Meta(ge=1, le=CHOICES_MAX)]
Alternatives = Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)]
ShortText = Annotated[str, Meta(max_length=TENANT_CHARS_MAX)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Random padding against traffic analysis; accepted for the official client's sake, none is added."""


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What completions and chats have in common."""

    model: Annotated[str, Meta(max_length=1024)]
    max_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=STOP_STRINGS_MAX)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=LOGIT_BIAS_MAX)] | None
    ) = None
    seed: Annotated[int, Meta(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    user: ShortText | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    # vLLM's extensions
    top_k: Annotated[int, Meta(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=INT32_MAX)] | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Meta(ge=0, le=INT32_MAX)]], Meta(max_length=STOP_TOKEN_IDS_MAX)] | None
    ) = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=TENANT_CHARS_MAX)] | None = None
    """Requests share cached KV only with requests of the same salt: one a tenant."""
    priority: Annotated[int, Meta(ge=-INT32_MAX - 1, le=INT32_MAX)] | None = None

    # Known, and nothing here acts on them.
    response_format: Any = None
    store: Any = None
    service_tier: Any = None
    chat_template: Any = None
    prompt_logprobs: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    best_of: Annotated[int, Meta(ge=1, le=CHOICES_MAX)] | None = None
    use_beam_search: Any = None
    echo: bool | None = None


class CompletionRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: Alternatives | None = None
    suffix: Any = None


class ContentPart(msgspec.Struct, frozen=True):
    """Text; any other type is refused by its name, whatever else it holds."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation, as OpenAI's API names its fields; a text, or parts that are texts."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: Annotated[str, Meta(max_length=NAME_CHARS_MAX)] | None = None
    # An answer of this API sent back as history has these, empty.
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None


class ChatRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=CHAT_MESSAGES_MAX)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=64)] | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    continue_final_message: Any = None
    documents: Any = None


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "chat_template": (None,),
    "prompt_logprobs": (None,),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "use_beam_search": (None, False),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "continue_final_message": (None, False),
    "documents": (None, []),
}
"""Field → the values that ask for nothing. Any other is refused by name."""

R = TypeVar("R", CompletionRequest, ChatRequest)
_decoders: dict[type, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind, strict=True) for kind in (CompletionRequest, ChatRequest)
}
_PATH = re.compile(r"^(?P<message>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?$", re.DOTALL)
_FIELD = re.compile(r"field `(?P<name>[^`]*)`")


def decode(body: bytes, kind: type[R]) -> R:
    """A request in its schema's bounds. Raises `ApiError` 400 naming the field."""
    try:
        request: R = _decoders[kind].decode(body)
    except msgspec.ValidationError as error:
        raise explain_validation(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"The body is no JSON that can be read: {error}.", code="invalid_json") from error
    for name in kind.__struct_fields__:
        neutral = UNSUPPORTED.get(name)
        if neutral is not None and getattr(request, name) not in neutral:
            raise unsupported(name)
    return request


def explain_validation(said: str) -> ApiError:
    """msgspec's words, with the field as `param`: `$.messages[0].role` is messages[0].role."""
    match = _PATH.match(said)
    assert match is not None
    message, path = match["message"], (match["path"] or "").removeprefix(".")
    field = _FIELD.search(message)
    if field is not None:  # "unknown field `x`", "missing required field `x`": the path is that of the object
        path = f"{path}.{field['name']}" if path else field["name"]
    where = f" ({path})" if path and field is None else ""
    return invalid(f"{message}{where}.", path or None)

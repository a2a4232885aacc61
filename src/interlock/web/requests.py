"""From a request in its schema's bounds to a job for the fleet: the checks that need other fields, or the model."""

from __future__ import annotations

from uuid import uuid4

import msgspec

from interlock.core.limits import GENERATIONS_PER_REQUEST_MAX
from interlock.core.sampling import Sampling
from interlock.web.errors import context_too_long, invalid
from interlock.web.front import Front
from interlock.web.prompts import Prompt, chat_prompt, check_ids, completion_prompts
from interlock.web.schema import ChatRequest, CompletionRequest, SamplingFields

COMPLETION_TOKENS_DEFAULT = 16
"""OpenAI's, for completions; a chat may fill the context."""
CHAT_PREFIX = "chatcmpl-"
GREEDY_BELOW = 1e-5
"""vLLM's: a temperature below it is greedy."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request, ready for the fleet: `n` choices for each prompt, chosen from `best_of`."""

    id: str
    chat: bool = False
    created_s: int
    prompts: list[Prompt]
    sampling: list[Sampling]
    """One for each prompt."""
    n: int
    best_of: int
    logprobs: int | None
    """Alternatives that the client wants to see; None: no logprobs."""
    stops: list[str]
    include_stop: bool
    skip_special: bool
    end_ids: frozenset[int]
    tenant: str
    priority: int
    stream: bool
    include_usage: bool
    return_token_ids: bool
    echo: bool
    engine: str | None


async def completion_job(front: Front, request: CompletionRequest, engine: str | None) -> Job:
    """Raises `ApiError` and `PromptError`."""
    front.check_model(request.model)
    prompts = await completion_prompts(front, request)
    if request.echo and request.logprobs is not None:
        raise invalid(
            "echo with logprobs would need logprobs of the prompt, which are not supported yet; leave one of them out.",
            "echo",
            "unsupported_parameter",
        )
    n, best_of = request.n or 1, request.best_of or request.n or 1
    if best_of < n:
        raise invalid(f"best_of ({best_of}) must not be less than n ({n}).", "best_of")
    if best_of > n and request.stream:
        raise invalid("best_of chooses among whole answers and cannot be streamed.", "best_of")
    asked = request.max_tokens
    return _job(
        front,
        request,
        "cmpl-",
        prompts,
        best_of=best_of,
        logprobs=request.logprobs,
        engine=engine,
        asked=asked,
        asked_param="max_tokens",
        default=COMPLETION_TOKENS_DEFAULT,
        prompt_param="prompt",
    )


async def chat_job(front: Front, request: ChatRequest, engine: str | None) -> Job:
    """Raises `ApiError` and `PromptError`."""
    front.check_model(request.model)
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
    for name in ("best_of", "echo"):
        if getattr(request, name) is not None:
            raise invalid(f"{name} is a parameter of /v1/completions, not of chats; leave it out.", name)
    prompt = await chat_prompt(front, request)
    both = request.max_tokens, request.max_completion_tokens
    if None not in both and both[0] != both[1]:
        raise invalid(
            "max_tokens and max_completion_tokens mean the same and differ; send one of them.", "max_tokens"
        )
    newer = request.max_completion_tokens is not None
    return _job(
        front,
        request,
        CHAT_PREFIX,
        [prompt],
        best_of=request.n or 1,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        engine=engine,
        asked=request.max_completion_tokens if newer else request.max_tokens,
        asked_param="max_completion_tokens" if newer else "max_tokens",
        default=None,
        prompt_param="messages",
    )


def _job(
    front: Front,
    request: SamplingFields,
    prefix: str,
    prompts: list[Prompt],
    *,
    best_of: int,
    logprobs: int | None,
    engine: str | None,
    asked: int | None,
    asked_param: str,
    default: int | None,
    prompt_param: str,
) -> Job:
    n = request.n or 1
    if len(prompts) * best_of > GENERATIONS_PER_REQUEST_MAX:
        raise invalid(
            f"{len(prompts)} prompts with {best_of} choices each are more than the "
            f"{GENERATIONS_PER_REQUEST_MAX} generations that one request may ask for.",
            prompt_param,
        )
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options needs stream to be true.", "stream_options")
    limit = front.max_model_tokens()
    sampling = []
    for prompt in prompts:
        tokens = _room(limit, len(prompt.ids), asked, asked_param, prompt_param, default, front)
        sampling.append(_sampling(front, request, tokens, logprobs if best_of == n else logprobs or 0))
    stop = request.stop
    ends = frozenset() if request.ignore_eos else frozenset(front.text.eos_token_ids)
    include_stop = bool(request.include_stop_str_in_output)
    return Job(
        id=prefix + uuid4().hex,
        chat=prefix == CHAT_PREFIX,
        created_s=front.host.clock.wall_ns() // 1_000_000_000,
        prompts=prompts,
        sampling=sampling,
        n=n,
        best_of=best_of,
        logprobs=logprobs,
        stops=[stop] if isinstance(stop, str) else stop or [],
        include_stop=include_stop,
        skip_special=request.skip_special_tokens is not False,
        end_ids=frozenset() if include_stop else ends.union(request.stop_token_ids or ()),
        tenant=request.cache_salt or "",
        priority=request.priority or 0,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        return_token_ids=bool(request.return_token_ids),
        echo=bool(request.echo),
        engine=engine,
    )


def _room(
    limit: int,
    prompt_tokens: int,
    asked: int | None,
    asked_param: str,
    prompt_param: str,
    default: int | None,
    front: Front,
) -> int:
    """max_tokens of one prompt: as asked, else the endpoint's and the model's default, within the context."""
    room = limit - prompt_tokens
    if room < 1:
        raise context_too_long(limit, prompt_tokens, None, prompt_param)
    if asked is None:
        models = front.text.sampling_defaults.get("max_new_tokens")
        asked = min(room, default or room, int(models) if models and models >= 1 else room)
    if asked > room:
        raise context_too_long(limit, prompt_tokens, asked, asked_param)
    return asked


def _sampling(front: Front, request: SamplingFields, max_tokens: int, logprobs: int | None) -> Sampling:
    """Defaults are those of the model's generation_config.json, then vLLM's."""
    defaults = front.text.sampling_defaults
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid(f"min_tokens ({min_tokens}) is more than max_tokens ({max_tokens}).", "min_tokens")
    temperature = _or(request.temperature, defaults.get("temperature"), 1.0)
    ids = {"logit_bias": request.logit_bias or {}, "stop_token_ids": request.stop_token_ids or []}
    for name, values in ids.items():
        check_ids(front, list(values), name)
    return Sampling(
        max_tokens=max_tokens,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=_or(request.top_p, defaults.get("top_p"), 1.0),
        top_k=max(0, int(_or(request.top_k, defaults.get("top_k"), 0))),
        min_p=_or(request.min_p, defaults.get("min_p"), 0.0),
        seed=request.seed,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_or(request.repetition_penalty, defaults.get("repetition_penalty"), 1.0),
        min_tokens=min_tokens,
        stop_token_ids=request.stop_token_ids or [],
        ignore_eos=bool(request.ignore_eos),
        logit_bias=request.logit_bias or {},
        logprobs=logprobs,
    )


def _or(given: float | None, models: float | None, otherwise: float) -> float:
    return given if given is not None else models if models is not None else otherwise

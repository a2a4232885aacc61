"""Whether a request whose engine is gone can go on elsewhere, and as what.

The tokens already delivered to a client are facts: nothing may change, lose or repeat them. So a continuation dispatches
prompt + delivered tokens and asks for the remainder, and the engine conditions on exactly what the client has seen. That is
the same request only if every sampling parameter means the same for the remainder as it meant for the whole. One that
counts output tokens (presence and frequency penalties) does not: what was output has become prompt. One with hidden state
(a seeded random stream) does not: it would start again. Those are refused by name, for a plausible continuation that is
another request is a wrong answer (hazards W5). While nothing was delivered any request restarts: nobody saw the first try.

`ROWS` has one row for each field of `Sampling`. A field without a row is refused: a parameter added tomorrow is
not carried until somebody has said here why it can be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from interlock.core.sampling import Sampling


class Continue(msgspec.Struct, frozen=True):
    """Dispatch this instead: prompt + delivered tokens, parameters restated for the remainder."""

    prompt: list[int]
    sampling: Sampling


class Restart(msgspec.Struct, frozen=True):
    """Nothing was delivered: the request as it came is dispatched again."""


class Complete(msgspec.Struct, frozen=True):
    """Nothing remains to be generated; only the word of the end was lost. `finish` and `detail` as in `Delta`."""

    finish: str
    detail: str = ""


class Refuse(msgspec.Struct, frozen=True):
    """`parameter` cannot be carried, because of `reason` (a sentence)."""

    parameter: str
    reason: str


Decision = Continue | Restart | Complete | Refuse


class Row(msgspec.Struct, frozen=True):
    """`carried(sampling)`: the field's value means the same for the remainder. `why` it does, or why it does not."""

    carried: Callable[[Sampling], bool]
    why: str


def _always(_: Sampling) -> bool:
    return True


def _greedy(sampling: Sampling) -> bool:
    return sampling.temperature == 0.0


ROWS: dict[str, Row] = {
    "max_tokens": Row(_always, "restated: less what was delivered"),
    "min_tokens": Row(_always, "restated: less what was delivered, at least 0"),
    "temperature": Row(_always, "scales each token's distribution by itself"),
    "top_p": Row(_always, "cuts each token's distribution by itself"),
    "top_k": Row(_always, "cuts each token's distribution by itself"),
    "min_p": Row(_always, "cuts each token's distribution by itself"),
    "seed": Row(
        lambda s: s.seed is None or _greedy(s),
        "its random stream would begin again in the middle; without temperature nothing is drawn from it",
    ),
    "presence_penalty": Row(
        lambda s: s.presence_penalty == 0.0,
        "it looks at output tokens alone, and those already delivered would count as prompt",
    ),
    "frequency_penalty": Row(
        lambda s: s.frequency_penalty == 0.0,
        "it counts output tokens alone, and those already delivered would count as prompt",
    ),
    "repetition_penalty": Row(
        _always, "looks at prompt and output as one (vLLM apply_penalties: prompt_mask | output_mask)"
    ),
    "stop_token_ids": Row(_always, "each token is compared by itself"),
    "ignore_eos": Row(_always, "each token is compared by itself"),
    "logit_bias": Row(_always, "the same sum for each token, whatever came before"),
    "logprobs": Row(_always, "each token's own; those of delivered tokens were delivered with them"),
}


def refusal(sampling: Sampling) -> Refuse | None:
    """The first parameter that a continuation could not carry, None if it can carry all."""
    for field in sampling.__struct_fields__:
        row = ROWS.get(field)
        if row is None:
            return Refuse(field, f"nobody has said how {field} acts on a request that is continued elsewhere")
        if not row.carried(sampling):
            return Refuse(field, row.why)
    return None


def decide(
    prompt: Sequence[int], sampling: Sampling, delivered: Sequence[int], max_model_tokens: int | None = None
) -> Decision:
    """What becomes of a request of which `delivered` was handed on before its engine was lost.

    `max_model_tokens` is the model's longest sequence: a request that has filled it is complete.
    """
    if not delivered:
        return Restart()
    # In vLLM's order (check_stop): a stop token ends the request even where the length ends it too.
    if delivered[-1] in sampling.stop_token_ids:
        return Complete("stop", str(delivered[-1]))
    filled = max_model_tokens is not None and len(prompt) + len(delivered) >= max_model_tokens
    if len(delivered) >= sampling.max_tokens or filled:
        return Complete("length")
    refused = refusal(sampling)
    if refused is not None:
        return refused
    remainder = msgspec.structs.replace(
        sampling,
        max_tokens=sampling.max_tokens - len(delivered),
        min_tokens=max(0, sampling.min_tokens - len(delivered)),
    )
    return Continue([*prompt, *delivered], remainder)

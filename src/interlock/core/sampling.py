"""How the tokens of a request are drawn: the parameters that travel with it, unchanged, from the front to an engine.

They stand in core because three parties must mean the same by them: the message that carries them (`wire/engine_messages`),
the engines that obey them, and the rule that restates them for a request that goes on elsewhere (`core/continuation`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from interlock.core.limits import LOGPROBS_MAX


class Sampling(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False
):
    """Sampling parameters by vLLM's names and meanings. Stop strings are not here: text is made by the front.

    What stands at its default is not encoded: it travels twice with each request. A field added here is refused on a continuation until `core/continuation` has a row for it. `gc=False`: it refers to no cycle.
    """

    max_tokens: int
    temperature: float = 1.0
    """0.0 is greedy: the likeliest token, and no random stream is drawn from."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}
    """Token id to what is added to its logit."""
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=LOGPROBS_MAX)] | None = None
    """Number of alternatives reported beside the sampled token; None: no logprobs."""

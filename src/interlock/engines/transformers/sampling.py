"""The next token of one request from its logits: parameters by vLLM's names, in vLLM's order, with a generator of its own.

The order is that of vLLM's sampler, for it decides what parameters mean together: raw log-probabilities are taken first
(so they are those of the model, whatever is asked); then end tokens are barred (`min_tokens`), `logit_bias`, penalties;
greedy stops here; then temperature, `min_p`, `top_k`, `top_p`, and one draw by exponential noise: one random number a
vocabulary entry and token, whatever was drawn before, so a saved generator goes on exactly.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interlock.core.limits import LOGPROBS_MAX
from interlock.core.sampling import Sampling
from interlock.engines.base import RequestRejected
from interlock.wire.engine_messages import TokenLogprobs

if TYPE_CHECKING:
    import torch

GREEDY_BELOW = 1e-5
TEMPERATURE_MIN = 1e-2
"""vLLM's: a smaller one that is not zero is raised to it, for the quotients would overflow."""
SEED_MIN, SEED_MAX = -(1 << 63), (1 << 63) - 1
LOGIT_BIAS_BOUND = 100.0
REPETITION_PENALTY_MIN, REPETITION_PENALTY_MAX = 1e-30, 1e30
"""vLLM takes any above zero; beyond these a quotient is no single-precision number any more."""


def check_sampling(sampling: Sampling, vocabulary: int) -> None:
    """Raises `RequestRejected` with a sentence for what is impossible, by vLLM's rules."""
    s = sampling
    _demand(s.max_tokens >= 1, f"max_tokens must be at least 1, got {s.max_tokens}")
    _demand(
        0 <= s.min_tokens <= s.max_tokens, f"min_tokens must be in [0, {s.max_tokens}], got {s.min_tokens}"
    )
    _demand(0.0 <= s.temperature <= 2.0, f"temperature must be in [0, 2], got {s.temperature}")
    _demand(0.0 < s.top_p <= 1.0, f"top_p must be in (0, 1], got {s.top_p}")
    _demand(s.top_k >= -1, f"top_k must be 0 (off) or at least 1, got {s.top_k}")
    _demand(0.0 <= s.min_p <= 1.0, f"min_p must be in [0, 1], got {s.min_p}")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(s, name)
        _demand(-2.0 <= value <= 2.0, f"{name} must be in [-2, 2], got {value}")
    usable = REPETITION_PENALTY_MIN <= s.repetition_penalty <= REPETITION_PENALTY_MAX
    _demand(
        usable,
        f"repetition_penalty must be in [{REPETITION_PENALTY_MIN:g}, {REPETITION_PENALTY_MAX:g}], got {s.repetition_penalty}",
    )
    _demand(s.seed is None or SEED_MIN <= s.seed <= SEED_MAX, f"seed must fit 64 bits, got {s.seed}")
    _demand(s.logprobs is None or 0 <= s.logprobs <= LOGPROBS_MAX, f"logprobs must be in [0, {LOGPROBS_MAX}]")
    for token in s.stop_token_ids:
        _demand(token >= 0, f"stop token id {token} is no token id")
    for token, bias in s.logit_bias.items():
        _demand(0 <= token < vocabulary, f"logit_bias names token {token}; this model has {vocabulary}")
        bound = LOGIT_BIAS_BOUND
        _demand(
            -bound <= bias <= bound,
            f"logit_bias of token {token} must be in [{-bound:g}, {bound:g}], got {bias}",
        )


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise RequestRejected(message)


class NoToken(Exception):  # noqa: N818 - says what is, as the others do
    """The logits of one request allow no choice; the message says why."""


class Sampler:
    """One request's choice of tokens. All that it remembers is its generator: the rest follows from the tokens."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], end_tokens: Sequence[int]) -> None:
        """`end_tokens`: the model's own, the first of them its end-of-text token."""
        import torch

        self._s = sampling
        self._temperature = (
            max(sampling.temperature, TEMPERATURE_MIN) if sampling.temperature >= GREEDY_BELOW else 0.0
        )
        self._ends = list(end_tokens)
        self._barred = sorted({*end_tokens, *sampling.stop_token_ids})
        self._prompt = torch.tensor(sorted(set(prompt)), dtype=torch.long)
        self._bias = (
            (torch.tensor(list(sampling.logit_bias)), torch.tensor(list(sampling.logit_bias.values())))
            if sampling.logit_bias
            else None
        )
        self._generator: Any = None
        if self._temperature:
            seed = sampling.seed if sampling.seed not in (None, -1) else secrets.randbits(63)
            self._generator = torch.Generator().manual_seed(seed)

    # --- the generator's state -----------------------------------------------------------------------------------

    def dump(self) -> bytes:
        """The generator's state; empty for a greedy request."""
        return bytes(self._generator.get_state().numpy().tobytes()) if self._generator is not None else b""

    def restore(self, state: bytes) -> None:
        """Raises `RequestRejected` when `state` is not one of such a generator."""
        import torch

        if self._generator is None:
            return
        try:
            self._generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        except (RuntimeError, ValueError, TypeError) as error:
            raise RequestRejected(f"the saved random generator cannot be restored: {error}") from error

    # --- choosing ------------------------------------------------------------------------------------------------

    @property
    def plain(self) -> bool:
        """Whether the choice is the highest logit, whatever came before: then rows can be chosen together."""
        s = self._s
        return not (
            self._temperature
            or s.min_tokens
            or self._bias is not None
            or self._penalised
            or s.logprobs is not None
        )

    @property
    def _penalised(self) -> bool:
        s = self._s
        return bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)

    def choose(self, logits: torch.Tensor, output: Sequence[int]) -> tuple[int, TokenLogprobs | None]:
        """The next token after `output` (all tokens made so far). `logits` [vocabulary] may be changed. Raises `NoToken`."""
        raw = logits.float()
        worked = self._constrained(raw.clone(), output)
        token = _highest(worked if not self._temperature else self._drawn(worked))
        if self._s.logprobs is None:
            return token, None
        return token, _logprobs_of(raw, token, self._s.logprobs)

    def ended_by(self, output: Sequence[int], total_max: int) -> tuple[str, str]:
        """(finish, detail) after the last token of `output`, ("", "") to go on. `total_max` bounds `output`'s length."""
        last = output[-1]
        if not self._s.ignore_eos and self._ends and last == self._ends[0]:
            return "stop", ""
        if last in self._s.stop_token_ids or (not self._s.ignore_eos and last in self._ends):
            return "stop", str(last)
        if len(output) >= min(self._s.max_tokens, total_max):
            return "length", ""
        return "", ""

    def _constrained(self, logits: torch.Tensor, output: Sequence[int]) -> torch.Tensor:
        """Everything that also changes a greedy choice."""
        import torch

        s = self._s
        if len(output) < s.min_tokens:
            logits[[t for t in self._barred if t < logits.shape[-1]]] = -math.inf
        if self._bias is not None:
            logits[self._bias[0]] += self._bias[1]
        if self._penalised:
            made = torch.tensor(list(output), dtype=torch.long)
            counts = torch.bincount(made, minlength=logits.shape[-1]).to(logits.dtype)
            present = counts > 0
            if s.repetition_penalty != 1.0:
                seen = present.clone()
                seen[self._prompt] = True
                factor = torch.where(logits > 0, 1.0 / s.repetition_penalty, s.repetition_penalty)
                logits = torch.where(seen, logits * factor, logits)
            logits = logits - s.frequency_penalty * counts - s.presence_penalty * present
        return logits

    def _drawn(self, logits: torch.Tensor) -> torch.Tensor:
        """[vocabulary], of which the highest is one draw."""
        import torch

        probabilities = torch.softmax(truncated(logits / self._temperature, self._s), dim=-1)
        noise = torch.empty_like(probabilities).exponential_(generator=self._generator)
        return probabilities / noise


def _highest(values: torch.Tensor) -> int:
    """Where the highest is. Raises `NoToken` when one of them is no number: it would be taken for the highest."""
    best = values.max(dim=-1)
    if best.values.isnan():
        raise NoToken("the model's logits for it are no numbers")
    return int(best.indices)


def truncated(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """`min_p`, then `top_k`, then `top_p`: what is left out is minus infinity. `logits` [vocabulary], tempered."""
    import torch

    if sampling.min_p > 0.0:
        probabilities = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(probabilities < probabilities.max() * sampling.min_p, -math.inf)
    size = logits.shape[-1]
    if 0 < sampling.top_k < size:
        lowest = torch.topk(logits, sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if sampling.top_p < 1.0:
        ascending, order = logits.sort()
        left_out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - sampling.top_p
        left_out[-1] = False
        logits = logits.masked_fill(torch.zeros_like(left_out).scatter(0, order, left_out), -math.inf)
    return logits


def _logprobs_of(raw: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """Of the model's own distribution. The rank counts tokens at least as likely, from 1."""
    import torch

    logprobs = torch.log_softmax(raw, dim=-1)
    own = logprobs[token]
    best = torch.topk(logprobs, min(count, logprobs.shape[-1])) if count else None
    top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best is not None else []
    return TokenLogprobs(float(own), int((logprobs >= own).sum()), top)

"""An engine from its configuration, in the engine's thread: model, ranks, hooks, limits."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from interlock.engines.transformers import blocks, boundaries
from interlock.engines.transformers.hooks import Hooks
from interlock.engines.transformers.plans import Open
from interlock.engines.transformers.ranks import Pipe, Ranks, build_computer
from interlock.engines.transformers.scheduler import Limits
from interlock.engines.transformers.setup import TransformersConfig, end_tokens, scheduler_limits


class Built(msgspec.Struct, frozen=True):
    """What steps are taken with, and what requests are judged by before they reach the engine's thread."""

    ranks: Ranks
    hooks: Hooks
    limits: Limits
    end_tokens: list[int]
    vocabulary: int
    moves: bool


def build(config: TransformersConfig, pipes: Sequence[Pipe]) -> Built:
    """Raises `EngineStartError`, `ModelRefused`, `EngineGone`."""
    computer = build_computer(config, 0)
    ranks = Ranks(computer, pipes, config.collective_seconds)
    ranks.await_start()
    hooks = Hooks()
    if config.store is not None:
        access = blocks.open_access_of(config, computer)
        if access:
            hooks = ranks.do(Open(access))
    if config.snapshots is not None and hooks == Hooks():
        hooks = boundaries.open_boundaries(config, computer)
        computer.worker, computer.boundary = hooks.worker, hooks.boundary
    nature, model = computer.nature, computer.model.model
    limits = scheduler_limits(config, model, nature.token_bytes, continues=nature.continues)
    if hooks.boundary is not None:
        limits = msgspec.structs.replace(limits, captures=True)
    else:  # short chunks cost time, and nobody would have the boundaries
        limits = msgspec.structs.replace(limits, stop_every_blocks=None)
    return Built(ranks, hooks, limits, end_tokens(model), computer.model.vocabulary, bool(nature.shapes))

"""What a rank's process is started with; apart from `rank`, so that whoever starts one imports no model."""

from __future__ import annotations

import msgspec

from interlock.engines.transformers.setup import TransformersConfig


class RankConfig(msgspec.Struct, frozen=True, kw_only=True):
    """As JSON in its only argument."""

    engine: TransformersConfig
    address: str
    started_fd: int
    """A pipe on which it says, once, `Started`."""

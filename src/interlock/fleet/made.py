"""Which weights made which tokens of an answer."""

from __future__ import annotations

import msgspec


class Made(msgspec.Struct, frozen=True, gc=False):
    """So many tokens in a row were made by these weights."""

    version: str
    tokens: int


def extended(made: list[Made], more: Made) -> list[Made]:
    """One entry for each change of weights."""
    if made and made[-1].version == more.version:
        return [*made[:-1], Made(more.version, made[-1].tokens + more.tokens)]
    return [*made, more]

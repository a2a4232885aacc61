"""What the simulated model answers, so that any loss, repeat, mix or wrong weights show in a token.

A token is a function of the weights' content and of all tokens before it. A request whose KV was computed by other weights than
those that make the token (an update that keeps KV, or a cached block that crossed versions) makes another one: `mixed`.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence

from interlock.fleet.generation import Made

FIRST = "0"
"""The version that engines start with. Versions are numbers: a later update has a higher one."""
TOKEN_IDS = 50_000
"""The size of its vocabulary."""
WEIGHTS = "/weights/"
"""A checkpoint's directory is this and the name of its content."""


def next_token(weights: str, sequence: Sequence[int], *, mixed: bool = False) -> int:
    kind = f"{weights} with KV of others " if mixed else f"{weights} "
    digest = hashlib.blake2b(kind.encode() + array("I", sequence).tobytes(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % TOKEN_IDS


def answer_to(prompt: Sequence[int], count: int, weights: str = FIRST) -> list[int]:
    """The tokens that any number of engines of these weights, however disturbed, must deliver."""
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(next_token(weights, sequence))
    return sequence[len(prompt) :]


def spread(made: Sequence[Made]) -> list[str]:
    """The version of each token."""
    return [span.version for span in made for _ in range(span.tokens)]


def wrong_token(
    prompt: Sequence[int], tokens: Sequence[int], versions: Sequence[str], *, kept: bool
) -> str | None:
    """What is wrong with the first wrong token, in words. `kept`: some update kept the KV of frozen requests."""
    if len(versions) != len(tokens):
        return f"{len(tokens)} tokens came and {len(versions)} of them say by which weights"
    sequence = list(prompt)
    for at, (token, version) in enumerate(zip(tokens, versions, strict=True)):
        allowed = {next_token(version, sequence)}
        if kept and any(earlier != version for earlier in versions[:at]):
            allowed.add(next_token(version, sequence, mixed=True))
        if token not in allowed:
            return f"its token {at} is {token}, weights {version!r} make {next_token(version, sequence)}"
        sequence.append(token)
    return None


def impossible_token(prompt: Sequence[int], tokens: Sequence[int], versions: Iterable[str]) -> str | None:
    """As `wrong_token`, of an answer that broke off before it could say by which weights: any of `versions` may have been it."""
    known, sequence = list(versions), list(prompt)
    for at, token in enumerate(tokens):
        if all(
            token != next_token(version, sequence, mixed=mixed)
            for version in known
            for mixed in (False, True)
        ):
            return f"its token {at} is {token}, which no weights make"
        sequence.append(token)
    return None


def went_back(versions: Sequence[str], order: Mapping[str, int]) -> str | None:
    """A request never goes on with older weights than it began with."""
    for before, after in itertools.pairwise(versions):
        if order[after] < order[before]:
            return f"weights {after!r} went on where {before!r} had been"
    return None

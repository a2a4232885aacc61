"""Lines for whoever looks at the terminal."""

from __future__ import annotations

import contextlib


def say(line: str) -> None:
    """At once. That nobody reads any more is no reason to end a fleet."""
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)

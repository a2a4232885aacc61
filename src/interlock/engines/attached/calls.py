"""What an attached vLLM can be asked, whatever the way there: in its own process, or over HTTP."""

from __future__ import annotations

from typing import Protocol

import msgspec

from interlock.engines.base import EngineStartError
from interlock.wire.fleet_messages import Load


class Unreachable(Exception):  # noqa: N818 - says what is, as the others do
    """The engine does not answer now. No proof of anything: it is asked again."""


class CallFailed(Exception):  # noqa: N818 - says what is, as the others do
    """The engine answered that it could not. The message has its words."""


def not_attached(where: str, why: Exception) -> EngineStartError:
    """In one sentence, though `why` begins with `where` or does not name it."""
    words = str(why)
    if words.startswith(where):
        words = f"it{words.removeprefix(where)}"
    return EngineStartError(f"{where} cannot be attached: {words}")


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while it lives."""

    model: str
    max_model_tokens: int
    sleeps: bool
    """Whether it can give memory back: vLLM's sleep mode, where the platform has it and it was started with it."""
    pid: int = 0


class Calls(Protocol):
    """One vLLM 0.32. Every call may raise `Unreachable`, `CallFailed`, and `EngineGone` when it is dead for good."""

    @property
    def where(self) -> str:
        """For sentences."""
        ...

    async def describe(self) -> Described:
        """Raises `EngineStartError` for what cannot be attached, saying what to do."""
        ...

    async def pause(self, mode: str) -> None:
        """Caches stay. Returns when it stands between two steps. Raises `Unable` for a mode that it does not have."""
        ...

    async def resume(self) -> None: ...

    async def is_paused(self) -> bool: ...

    async def reload(self, path: str) -> None:
        """Its weights are those of the checkpoint directory `path`, as it sees it, in place."""
        ...

    async def drop_caches(self) -> None:
        """KV of running requests, prefix cache, its connector's, multimodal and encoder caches. Raises `CallFailed` while
        something holds blocks: a load on its way."""
        ...

    async def name_weights(self, version: str) -> None:
        """vLLM's own label, which its answers carry."""
        ...

    async def weights_name(self) -> str: ...

    async def sleep(self) -> None:
        """Paused, gives weights' and KV's memory back."""
        ...

    async def wake(self, what: str) -> None:
        """Takes "weights" or "kv_cache" back; with the last of them it steps again."""
        ...

    async def load(self) -> Load: ...

"""What an engine is to its runner: token ids in, token ids out, and a few ways to stand still.

An adapter (`engines.vllm`) fits one kind of engine to this. The runner owns everything else: the socket, the fences, who
asked for what, which tokens were already heard. An adapter therefore keeps no request longer than it computes it, makes
no text, and never decides whether it *should* run.

An engine may be several processes. They are all started by the process that called `start`, in its process group.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from interlock.core.targets import Mode
from interlock.wire.engine_messages import Sampling, TokenLogprobs
from interlock.wire.fleet_messages import Load


class EngineStartError(Exception):
    """The engine could not start. The message is one sentence for the operator that says what to do."""


class EngineGone(Exception):  # noqa: N818 - says what is, as the others do
    """The engine, or a part of it that it cannot do without, has died. Nothing can be asked of it any more."""


class RequestRejected(Exception):  # noqa: N818 - says what is, as the others do
    """The engine did not begin this request: its parameters or prompt are impossible. The message says which."""


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the engine gets it. `key` is unique among all that this engine is ever given."""

    key: str
    prompt: list[int]
    sampling: Sampling
    cache_salt: str
    priority: int = 0


class Progress(msgspec.Struct, frozen=True):
    """What one step made of one request. `finish` is "" or ends it: "stop", "length", "abort", "error".

    `logprobs` has one entry a token when the request asked for them, else none. `cached_tokens` counts the prompt's
    tokens whose KV was reused, from whatever cache. `detail`: for "stop" the stop token id that ended it (else empty),
    for "error" what happened.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish: str
    cached_tokens: int
    detail: str = ""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while an engine lives."""

    kind: str
    model: str
    """Identity of the weights' content and configuration: equal identities give equal tokens."""
    max_model_tokens: int
    pause_modes: frozenset[Mode]
    features: list[str]


class Engine(Protocol):
    """One engine. Every method may raise `EngineGone`; after that only `stop` and `died` mean anything."""

    async def start(self) -> Capabilities:
        """Loads the model and returns once requests can be computed. It starts *unpaused*.

        Raises `EngineStartError`.
        """
        ...

    def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        """Computes one request, yielding what each step made of it; the last one yielded has a `finish`.

        While the engine is paused it waits. Leaving the iterator early (or cancelling the task in it) aborts the request
        in the engine. Raises `RequestRejected` before the first step, never after it.
        """
        ...

    async def abort(self, key: str) -> None:
        """Ends the request; its iterator yields `finish` "abort" soon, also while paused. Unknown keys are ordinary."""
        ...

    async def pause(self, mode: Mode) -> None:
        """Returns when the engine stands between two steps: no forward runs, no transfer touches KV, until `unpause`.

        WAIT lets the running requests end first, KEEP freezes them (they go on after `unpause`, from the same KV),
        ABORT ends them with `finish` "abort". Requests that come later wait. Cached KV is kept. A stricter pause may be
        asked while one is under way or in force; cancelling the call leaves a pause of unknown progress, which the next
        `pause` completes.
        """
        ...

    async def unpause(self) -> None:
        """Steps again. No effect when not paused."""
        ...

    async def stop(self) -> None:
        """Ends the engine's processes, running requests included; returns when they have been told, within seconds."""
        ...

    async def died(self) -> str:
        """Waits until the engine dies by itself, and says how. A `stop` does not count."""
        ...

    def load(self) -> Load:
        """How busy it is, at its last step."""
        ...

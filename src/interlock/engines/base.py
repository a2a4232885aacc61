"""What an engine is to its runner: token ids in, token ids out, and a few ways to stand still.

An adapter (`engines.vllm`, `engines.transformers`) fits one kind of engine to this. The runner owns everything else: the
socket, the fences, who asked for what, which tokens were already heard. An adapter therefore keeps no request longer than
it computes it, makes no text, and never decides whether it *should* run.

An engine may be several processes. They are all started by the process that called `start`, in its process group.

    start ──► running ◄──► paused ◄──► suspended          `stop` from everywhere
              generate     update_weights                 a request waits wherever the engine is not running

A request that was begun is kept over a pause (mode KEEP), an update and a suspension, and goes on afterwards: its tokens
so far are facts. `check_engine` (`interlock.testing`) checks an adapter against every sentence here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import msgspec

from interlock.core.sampling import Sampling
from interlock.core.targets import KeptCache, Mode
from interlock.wire.engine_messages import TokenLogprobs
from interlock.wire.fleet_messages import Load
from interlock.wire.token_ids import pack_ids, unpack_ids


class EngineStartError(Exception):
    """The engine could not start. The message is one sentence for the operator that says what to do."""


class EngineGone(Exception):  # noqa: N818 - says what is, as the others do
    """The engine, or a part of it that it cannot do without, has died. Nothing can be asked of it any more."""


class RequestRejected(Exception):  # noqa: N818 - says what is, as the others do
    """The engine did not begin this request: its parameters or prompt are impossible. The message says which."""


class Unable(NotImplementedError):  # noqa: N818 - says what is, as the others do
    """This kind of engine, or this one as it was started, cannot do that (`Capabilities`); nothing has changed."""


class NotStanding(Exception):  # noqa: N818 - says what is, as the others do
    """Asked for what needs an engine that stands (is paused and not suspended, or suspended); nothing has changed."""


class UpdateFailed(Exception):  # noqa: N818 - says what is, as the others do
    """The engine has no weights that are known to be whole: it stays paused until an update succeeds, or is stopped."""


class Work(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """One request as the engine gets it, made by `of` or from what arrived. `key` is unique among all that this engine is ever
    given."""

    key: str
    packed_prompt: bytes
    """As by `wire.token_ids`: most of what travels is never looked at by who passes it on."""
    sampling: Sampling
    cache_salt: str
    priority: int = 0
    """Lower is earlier, as vLLM counts."""

    @classmethod
    def of(
        cls, key: str, prompt: Sequence[int], sampling: Sampling, cache_salt: str, priority: int = 0
    ) -> Work:
        """For who has the prompt as token ids."""
        return cls(
            key=key,
            packed_prompt=pack_ids(prompt),
            sampling=sampling,
            cache_salt=cache_salt,
            priority=priority,
        )

    @cached_property
    def prompt(self) -> list[int]:
        """Its token ids, unpacked once. Raises `RequestRejected` when they are none."""
        try:
            return unpack_ids(self.packed_prompt)
        except ValueError as error:
            raise RequestRejected(f"the prompt cannot be read: {error}") from error


class Progress(msgspec.Struct, frozen=True, gc=False):
    """What one step made of one request. `finish` is "" or ends it: "stop", "length", "abort", "error".

    `logprobs` has one entry a token when the request asked for them, else none. `cached_tokens` counts the prompt's
    tokens whose KV was reused, from whatever cache. `detail`: for "stop" the stop token id that ended it (else empty),
    for "error" what happened, for "abort" `TAKEN` when the request was taken out.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish: str
    cached_tokens: int
    detail: str = ""


TAKEN = "taken out"


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while an engine lives."""

    kind: str
    model: str
    """Identity of the weights' content and configuration at the start: equal identities give equal tokens."""
    max_model_tokens: int
    pause_modes: frozenset[Mode]
    features: list[str]
    """Sampling parameters beyond the plain ones that it serves: "logprobs", "logit_bias", "priority", "seed", …"""
    saves: bool = False
    """KV blocks go to and come from a store."""
    block_tokens: int | None = None
    """Tokens of one block of its KV cache, where it has blocks."""
    updates: bool = False
    suspends: bool = False
    moves_requests: bool = False
    """`take` and `put`: a request's whole state can leave and come back."""

    @property
    def abilities(self) -> list[str]:
        """What it can do, as the fleet names it."""
        able = {
            "saves": self.saves,
            "updates": self.updates,
            "suspends": self.suspends,
            "moves_requests": self.moves_requests,
        }
        return [name for name, can in able.items() if can]


class RequestState(msgspec.Struct, frozen=True, kw_only=True):
    """A request taken out of an engine: all that it takes to go on with it as if nothing had been.

    `tokens` were made so far. `payload` is the engine's own (caches, generator, counters), empty where tokens carry all;
    `model` is the identity of the weights that made it: another engine of that kind and model can put it.
    """

    kind: str
    model: str
    work: Work
    tokens: list[int]
    payload: bytes = b""


class Engine(Protocol):
    """One engine. Every method may raise `EngineGone`; after that only `stop` and `died` mean anything.

    One caller at a time walks it (`pause` to `stop`); `generate`, `abort` and `load` come at any time, in any number.
    An adapter derives from this class: what it does not have then refuses by `Unable`, as its `Capabilities` say.
    """

    async def start(self) -> Capabilities:
        """Loads the model and returns once requests can be computed. It starts *unpaused*.

        Raises `EngineStartError`.
        """
        ...

    # --- requests ------------------------------------------------------------------------------------------------

    def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        """Computes one request, yielding what each step made of it; the last one yielded has a `finish`.

        While the engine is paused or suspended it waits. Leaving the iterator early (or cancelling the task in it)
        aborts the request in the engine. Raises `RequestRejected` before the first step, never after it; what a client
        cannot be blamed for ends the request with `finish` "error" instead.
        """
        ...

    async def abort(self, key: str) -> None:
        """Ends the request; its iterator yields `finish` "abort" soon, in whatever phase it is, also while paused or
        suspended. Unknown keys are ordinary."""
        ...

    async def states(self) -> list[RequestState]:
        """Paused or suspended, a copy of every request's state without its caches: `put` makes them anew from the tokens.

        Raises `NotStanding`, `Unable`.
        """
        raise Unable(f"{type(self).__name__} cannot tell its requests' states")

    async def take(self, key: str) -> RequestState:  # noqa: ARG002
        """Takes a request out, with all its state. Its iterator yields what it did not yield yet, then `finish` "abort"
        with `detail` TAKEN.

        Raises `NotStanding` unless paused, `KeyError` for a request that is not here (it may just have ended), `Unable`.
        """
        raise Unable(f"{type(self).__name__} cannot take requests out")

    def put(self, state: RequestState) -> AsyncGenerator[Progress, None]:  # noqa: ARG002
        """Goes on with a request that was taken out, here or elsewhere: as `generate`, yielding only new tokens.

        The tokens are those that it would have made had it stayed, sampled ones included. At any time; `state.work.key`
        may be in use no more. Raises `RequestRejected` for a state of another kind or model, `Unable`.
        """
        raise Unable(f"{type(self).__name__} cannot put requests back")

    # --- the walk ------------------------------------------------------------------------------------------------

    async def pause(self, mode: Mode) -> None:
        """Returns when the engine stands between two steps: no forward runs, no transfer touches KV, until `unpause`.

        WAIT lets the running requests end first, KEEP freezes them (they go on after `unpause`, from the same KV, in
        mid-prefill too), ABORT ends them with `finish` "abort". Requests that come later wait. Cached KV is kept. A
        stricter pause may be asked while one is under way or in force; cancelling the call leaves a pause of unknown
        progress, which the next `pause` completes. A laxer or equal one changes nothing.
        """
        ...

    async def unpause(self) -> None:
        """Steps again. No effect when not paused. Raises `NotStanding` when suspended, `UpdateFailed` without weights."""
        ...

    async def update_weights(
        self,
        path: Path,  # noqa: ARG002
        version: str,  # noqa: ARG002
        kv: KeptCache = KeptCache.RECOMPUTE,  # noqa: ARG002
    ) -> None:
        """Paused, changes to the weights of the checkpoint directory `path`, called `version`; stays paused.

        The same architecture and shapes. Blocks saved or looked up afterwards are named by the new weights' content, so
        that none of another version is hit; cached KV of the old version is dropped. A request that lives through it
        goes on from its tokens, its KV as `kv` says; one that cannot (it counts on state that an engine of this kind
        loses) ends with `finish` "error" that names why, at its turn.

        Raises `NotStanding` unless paused, `Unable` (also for a `kv` that this engine cannot do), and `UpdateFailed`:
        then the engine has no version, computes nothing, and keeps its requests; another update or `stop` is all it takes.
        """
        raise Unable(f"{type(self).__name__} cannot change its weights")

    async def suspend(self) -> None:
        """Paused, gives memory back (weights, KV; processes, where only that frees it). Requests stay and wait.

        Raises `NotStanding` unless paused, `Unable`. No effect when suspended.
        """
        raise Unable(f"{type(self).__name__} cannot be suspended")

    async def resume(self) -> None:
        """Takes the memory again, with the weights it had; afterwards the engine is paused as before. No effect when
        it is not suspended.

        Requests go on at `unpause`, their KV computed anew or found in a store; those that cannot end as
        `update_weights` says. Raises `EngineStartError`: then it is still suspended. Raises `Unable`.
        """
        raise Unable(f"{type(self).__name__} cannot be resumed")

    async def stop(self) -> None:
        """Ends the engine's processes, running requests included; returns when they have been told, within seconds.

        From every state, also during another call, which then raises `EngineGone`.
        """
        ...

    # --- what it is ----------------------------------------------------------------------------------------------

    async def died(self) -> str:
        """Waits until the engine dies by itself, and says how. A `stop` does not count, nor do processes that an update
        or a suspension ends."""
        ...

    def load(self) -> Load:
        """How busy it is, at its last step. A request that waits for an unpause is waiting."""
        ...

    def counts(self) -> Mapping[str, int]:
        """What has happened since the start, by name: counters that only grow, for metrics and tests. Where it applies:
        `prompt_tokens`, `cached_tokens`, `generated_tokens`, `saved_blocks`, `loaded_blocks`, `failed_loads`."""
        return {}

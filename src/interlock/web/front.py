"""What all endpoints of one front share, and what they need of the fleet."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import msgspec

from interlock.core.limits import TOKENIZE_INLINE_CHARS_MAX
from interlock.core.roster import Sight
from interlock.core.targets import State
from interlock.fleet.generation import Generation
from interlock.fleet.ledger import GenerationRequest
from interlock.host.base import Host
from interlock.text.model import TextModel
from interlock.web.errors import ApiError, no_engine
from interlock.web.metrics import FrontMetrics
from interlock.wire.fleet_messages import CommandProgress, CommandReport, Events, Membership

T = TypeVar("T")


class Fleet(Protocol):
    """The part of `fleet.dispatcher.Dispatcher` that the web layer uses."""

    @property
    def membership(self) -> Membership | None: ...

    @property
    def coordinator_connected(self) -> bool: ...

    @property
    def ready(self) -> bool: ...

    @property
    def counters(self) -> Mapping[str, int]: ...

    def in_flight(self) -> dict[str, int]: ...

    def submit(self, request: GenerationRequest) -> Generation: ...

    @property
    def recovered(self) -> bool:
        """Whether all that an earlier life of this front had, and that is left, is known."""
        ...

    def known(self, request: str) -> GenerationRequest | None: ...

    def take_up(self, request: str) -> Generation:
        """Raises `KeyError`."""
        ...


class Coordinator(Protocol):
    """The part of `fleet.client.FleetClient` that the admin API uses."""

    async def status(self, timeout_s: float = ...) -> Membership: ...

    async def pause(
        self,
        mode: str = ...,
        *,
        owner: str,
        timeout_s: float = ...,
        hold_seconds: float | None = ...,
        allow_unknown: bool = ...,
    ) -> CommandProgress: ...

    async def unpause(
        self, *, owner: str, timeout_s: float = ..., break_hold_of: str | None = ...
    ) -> CommandProgress: ...

    async def update_weights(
        self, version: str, weights: str, *, owner: str, kv: str = ..., timeout_s: float = ...
    ) -> CommandProgress: ...

    async def suspend(self, *, owner: str, timeout_s: float = ...) -> CommandProgress: ...

    async def resume(self, *, owner: str, timeout_s: float = ...) -> CommandProgress: ...

    async def start(
        self, *, owner: str, timeout_s: float = ..., version: str | None = ..., weights: str = ...
    ) -> CommandProgress: ...

    async def drain(self, *, owner: str, timeout_s: float = ...) -> CommandProgress: ...

    async def stop(self, *, owner: str, timeout_s: float = ..., composite: bool = ...) -> CommandProgress: ...

    async def command(
        self, command_id: str, *, owner: str = ..., timeout_s: float = ...
    ) -> CommandReport: ...

    async def events(
        self, after: int = ..., ring: str = ..., *, wait_seconds: float = ..., timeout_s: float = ...
    ) -> Events: ...

    async def metrics(self, timeout_s: float = ...) -> str: ...


class Access(msgspec.Struct, frozen=True):
    """Who may ask. Without an `api_key` anybody may use the model; without either nobody may command the fleet."""

    api_key: str | None = None
    admin_token: str | None = None

    def may_use(self, given: str | None) -> bool:
        """Whether who sent this token may ask the model."""
        return self.api_key is None or self.may_command(given)

    def may_command(self, given: str | None) -> bool:
        """Whether who sent this token may command the fleet."""
        if given is None:
            return False
        # Both comparisons are made, each in constant time: how long an answer takes tells nothing about a secret.
        matches = [
            hmac.compare_digest(given.encode(errors="surrogateescape"), secret.encode())
            for secret in (self.api_key, self.admin_token)
            if secret
        ]
        return any(matches)


class Front:
    """One a process."""

    def __init__(
        self,
        host: Host,
        fleet: Fleet,
        coordinator: Coordinator,
        text: TextModel,
        *,
        served_model_name: str,
        access: Access,
    ) -> None:
        self.host, self.fleet, self.text, self.access = host, fleet, text, access
        self.coordinator = coordinator
        self.served_model_name = served_model_name
        self.created_s = host.clock.wall_ns() // 1_000_000_000
        self.metrics = FrontMetrics(fleet)
        self.leaving = False
        """SIGTERM was heard: what runs is drained, nothing new is begun."""
        self.body_bytes = 0
        """Of all request bodies that are held now."""
        self._fingerprint: tuple[Membership | None, str | None] = (None, None)

    def max_model_tokens(self) -> int:
        """The longest sequence that every engine takes. Raises `ApiError` 503 while none has said."""
        view = self.fleet.membership
        members = view.members if view is not None and view.target != State.STOPPED else []
        lengths = [m.facts.max_model_tokens for m in members if m.state != Sight.LOST and m.facts.address]
        if not lengths:
            raise no_engine(_why_nobody(view))
        return min(lengths)

    def system_fingerprint(self) -> str | None:
        """Of the weights that answer: equal fingerprints, equal tokens."""
        view = self.fleet.membership
        if self._fingerprint[0] is not view:
            made = None
            served = [member.facts.model for member in view.members if member.facts.address] if view else []
            if view is not None and served:
                said = f"{served[0]}:{view.version}"
                made = "fp_" + hashlib.blake2b(said.encode(), digest_size=6).hexdigest()
            self._fingerprint = (view, made)
        return self._fingerprint[1]

    async def off_loop_if_long(
        self, size: int, make: Callable[[], T], inline_max: int = TOKENIZE_INLINE_CHARS_MAX
    ) -> T:
        """`make()` for a text of `size` characters: in a thread where it would hold every stream up."""
        return make() if size <= inline_max else await self.host.in_thread(make)

    def check_model(self, model: str) -> None:
        """Raises `ApiError` 404 in OpenAI's words."""
        if model != self.served_model_name:
            raise ApiError(
                404,
                f"The model `{model}` does not exist; this server serves `{self.served_model_name}`.",
                param="model",
                code="model_not_found",
            )


def _why_nobody(view: Membership | None) -> str:
    if view is not None and view.target == State.STOPPED:
        return "The fleet is stopped; `interlock ctl start` starts its engines again."
    if view is not None and view.members:
        return "No engine of the fleet is alive; they are started again: ask again in a moment."
    return "No engine has joined the fleet yet; ask again in a moment."

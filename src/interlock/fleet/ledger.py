"""The ledger of one front: each request it has accepted, what was delivered of it, and which attempt runs where.

The front that holds a client's connection owns that request: prompt, parameters, attempt, and every token id that went out
(hazards F4). An engine's word counts only if it comes from the life that the current attempt was given to, and only for the
tokens that follow what is here: a repeat changes nothing, a gap is not filled with a guess, an old attempt is not heard. So
frames may be late, doubled or lost, and no token changes, is lost or repeated.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from interlock.core.errors import LocalProtocolError
from interlock.core.limits import REQUEST_SECONDS_DEFAULT, REQUESTS_IN_FLIGHT_MAX
from interlock.core.sampling import Sampling
from interlock.fleet.made import Made, extended
from interlock.wire.engine_messages import Delta, TokenLogprobs


class Life(msgspec.Struct, frozen=True, order=True, gc=False, cache_hash=True):
    """One life of one engine."""

    name: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.name} (incarnation {self.incarnation})"


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What a client asked for, validated and tokenised. `id` is unique in this front's life, `deadline_s` counts from submit."""

    id: str
    prompt: list[int]
    sampling: Sampling
    tenant: str = ""
    deadline_s: float = REQUEST_SECONDS_DEFAULT
    priority: int = 0
    engine: str | None = None
    """Prefer this engine by name, as long as it can take work: for tests and debugging."""
    note: bytes = b""
    """The caller's own: what it needs to answer whoever takes this request up after its death."""


class Verdict(StrEnum):
    """What the ledger made of a delta."""

    NEW = "new"
    REPEAT = "repeat"
    """All of it is known: a frame that came twice."""
    GAP = "gap"
    """Tokens before it are missing: ask for them, deliver nothing."""
    STALE = "stale"
    """Of an attempt that was given up: whoever still runs it should stop."""
    UNKNOWN = "unknown"
    """Of a request that is not here: ended, aborted, or never ours."""
    FOREIGN = "foreign"
    """From a life that this attempt was not given to: somebody has a defect."""
    CONFLICT = "conflict"
    """It contradicts what was delivered, or says more than was asked for: that engine cannot be believed."""


class Heard(msgspec.Struct, frozen=True, gc=False):
    """The verdict on one delta, and what of it is new. `finish`, once not empty, is never followed by anything."""

    verdict: Verdict
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish: str = ""


class Entry(msgspec.Struct, gc=False):
    """One request's line. `attempt` 0 with no `life`: not dispatched yet."""

    request: GenerationRequest
    delivered: list[int] = []
    attempt: int = 0
    life: Life | None = None
    base: int = 0
    """Number of delivered tokens when the current attempt was dispatched: its own tokens follow them."""
    failures: int = 0
    """Attempts that ended by an engine's fault without a token: the request itself may be what engines die of."""
    logprobs: list[TokenLogprobs] = []
    """Of the delivered tokens, where they were asked for."""
    made: list[Made] = []
    """By which weights the delivered tokens were made."""
    cached_tokens: int | None = None
    """Of the client's prompt, where it first ran."""
    home: str = ""
    """From an earlier life of this front: the engine that had the attempt, and may have it still."""
    told: int = 0
    """So many tokens an earlier life may have delivered: with fewer here, and their engine gone, nobody can go on from them."""

    @property
    def attempt_tokens(self) -> int:
        """How many tokens of the current attempt are here."""
        return len(self.delivered) - self.base


class Ledger:
    """All requests of one front. Bounded by `capacity`; a request leaves it when its end was delivered, or by `remove`."""

    def __init__(self, capacity: int = REQUESTS_IN_FLIGHT_MAX) -> None:
        self.capacity = capacity
        self._entries: dict[str, Entry] = {}
        self._of_life: dict[Life, set[str]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def full(self) -> bool:
        """Whether `add` would raise."""
        return len(self._entries) >= self.capacity

    def get(self, request: str) -> Entry | None:
        """None where it is not here, or no more."""
        return self._entries.get(request)

    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    def add(self, request: GenerationRequest) -> Entry:
        """Raises LocalProtocolError for an id that is here already, and when the ledger is full."""
        if request.id in self._entries:
            raise LocalProtocolError(
                f"request {request.id} is in the ledger already", hint="ids are used once"
            )
        if self.full:
            raise LocalProtocolError(f"the ledger holds {self.capacity} requests", hint="ask `full` first")
        entry = self._entries[request.id] = Entry(request)
        return entry

    def restore(self, entry: Entry) -> None:
        """A line of an earlier life's ledger. Raises as `add`."""
        self.add(entry.request)
        self._entries[entry.request.id] = entry

    def adopt(self, request: str, life: Life) -> Entry:
        """The attempt that an earlier life of this front had given to that engine goes on there."""
        entry = self._entries[request]
        assert entry.life is None
        entry.life, entry.home = life, ""
        self._of_life.setdefault(life, set()).add(request)
        return entry

    def assign(self, request: str, life: Life) -> Entry:
        """The next attempt is given to `life`. Raises LocalProtocolError while the last one still counts."""
        entry = self._entries[request]
        if entry.life is not None:
            raise LocalProtocolError(
                f"request {request} runs on {entry.life} as attempt {entry.attempt}", hint="release it first"
            )
        entry.attempt += 1
        entry.life, entry.base, entry.home = life, len(entry.delivered), ""
        self._of_life.setdefault(life, set()).add(request)
        return entry

    def release(self, request: str) -> Entry:
        """The current attempt counts no more: what it still says is not heard."""
        entry = self._entries[request]
        if entry.life is not None:
            self._forget(entry.life, request)
            entry.life = None
        return entry

    def remove(self, request: str) -> Entry | None:
        """It has ended; None where it was not here."""
        entry = self._entries.pop(request, None)
        if entry is not None and entry.life is not None:
            self._forget(entry.life, request)
        return entry

    def _forget(self, life: Life, request: str) -> None:
        running = self._of_life[life]
        running.discard(request)
        if not running:
            del self._of_life[life]

    def running_on(self, life: Life) -> list[Entry]:
        """Whose current attempt was given to that life, by name."""
        return [self._entries[request] for request in sorted(self._of_life.get(life, ()))]

    def in_flight(self, life: Life) -> int:
        """How many they are."""
        return len(self._of_life.get(life, ()))

    def lives(self) -> list[Life]:
        """Those that have an attempt."""
        return list(self._of_life)

    def accept(self, delta: Delta, sender: Life) -> Heard:
        """Judges one delta; what is new of it is appended to the request's delivered tokens.

        A delta with an end that is accepted releases the attempt: it is over by its engine's own word.
        """
        entry = self._entries.get(delta.request)
        if entry is None:
            return Heard(Verdict.UNKNOWN)
        if delta.attempt != entry.attempt or entry.life is None:
            return Heard(Verdict.STALE if delta.attempt <= entry.attempt else Verdict.FOREIGN)
        if sender is not entry.life and sender != entry.life:
            return Heard(Verdict.FOREIGN)
        known = len(entry.delivered) - entry.base - delta.start
        if known < 0:
            return Heard(Verdict.GAP)
        tokens, logprobs = delta.tokens, delta.logprobs
        if logprobs and len(logprobs) != len(tokens):
            return Heard(Verdict.CONFLICT)
        if known:  # some of it is here already
            if _contradicts(delta, entry, known):
                return Heard(Verdict.CONFLICT)
            tokens, logprobs = tokens[known:], logprobs[known:]
        if len(entry.delivered) + len(tokens) > entry.request.sampling.max_tokens:
            return Heard(Verdict.CONFLICT)
        if tokens:
            entry.delivered += tokens
            entry.logprobs += logprobs
            entry.made = extended(entry.made, Made(delta.version, len(tokens)))
        elif not delta.finish:
            return Heard(Verdict.REPEAT)
        if entry.cached_tokens is None:
            entry.cached_tokens = delta.cached_tokens
        if delta.finish:
            self._forget(entry.life, delta.request)
            entry.life = None
        return Heard(Verdict.NEW, tokens, logprobs, delta.finish)

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not balance: for idle times, simulated steps and tests."""
        assert len(self._entries) <= self.capacity
        seen = 0
        for request, entry in self._entries.items():
            assert entry.request.id == request
            assert 0 <= entry.base <= len(entry.delivered) <= entry.request.sampling.max_tokens
            assert (entry.attempt == 0) <= (entry.life is None and not entry.delivered)
            if entry.life is not None:
                assert request in self._of_life[entry.life]
                seen += 1
        assert seen == sum(len(running) for running in self._of_life.values())
        assert all(self._of_life.values())


def _contradicts(delta: Delta, entry: Entry, known: int) -> bool:
    """Whether it says other tokens than those that are here, or an end before the last of them."""
    told = delta.tokens[:known]
    at = entry.base + delta.start
    return (
        delta.start < 0
        or entry.delivered[at : at + len(told)] != told
        or (bool(delta.finish) and len(delta.tokens) < known)
    )

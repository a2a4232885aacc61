"""What an earlier life of this front had, and how it becomes this one's: from its disk, or from the engines that hold it.

A request with an engine waits until that engine has told what it holds: then it is adopted, attempt and all, or goes on from what
was delivered as after any engine's loss. All of them are *parked* (`parked`) until their clients take them up.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from interlock.core.errors import InterlockError
from interlock.core.limits import RECOVERY_SECONDS_MAX
from interlock.fleet.generation import Generation, RequestFailed
from interlock.fleet.kept_requests import KeptRequest, from_held
from interlock.fleet.ledger import Entry, GenerationRequest, Ledger, Life
from interlock.fleet.parked import Parked, replayed
from interlock.telemetry.events import EventLog
from interlock.wire.engine_messages import Held


class Books(Protocol):
    """Whose requests these become (`fleet.requests`)."""

    ledger: Ledger
    counters: Counter[str]

    def enter(self, entry: Entry, *, queued: bool) -> None: ...

    def give_reader(self, request: str) -> Generation: ...

    def requeue(self, entry: Entry) -> None: ...

    def fail(self, entry: Entry, error: InterlockError) -> None: ...

    async def abort(self, request: str) -> None: ...


class LastLife:
    """Mutable, one a front; it decides, `Books` carries out."""

    def __init__(self, books: Books, events: EventLog) -> None:
        self._books, self._events = books, events
        self.parked = Parked()
        self.awaited: set[str] = set()
        """Requests whose engine (`Entry.home`) has not said yet whether it holds them: in the ledger, and not in the queue."""
        self._ran_s = 0.0

    def restore(self, kept: KeptRequest) -> None:
        """Beyond the ledger's room, and under a name that is in use, nothing is restored."""
        ledger, request = self._books.ledger, kept.request
        if ledger.full or ledger.get(request.id) is not None:
            return
        entry = Entry(
            request,
            delivered=list(kept.delivered),
            attempt=kept.attempt,
            base=kept.base,
            failures=kept.failures,
            told=kept.told,
            logprobs=list(kept.logprobs),
            made=list(kept.made),
            cached_tokens=kept.cached_tokens,
            home=kept.engine,
        )
        if entry.home:
            self.awaited.add(request.id)
        self.parked.add(request.id)
        self._books.enter(entry, queued=not entry.home)

    def on_held(self, life: Life, held: Held) -> None:
        """An engine has it from an earlier life of this front, and may have more tokens of it than we."""
        ledger = self._books.ledger
        if ledger.get(held.request) is None and held.note:
            try:
                self.restore(from_held(held, life.name))
            except ValueError as error:
                self._events.emit("held_unusable", request=held.request, engine=life.name, reason=str(error))
        entry = ledger.get(held.request)
        if (
            entry is not None
            and held.request in self.awaited
            and (entry.home, entry.attempt) == (life.name, held.attempt)
            and held.tokens >= entry.attempt_tokens
        ):
            self.awaited.discard(held.request)
            ledger.adopt(held.request, life)

    def release(self, engine: str | None) -> None:
        """That engine (None: any) does not hold what it might have: it goes on from what was delivered."""
        for request in sorted(self.awaited):
            entry = self._books.ledger.get(request)
            if entry is not None and engine in (None, entry.home):
                self.awaited.discard(request)
                entry.home = ""
                self._books.requeue(entry)

    def known(self, request: str) -> GenerationRequest | None:
        """What was asked under this name, as long as it can be taken up."""
        ended = self.parked.ended(request)
        entry = ended.entry if ended is not None else self._books.ledger.get(request)
        return entry.request if entry is not None else None

    def take_up(self, request: str) -> Generation:
        """A new reader, who reads from the first token on; an older one is told so. Raises `KeyError`."""
        books, ended = self._books, self.parked.ended(request)
        if ended is not None:
            books.counters["taken_up"] += 1
            return replayed(Generation(ended.entry.request, books.abort), ended.entry, ended)
        entry = books.ledger.get(request)
        if entry is None:
            raise KeyError(request)
        books.counters["taken_up"] += 1
        self.parked.take(request)
        return replayed(books.give_reader(request), entry, None)

    def ran(self, seconds: float) -> None:
        """The fleet ran so long: only that counts for clients and engines that are waited for."""
        self._ran_s += seconds
        for request in self.parked.ran(seconds):
            entry = self._books.ledger.get(request)
            if entry is not None:
                said = f"nobody took request {request} up again in time"
                self._books.fail(entry, RequestFailed("not_taken_up", said))
        if self.awaited and self._ran_s > RECOVERY_SECONDS_MAX:
            self.release(None)

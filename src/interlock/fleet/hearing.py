"""What engines say of a front's requests: tokens, ends and refusals, each judged before anything is done about it.

The ledger judges every delta; what is new is pushed to its reader. Nothing here waits, so that between the judgement of a frame and
the answer to it nothing else can touch a request.
"""

from __future__ import annotations

from interlock.core.limits import REFUSED_SECONDS, RETRY_AFTER_SECONDS
from interlock.fleet.engine_link import EngineLink
from interlock.fleet.generation import Overloaded, RequestFailed
from interlock.fleet.ledger import Entry, Heard, Life, Verdict
from interlock.fleet.parked import Ended
from interlock.fleet.requests import Requests, Roads
from interlock.wire.engine_messages import (
    Abort,
    Acknowledge,
    AcknowledgeAll,
    Delta,
    End,
    Refused,
    Tokens,
)

REFUSALS = ("stale_epoch", "not_running", "invalid", "overloaded", "unknown")


class Hearing:
    """One front's ear; `requests` are changed by what it hears."""

    def __init__(self, requests: Requests, roads: Roads) -> None:
        self._requests, self._roads = requests, roads

    def on_tokens(self, link: EngineLink, tokens: Tokens) -> None:
        """Judges a frame, delta by delta, and answers it."""
        requests, life = self._requests, link.life
        accept, counters, unread = requests.ledger.accept, requests.counters, requests.unread
        over: list[End] = []
        gap = False
        for delta in tokens.deltas:
            heard = accept(delta, life)
            if heard.verdict is Verdict.NEW:
                if not self._on_new(life, delta, heard):
                    over.append(End(delta.request, delta.attempt))
                continue
            counters[f"deltas_{heard.verdict}"] += 1
            match heard.verdict:
                case Verdict.CONFLICT:
                    requests.failed(
                        requests.entry(delta.request), f"{life} contradicted what it had said", life
                    )
                    self._roads.post(life, Abort(delta.request, delta.attempt))
                case Verdict.GAP:
                    gap = True
                case Verdict.STALE | Verdict.UNKNOWN | Verdict.FOREIGN if not delta.finish:
                    self._roads.post(life, Abort(delta.request, delta.attempt))
                case Verdict.STALE | Verdict.UNKNOWN | Verdict.FOREIGN:
                    if not unread.holds(delta.request, delta.attempt):
                        over.append(End(delta.request, delta.attempt))
                case Verdict.REPEAT:
                    pass
        self._acknowledge(life, over)
        if gap:
            link.resume()

    def acknowledge_read(self) -> None:
        """Engines may forget what was read to its end since the last time."""
        for life, ends in self._requests.unread.take_read().items():
            self._acknowledge(life, ends)

    def _acknowledge(self, life: Life, ends: list[End]) -> None:
        if len(ends) == 1:
            self._roads.post(life, Acknowledge(ends[0].request, ends[0].attempt))
        elif ends:
            self._roads.post(life, AcknowledgeAll(ends))

    def _on_new(self, life: Life, delta: Delta, heard: Heard) -> bool:
        """False where the attempt is over and nobody will ask for it again."""
        requests = self._requests
        entry = requests.entry(delta.request)
        finish = "" if heard.finish == "error" else heard.finish
        parked = delta.request in requests.last_life.parked  # nobody reads yet; the ledger has it
        if not parked and not requests.generation(delta.request).push(
            heard.tokens, heard.logprobs, finish, delta.cached_tokens, delta.detail, delta.version
        ):
            waiting = "its reader is more tokens behind than are kept for it"
            requests.fail(
                entry, RequestFailed("slow_reader", f"request {delta.request} was ended: {waiting}")
            )
            return not heard.finish
        if finish and parked:
            requests.last_life.parked.end(Ended(entry, finish, delta.detail))
        elif finish:
            requests.unread.keep(delta.request, life, delta.attempt, entry.attempt_tokens)
        if finish:
            requests.end(entry, finish)
            return not parked
        if heard.finish:
            requests.failed(entry, f"{life} failed at it: {delta.detail or 'no reason was given'}", life)
            return False
        return True

    def on_refused(self, link: EngineLink, refused: Refused) -> None:
        """What was dispatched there was not begun, or is not known there any more."""
        requests = self._requests
        entry = requests.ledger.get(refused.request)
        if entry is None or entry.life != link.life or entry.attempt != refused.attempt:
            return
        requests.counters[f"refused_{refused.code if refused.code in REFUSALS else 'other'}"] += 1
        match refused.code:
            case "invalid":
                requests.fail(entry, RequestFailed("invalid", refused.message))
            case "stale_epoch":
                link.floor = max(link.floor, refused.epoch)
                requests.requeue(entry)
            case "overloaded":
                link.block(RETRY_AFTER_SECONDS)
                self._on_overloaded(entry, link)
            case "unknown" if entry.attempt_tokens:
                requests.failed(entry, f"{link.life} does not know it any more", link.life)
            case "unknown":
                requests.requeue(entry)  # the dispatch was lost with a connection
            case _:
                link.block(REFUSED_SECONDS)
                requests.requeue(entry)

    def _on_overloaded(self, entry: Entry, link: EngineLink) -> None:
        view = self._roads.membership
        if entry.delivered or (view is not None and self._roads.candidates(view, link.life)):
            self._requests.requeue(entry)
        else:
            self._requests.fail(entry, Overloaded("every engine that could take this request is full"))

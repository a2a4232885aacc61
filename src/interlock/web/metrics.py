"""What a front counts. Names end in their unit, counters in `_total`; label values are few and known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from interlock.core.roster import Sight
from interlock.core.targets import STRICTNESS, TARGETS, State
from interlock.telemetry.metrics import Metrics
from interlock.wire.fleet_messages import Membership

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
OUTCOMES = ("ok", "invalid", "refused", "overloaded", "unavailable", "failed", "disconnected")


class Seen(Protocol):
    """What the gauges are read from when they are scraped."""

    @property
    def membership(self) -> Membership | None: ...

    @property
    def coordinator_connected(self) -> bool: ...

    @property
    def counters(self) -> Mapping[str, int]:
        """What the dispatcher counts: "dispatches", "refused_<code>", "ended_<cause>", …"""
        ...

    def in_flight(self) -> dict[str, int]: ...


PLAIN_COUNTS = {
    "requests": ("interlock_accepted_requests", "Requests taken by this front's dispatcher."),
    "dispatches": ("interlock_dispatches", "Requests handed to an engine, each attempt counted."),
    "continuations": ("interlock_continued_requests", "Requests gone on elsewhere from their tokens."),
    "restarts": ("interlock_restarted_requests", "Requests begun again: nothing had been delivered."),
    "aborted": ("interlock_aborted_requests", "Requests ended by their client."),
    "engines_gone": ("interlock_lost_engines", "Lives of engines seen to end."),
}
"""Counters of the dispatcher as metrics."""
FAMILIES = {
    "refused": ("interlock_engine_refusals", "Dispatches that an engine refused.", "code"),
    "ended": ("interlock_ended_requests", "Requests that ended, by cause.", "cause"),
    "failed": ("interlock_failed_requests", "Requests that ended with an error, by its code.", "code"),
    "deltas": ("interlock_received_deltas", "Words of engines on their requests, by verdict.", "verdict"),
}
"""By the first word of a counter's name; the rest of it is the label's value."""
REFUSALS = ("overloaded", "no_member")
"""Why this front itself takes no request."""


class FrontMetrics:
    """One front's, as Prometheus reads them."""

    def __init__(self, fleet: Seen) -> None:
        self._metrics = Metrics()
        counter, histogram = self._metrics.counter, self._metrics.histogram
        requests = counter(
            "interlock_http_requests_total",
            "Generation requests answered, by outcome.",
            ["endpoint", "outcome"],
        )
        self._requests = {
            (endpoint, outcome): requests.labels(endpoint, outcome)
            for endpoint in ("completions", "chat", "streams")
            for outcome in OUTCOMES
        }
        self.first_token = histogram(
            "interlock_time_to_first_token_seconds", "From the request's arrival to its first token.", SECONDS
        )
        self.duration = histogram(
            "interlock_request_duration_seconds",
            "From a request's arrival to the end of its answer.",
            SECONDS,
        )
        self.prompt_tokens = counter("interlock_prompt_tokens_total", "Prompt tokens of answered requests.")
        self.cached_tokens = counter(
            "interlock_cached_tokens_total", "Prompt tokens whose KV was not computed again."
        )
        self.generated_tokens = counter("interlock_generated_tokens_total", "Tokens delivered.")
        self._metrics.registry.register(FleetGauges(fleet))

    def count_request(self, endpoint: str, outcome: str) -> None:
        """One that was answered, however."""
        self._requests[endpoint, outcome].inc()

    def render(self) -> bytes:
        """All of them, as text."""
        return self._metrics.render()


class FleetGauges:
    """Read from the fleet when Prometheus asks, so that they are never behind it."""

    def __init__(self, fleet: Seen) -> None:
        self._fleet = fleet

    def collect(self) -> list[Any]:
        return [*self._membership(), *self._requests(), *self._counts()]

    def _membership(self) -> list[Any]:
        """As this front heard it last: where it differs from the coordinator's own, the front is behind."""
        view = self._fleet.membership
        members = GaugeMetricFamily("interlock_members", "Members by state.", labels=["state"])
        target = GaugeMetricFamily("interlock_target_info", "1 for the fleet's target.", labels=["state"])
        holds = GaugeMetricFamily("interlock_holds", "Holds in force, by pause mode.", labels=["mode"])
        version = GaugeMetricFamily(
            "interlock_weights_info", "1 for the weights that answer.", labels=["version"]
        )
        term = GaugeMetricFamily("interlock_epoch_term_number", "Term of the epoch in force.")
        number = GaugeMetricFamily("interlock_epoch_number", "Number of the epoch in force, within its term.")
        counts = dict.fromkeys((str(word) for word in (*State, Sight.SUSPECT, Sight.LOST)), 0)
        for member in view.members if view else []:
            counts[member.state] = counts.get(member.state, 0) + 1
        for state, count in sorted(counts.items()):
            members.add_metric([state], count)
        for mode in STRICTNESS:
            holds.add_metric([mode], sum(hold.mode == mode for hold in view.holds) if view else 0)
        for state in TARGETS:
            target.add_metric([state], float(view is not None and view.target == state))
        unknown = GaugeMetricFamily(
            "interlock_weights_unknown_info",
            "1 while not every engine has the fleet's weights: an update is under way, or has failed.",
            value=float(view is not None and not view.weights_known),
        )
        if view is not None:
            version.add_metric([view.version], 1)
            term.add_metric([], view.epoch.term)
            number.add_metric([], view.epoch.number)
        reached = GaugeMetricFamily(
            "interlock_coordinator_connected_info",
            "1 while the coordinator is heard.",
            value=float(self._fleet.coordinator_connected),
        )
        return [members, target, holds, version, unknown, term, number, reached]

    def _requests(self) -> list[Any]:
        requests = GaugeMetricFamily(
            "interlock_in_flight_requests",
            "Requests in flight by engine; waiting ones are engine=''.",
            labels=["engine"],
        )
        for engine, running in self._fleet.in_flight().items():
            requests.add_metric([engine], running)
        return [requests]

    def _counts(self) -> list[Any]:
        counted = self._fleet.counters
        plain = [
            CounterMetricFamily(name, words, value=counted.get(key, 0))
            for key, (name, words) in PLAIN_COUNTS.items()
        ]
        refused = CounterMetricFamily(
            "interlock_refused_requests", "Requests that this front did not take.", labels=["why"]
        )
        for why in REFUSALS:
            refused.add_metric([why], counted.get(why, 0))
        families = []
        for prefix, (name, words, label) in FAMILIES.items():
            family = CounterMetricFamily(name, words, labels=[label])
            for key, count in sorted(counted.items()):
                if key.startswith(prefix + "_"):
                    family.add_metric([key.removeprefix(prefix + "_")], count)
            families.append(family)
        return [*plain, refused, *families]

"""What a front counts. Names end in their unit, counters in `_total`; label values are few and known."""

from __future__ import annotations

from typing import Any, Protocol

from prometheus_client.core import GaugeMetricFamily

from interlock.telemetry.metrics import Metrics
from interlock.wire.fleet_messages import Membership

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
OUTCOMES = ("ok", "invalid", "refused", "overloaded", "unavailable", "failed", "disconnected")


class Seen(Protocol):
    """What the gauges are read from when they are scraped."""

    @property
    def membership(self) -> Membership | None: ...

    def in_flight(self) -> dict[str, int]: ...


class FrontMetrics:
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
            for endpoint in ("completions", "chat")
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
        self._requests[endpoint, outcome].inc()

    def render(self) -> bytes:
        return self._metrics.render()


class FleetGauges:
    """Read from the fleet when Prometheus asks, so that they are never behind it."""

    def __init__(self, fleet: Seen) -> None:
        self._fleet = fleet

    def collect(self) -> list[Any]:
        view = self._fleet.membership
        members = GaugeMetricFamily("interlock_members", "Members by state.", labels=["state"])
        counts: dict[str, int] = {}
        for member in view.members if view else []:
            counts[member.state] = counts.get(member.state, 0) + 1
        for state, count in sorted(counts.items()):
            members.add_metric([state], count)
        term = GaugeMetricFamily("interlock_epoch_term_number", "Term of the epoch in force.")
        number = GaugeMetricFamily("interlock_epoch_number", "Number of the epoch in force, within its term.")
        if view is not None:
            term.add_metric([], view.epoch.term)
            number.add_metric([], view.epoch.number)
        requests = GaugeMetricFamily(
            "interlock_in_flight_requests",
            "Requests in flight by engine; waiting ones are engine=''.",
            labels=["engine"],
        )
        for engine, running in self._fleet.in_flight().items():
            requests.add_metric([engine], running)
        return [members, term, number, requests]

"""Metrics by our naming rules, checked when a metric is made: `interlock_` first, base unit last, counters in `_total`.

The rules are NIXL's and Prometheus's: a name says its unit, and a label takes few values. Whoever exceeds the bound of
series has put something unbounded into a label; further values are counted under "other" instead of in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import prometheus_client

from interlock.core.errors import LocalProtocolError
from interlock.core.limits import METRIC_SERIES_MAX

UNITS = (
    "bytes",
    "seconds",
    "ratio",
    "blocks",
    "slots",
    "requests",
    "tokens",
    "members",
    "holds",
    "commands",
    "transitions",
    "lives",
    "refusals",
    "engines",
    "dispatches",
    "deltas",
    "sessions",
    "connections",
    "events",
    "steps",
    "info",
    "number",
)
OTHER = "other"
_NAME = re.compile(r"interlock(_[a-z0-9]+)+")


class Labelled:
    """A metric with labels, of which only so many combinations are kept."""

    def __init__(self, metric: Any, count: int) -> None:
        self._metric, self._count = metric, count
        self._seen: set[tuple[str, ...]] = set()

    def labels(self, *values: str) -> Any:
        """The series of these values. Beyond METRIC_SERIES_MAX of them all further ones share the series `other`."""
        if values not in self._seen:
            if len(self._seen) >= METRIC_SERIES_MAX:
                return self._metric.labels(*([OTHER] * self._count))
            self._seen.add(values)
        return self._metric.labels(*values)


class _WithoutBirthdays:
    """A registry without the `_created` series, a second line for each counter that nobody asks for. The library's own switch is
    for the whole process, which an engine shares with vLLM's metrics."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Any]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """One registry a process or test. Raises `LocalProtocolError` for a name against the rules or used twice."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()

    def counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Any:
        """`name` ends in `_total`. With `labels` it is used by `.labels(...).inc()`."""
        if not name.endswith("_total"):
            raise LocalProtocolError(f"the counter {name} must end in _total")
        return self._make(prometheus_client.Counter, name, name.removesuffix("_total"), help_text, labels)

    def gauge(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Any:
        """`name` ends in its base unit, as `_bytes` or `_seconds`, where it has one."""
        return self._make(prometheus_client.Gauge, name, name, help_text, labels)

    def histogram(
        self, name: str, help_text: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Any:
        """`buckets` are upper bounds in the unit that `name` ends in, rising."""
        return self._make(prometheus_client.Histogram, name, name, help_text, labels, buckets=tuple(buckets))

    def render(self) -> bytes:
        """The exposition that Prometheus scrapes."""
        return bytes(prometheus_client.generate_latest(_WithoutBirthdays(self.registry)))

    def _make(
        self, kind: Any, name: str, stem: str, help_text: str, labels: Sequence[str], **more: Any
    ) -> Any:
        if not _NAME.fullmatch(name) or stem.rpartition("_")[2] not in UNITS:
            raise LocalProtocolError(
                f"the metric {name} must be interlock_<what>_<unit>", hint=f"units are {', '.join(UNITS)}"
            )
        try:
            metric = kind(name, help_text, list(labels), registry=self.registry, **more)
        except ValueError as error:
            raise LocalProtocolError(f"the metric {name} cannot be made: {error}") from error
        return Labelled(metric, len(labels)) if labels else metric

"""Events are bounded and complete in their file, metrics keep their names, log lines stay lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from interlock.core.errors import LocalProtocolError
from interlock.core.limits import METRIC_SERIES_MAX
from interlock.host.files import AppendFile
from interlock.host.real import RealClock
from interlock.telemetry.events import EventLog
from interlock.telemetry.logs import configure_logging
from interlock.telemetry.metrics import Metrics


def test_the_last_events_are_kept_and_a_reader_sees_what_it_missed() -> None:
    log = EventLog(RealClock(), kept_max=3)
    for i in range(10):
        log.emit("step", at=i)
    assert [event.number for event in log.since(0)] == [8, 9, 10]
    assert [event.fields for event in log.since(9)] == [{"at": 9}]
    assert log.since(10) == []


def test_the_file_has_every_event_as_a_line(tmp_path: Path) -> None:
    log = EventLog(RealClock(), AppendFile(tmp_path / "events"), kept_max=1)
    log.emit("died", engine="engine-0", path=tmp_path)
    log.emit("born", text="two\nlines")
    lines = [msgspec.json.decode(line) for line in (tmp_path / "events").read_bytes().splitlines()]
    assert [line["name"] for line in lines] == ["died", "born"]
    assert lines[0]["fields"] == {"engine": "engine-0", "path": str(tmp_path)}
    assert lines[0]["at_s"] <= lines[1]["at_s"]


def test_a_file_that_cannot_be_written_is_given_up_and_the_event_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = AppendFile(tmp_path / "events")
    sink.close()
    log = EventLog(RealClock(), sink)
    log.emit("one")
    log.emit("two")
    assert [event.name for event in log.since(0)] == ["one", "two"]
    assert len(caplog.records) == 1


def test_metrics_are_rendered_by_their_names() -> None:
    metrics = Metrics()
    metrics.counter("interlock_store_blocks_total", "Blocks").inc(3)
    metrics.gauge("interlock_slab_used_ratio", "Share").set(0.5)
    metrics.histogram("interlock_store_match_seconds", "Look-ups", [0.001, 0.005], ["outcome"]).labels(
        "hit"
    ).observe(0.002)
    text = metrics.render().decode()
    assert "interlock_store_blocks_total 3.0" in text
    assert "interlock_slab_used_ratio 0.5" in text
    assert 'interlock_store_match_seconds_bucket{le="0.005",outcome="hit"} 1.0' in text


@pytest.mark.parametrize(
    "name", ["store_bytes", "interlock_Store_bytes", "interlock_bytes_used", "interlock_wait_ms"]
)
def test_a_name_against_the_rules_is_refused(name: str) -> None:
    with pytest.raises(LocalProtocolError, match=name):
        Metrics().gauge(name, "x")
    with pytest.raises(LocalProtocolError, match="_total"):
        Metrics().counter("interlock_store_blocks", "x")


def test_a_name_used_twice_is_refused() -> None:
    metrics = Metrics()
    metrics.gauge("interlock_slab_bytes", "x")
    with pytest.raises(LocalProtocolError, match="interlock_slab_bytes"):
        metrics.gauge("interlock_slab_bytes", "x")


def test_a_label_without_bound_does_not_grow_without_bound() -> None:
    metrics = Metrics()
    counter = metrics.counter("interlock_http_requests_total", "x", ["path"])
    for i in range(METRIC_SERIES_MAX + 10):
        counter.labels(f"/{i}").inc()
    text = metrics.render().decode()
    assert 'path="other"} 10.0' in text
    assert f'path="/{METRIC_SERIES_MAX}"' not in text


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:], root.level = handlers, level
    root.setLevel(level)


def test_one_record_is_one_line(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("engine-0", "info")
    logging.getLogger("x").info("a\nforged ERROR line")
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("x").exception("failed")
    logging.getLogger("x").debug("not this")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "INFO engine-0 x: a\\nforged" in lines[0]
    assert "boom" in lines[1]
    with pytest.raises(ValueError):
        configure_logging("engine-0", "loud")

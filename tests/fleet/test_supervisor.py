"""The supervisor over real processes: what it starts, what it starts again, and that nothing of it is ever left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from interlock.host.processes import list_processes
from interlock.host.sockets import free_port

SUPERVISE = Path(__file__).parent / "supervise.py"
SECONDS = 20.0
PARTS = ["coordinator", "store", "engine-0", "engine-1", "front"]


def until(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    """Polls what other processes do, with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def alive(pid: int) -> bool:
    return any(entry.pid == pid and entry.state != "Z" for entry in list_processes())


class Fleet:
    """One supervisor process and its run directory."""

    def __init__(self, base: Path, port: int, **behaviour: dict[str, object]) -> None:
        self.base, self.port = base, port
        self.run_dir = base / str(port)
        self.output = base.parent / f"out-{time.monotonic_ns()}"
        with self.output.open("w") as file:
            argv = [sys.executable, str(SUPERVISE), str(port), str(base), json.dumps(behaviour)]
            self.process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT)

    def said(self) -> str:
        return self.output.read_text()

    def until_ready(self) -> None:
        until(lambda: "ready in" in self.said() or self.process.poll() is not None, "the fleet is ready")
        assert "ready in" in self.said(), self.said()

    def pid(self, name: str) -> int:
        return int((self.run_dir / f"{name}.pid").read_text())

    def starts(self, name: str) -> int:
        return len((self.run_dir / f"{name}.starts").read_text().splitlines())

    def mark(self) -> str:
        return (self.run_dir / "mark").read_text()

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"XDG_RUNTIME_DIR": str(self.base.parent)}
        argv = [sys.executable, "-m", "interlock", "ctl", *arguments, "--port", str(self.port)]
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=30)


def marked(mark: str) -> list[int]:
    found = []
    for entry in list_processes():
        try:
            environment = Path(f"/proc/{entry.pid}/environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in environment and entry.state != "Z":
            found.append(entry.pid)
    return found


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    fleets: list[Fleet] = []
    base = tmp_path / "interlock"

    def make(port: int | None = None, **behaviour: dict[str, object]) -> Fleet:
        fleets.append(Fleet(base, port or free_port(), **behaviour))
        return fleets[-1]

    yield make
    marks = {fleet.mark() for fleet in fleets if (fleet.run_dir / "mark").exists()}
    for fleet in fleets:
        fleet.process.kill()
        fleet.process.wait()
    until(lambda: not any(map(marked, marks)), "the test's processes are gone")


def test_a_fleet_comes_up_and_leaves_nothing_when_told_to_end(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet()
    fleet.until_ready()
    mark = fleet.mark()
    assert len(marked(mark)) == len(PARTS)
    fleet.process.terminate()
    assert fleet.process.wait(SECONDS) == 0
    assert not marked(mark)
    assert not fleet.base.exists()
    assert "all processes are gone" in fleet.said()


def test_a_killed_supervisor_leaves_no_process_and_no_file(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(**{"engine-0": {"grandchild": True}})
    fleet.until_ready()
    mark = fleet.mark()
    assert len(marked(mark)) == len(PARTS) + 1
    fleet.process.kill()
    fleet.process.wait()
    until(lambda: not marked(mark), "every process has left", 8.0)
    until(lambda: not fleet.base.exists(), "the last one has removed the run directory", 2.0)


def test_a_second_fleet_on_a_port_is_refused_by_name(make_fleet: Callable[..., Fleet]) -> None:
    first = make_fleet()
    first.until_ready()
    second = make_fleet(first.port)
    assert second.process.wait(SECONDS) == 1
    assert f"already runs on port {first.port}" in second.said()
    assert first.process.poll() is None
    assert len(marked(first.mark())) == len(PARTS)


def test_a_dead_engine_is_ended_with_its_whole_tree_and_started_again(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet(**{"engine-0": {"grandchild": True}})
    fleet.until_ready()
    grandchild = int((fleet.run_dir / "engine-0.grandchild").read_text())
    os.kill(fleet.pid("engine-0"), signal.SIGKILL)
    until(lambda: fleet.starts("engine-0") == 2, "it is started again")
    assert not alive(grandchild), "a process that left the engine's session outlived it"
    status = lambda: json.loads(fleet.ctl("status", "--json").stdout or "{}")  # noqa: E731
    until(lambda: [m["state"] for m in status().get("members", [])] == ["RUNNING"] * 2, "both run")
    assert "engine-0 died (signal 9)" in fleet.said()


@pytest.mark.parametrize("name", ["coordinator", "store", "front"])
def test_any_other_part_is_started_again_too(make_fleet: Callable[..., Fleet], name: str) -> None:
    fleet = make_fleet()
    fleet.until_ready()
    kind = name.encode()
    before = [
        pid for pid in marked(fleet.mark()) if kind in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]
    os.kill(before[0], signal.SIGKILL)
    until(lambda: f"{name} died (signal 9); it is started again" in fleet.said(), "it was noticed")
    until(lambda: len(marked(fleet.mark())) == len(PARTS), "it is there again")


def test_an_engine_that_dies_at_every_start_is_not_started_more_than_a_few_times_a_minute(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet()
    fleet.until_ready()
    for count in (1, 2, 3):
        until(lambda count=count: fleet.starts("engine-1") == count, f"start {count}")
        until(lambda: alive(fleet.pid("engine-1")), "it runs")
        os.kill(fleet.pid("engine-1"), signal.SIGKILL)
        until(lambda count=count: fleet.said().count("engine-1 died") == count, "it was noticed")
    last = [line for line in fleet.said().splitlines() if "engine-1 died" in line][-1]
    assert "started again in " in last
    assert fleet.starts("engine-1") == 3


def test_a_part_that_cannot_start_ends_the_start_in_its_own_words(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(**{"engine-1": {"fail": "the model needs a bigger machine; buy one"}})
    assert fleet.process.wait(SECONDS) == 1
    assert "engine-1 could not start: the model needs a bigger machine; buy one" in fleet.said()
    assert not fleet.base.exists()


def test_who_is_interrupted_while_engines_start_does_not_wait_for_them(
    make_fleet: Callable[..., Fleet],
) -> None:
    """A Ctrl-C before the handlers of `serve` are there cancels the supervisor's task: here none is there for SIGINT at all."""
    fleet = make_fleet(**{"engine-1": {"hang": True}})
    until(lambda: "store" in fleet.said() and " up after" in fleet.said(), "some part is up")
    fleet.process.send_signal(signal.SIGINT)
    fleet.process.wait(SECONDS)
    assert "all processes are gone" in fleet.said()
    assert not fleet.base.exists()


@pytest.mark.parametrize("name", ["store", "engine-0"])
def test_a_part_that_dies_while_others_are_still_starting_ends_the_start(
    make_fleet: Callable[..., Fleet], name: str
) -> None:
    """It was up already: nobody asks after it any more, and the fleet would be announced without it."""
    fleet = make_fleet(**{"engine-1": {"hang": True}})
    until(lambda: f"{name} " in fleet.said() and " up after" in fleet.said().split(f"  {name} ")[-1], "up")
    os.kill(fleet.pid(name), signal.SIGKILL)
    assert fleet.process.wait(SECONDS) == 1
    assert f"{name} died while the fleet was starting" in fleet.said()
    assert not fleet.base.exists()


def test_ctl_stop_with_end_ends_the_engines_and_then_the_fleet_with_status_zero(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet()
    fleet.until_ready()
    mark = fleet.mark()
    done = fleet.ctl("stop", "--end", "--owner", "test")
    assert done.returncode == 0, done.stderr
    assert fleet.process.wait(SECONDS) == 0
    assert "the fleet is stopped" in fleet.said()
    assert not marked(mark)
    assert not fleet.base.exists()


def test_an_engine_that_dies_on_its_way_to_stopped_is_not_started_to_be_stopped(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet(**{"engine-1": {"die_when_stopped": True}})
    fleet.until_ready()
    assert fleet.ctl("stop", "--owner", "test").returncode == 0
    until(lambda: "the fleet is stopped; `interlock ctl start`" in fleet.said(), "it rests")
    assert "started again" not in fleet.said()
    assert fleet.ctl("start", "--owner", "test").returncode == 0
    assert fleet.starts("engine-1") == 2


def test_a_fleet_stopped_to_zero_is_started_again_by_ctl(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet()
    fleet.until_ready()
    states = lambda: [  # noqa: E731
        m["state"] for m in json.loads(fleet.ctl("status", "--json").stdout or "{}").get("members", [])
    ]
    for again in (1, 2):
        stopped = fleet.ctl("stop", "--owner", "test")
        assert stopped.returncode == 0, stopped.stderr
        until(lambda: len(marked(fleet.mark())) == len(PARTS) - 2, "both engines are gone, the others stay")
        assert fleet.process.poll() is None
        refused = fleet.ctl("unpause", "--owner", "test")
        assert "START launches it" in refused.stderr
        started = fleet.ctl("start", "--owner", "test")
        assert started.returncode == 0, started.stderr
        assert states() == ["RUNNING"] * 2, "START is done when every engine runs, not before"
        assert [fleet.starts(name) for name in ("engine-0", "engine-1")] == [again + 1] * 2
    refused = fleet.ctl("start", "--owner", "test")
    assert (refused.returncode != 0, "it runs" in refused.stderr) == (True, True)
    assert fleet.ctl("stop", "--owner", "test").returncode == 0
    ended = fleet.ctl("stop", "--end", "--owner", "test")
    assert (ended.returncode, "the fleet has ended" in ended.stdout) == (0, True)
    assert fleet.process.wait(SECONDS) == 0


def test_a_start_that_overtakes_a_stop_leaves_no_engine_behind(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet()
    fleet.until_ready()
    fleet.ctl("stop", "--owner", "test", "--no-wait")
    until(lambda: fleet.ctl("start", "--owner", "test", "--no-wait").returncode == 0, "START is accepted")
    status = lambda: json.loads(fleet.ctl("status", "--json").stdout or "{}")  # noqa: E731
    until(
        lambda: [(m["state"], m["standing"]) for m in status().get("members", [])] == [("RUNNING", True)] * 2,
        "both run",
    )


def test_an_engine_that_hangs_at_its_start_keeps_no_other_from_being_started_again(
    make_fleet: Callable[..., Fleet],
) -> None:
    """Between two STARTs nobody waits for the engine that the first of them did not bring up."""
    fleet = make_fleet(**{"engine-1": {"hang_from_start": 2}})
    fleet.until_ready()
    assert fleet.ctl("stop", "--owner", "test").returncode == 0
    assert fleet.ctl("start", "--owner", "test", "--no-wait").returncode == 0
    until(lambda: (fleet.starts("engine-0"), fleet.starts("engine-1")) == (2, 2), "both are begun")
    for verb in ("pause", "stop", "start"):
        if verb == "start":
            until(lambda: fleet.said().count("engine-0 is stopped") == 2, "the one that is up stops again")
        done = fleet.ctl(verb, "--owner", "test", "--no-wait")
        assert done.returncode == 0, done.stderr
    until(lambda: fleet.starts("engine-0") == 3, "it is started again")


def test_leftovers_of_a_fleet_that_was_killed_whole_are_swept_by_the_next(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet(**{"engine-0": {"grandchild": True}})
    fleet.until_ready()
    mark = fleet.mark()
    grandchild = int((fleet.run_dir / "engine-0.grandchild").read_text())
    fleet.process.send_signal(signal.SIGSTOP)  # so that it starts nothing again
    for pid in marked(mark):
        if pid != grandchild:
            os.kill(pid, signal.SIGKILL)
    fleet.process.kill()
    fleet.process.wait()
    assert alive(grandchild)
    assert fleet.run_dir.exists()
    following = make_fleet(fleet.port)
    following.until_ready()
    assert not alive(grandchild)
    assert following.mark() != mark


def test_ctl_tells_an_illegal_command_and_an_absent_fleet_apart(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet()
    fleet.until_ready()
    refused = fleet.ctl("unpause", "--owner", "test")
    assert (refused.returncode, "UNPAUSE is refused" in refused.stderr) == (3, True)
    paused = fleet.ctl("pause", "--owner", "test", "--json")
    assert json.loads(paused.stdout)["ok"]
    assert "PAUSED" in fleet.ctl("status").stdout
    assert fleet.ctl("unpause", "--owner", "test").returncode == 0
    fleet.port = free_port()
    absent = fleet.ctl("status")
    assert (absent.returncode, "no fleet of yours answers" in absent.stderr) == (1, True)

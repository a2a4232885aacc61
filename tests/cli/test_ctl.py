"""`interlock ctl` against a real coordinator: what it prints, on which stream, and with which exit status."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from interlock.cli.ctl_show import Teller
from interlock.cli.ctl_words import timeout_of
from interlock.cli.main import main, make_parser
from interlock.fleet.launchers.rundir import coordinator_address


def fleet_rig() -> ModuleType:
    """The fleet in one process of tests/fleet."""
    folder = Path(__file__).parent.parent / "fleet"
    sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location("fleet_conftest_for_ctl", folder / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PORT = 4711
ABLE = ("updates", "suspends")


class Ctl:
    """A fleet, and the command line that finds it by its port."""

    def __init__(self, fleet: Any, capsys: pytest.CaptureFixture[str]) -> None:
        self.fleet, self._capsys = fleet, capsys

    async def __call__(self, *words: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        status = await asyncio.to_thread(main, ["ctl", *words, "--port", str(PORT)])
        said = self._capsys.readouterr()
        return status, said.out, said.err


@pytest.fixture
async def ctl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> AsyncIterator[Ctl]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    run = Path(coordinator_address(PORT).removeprefix("unix:")).parent
    run.mkdir(parents=True)
    fleet = fleet_rig().Fleet(run)
    assert fleet.address == coordinator_address(PORT)
    try:
        yield Ctl(fleet, capsys)
    finally:
        await fleet.close()


async def begin(ctl: Ctl, *names: str) -> list[Any]:
    await ctl.fleet.start_coordinator()
    engines = [await ctl.fleet.engine(name, abilities=ABLE) for name in names]
    await ctl.fleet.start_dispatcher()
    await ctl.fleet.ready(*names)
    return engines


async def test_every_verb_end_to_end(ctl: Ctl, tmp_path: Path) -> None:
    (engine,) = await begin(ctl, "engine-0")
    weights = tmp_path / "v1"
    weights.mkdir()
    status, out, err = await ctl("pause", "--owner", "me")
    assert (status, engine.member.state) == (0, "PAUSED")
    assert out.startswith("pause: done in ")
    assert out.endswith("s: 1 standing\n")
    assert "engine-0       standing  PAUSED" in err
    assert (await ctl("update", "v1", str(weights), "--owner", "me"))[0] == 0
    assert engine.member.version == "v1"
    assert (await ctl("suspend", "--owner", "me"))[0] == 0
    assert engine.member.state == "SUSPENDED"
    assert (await ctl("resume", "--owner", "me"))[0] == 0
    assert (await ctl("unpause", "--owner", "me"))[0] == 0
    assert engine.member.state == "RUNNING"
    status, out, _ = await ctl("status")
    assert status == 0
    assert "target RUNNING" in out
    assert "weights version v1" in out
    assert out.splitlines()[-1].split()[:4] == ["engine-0", "RUNNING", "yes", "v1"]


async def test_json_is_one_object_and_nothing_else(ctl: Ctl) -> None:
    await begin(ctl, "engine-0")
    status, out, err = await ctl("pause", "--owner", "me", "--json")
    answer = msgspec.json.decode(out)
    assert (status, err) == (0, "")
    assert (answer["ok"], answer["command"], answer["owner"]) == (True, "PAUSE", "me")
    assert answer["members"][0]["outcome"] == "standing"
    _, out, _ = await ctl("command", answer["id"], "--json")
    assert msgspec.json.decode(out)["progress"]["ok"]
    _, out, _ = await ctl("status", "--json")
    assert msgspec.json.decode(out)["holds"] == [{"owner": "me", "mode": "keep", "deadline_s": None}]
    status, out, err = await ctl("resume", "--json")
    assert status == 3
    assert msgspec.json.decode(out)["code"] == "refused"
    assert "the command is UNPAUSE" in err


async def test_exit_statuses_tell_failed_refused_and_late_apart(ctl: Ctl, tmp_path: Path) -> None:
    status, _, err = await ctl("status")
    assert (status, "no fleet of yours answers" in err) == (1, True)
    _, slow = await begin(ctl, "a", "slow")
    assert (await ctl("unpause"))[0] == 3
    slow.hold_steps.clear()
    status, _, err = await ctl("pause", "--owner", "me", "--timeout", "0.3")
    assert status == 4
    assert "slow did not get there by the deadline" in err
    assert f"the fleet goes on; `interlock ctl status --wait PAUSED --port {PORT}` waits for it" in err
    slow.hold_steps.set()
    assert (await ctl("pause", "--owner", "me"))[0] == 0
    slow.fail_update = "shard 2 of 3 is torn"
    status, _, err = await ctl("update", "v1", str(tmp_path), "--owner", "me")
    assert status == 1
    assert "which not every engine has" in (await ctl("status"))[1]
    assert "slow failed on the way" in err
    assert (await ctl("update", "v1", "/no/such/folder"))[0] == 1
    assert (await ctl("command", "nobody-knows"))[0] == 3


async def test_status_waits_for_the_whole_fleet_and_says_for_whom(ctl: Ctl) -> None:
    status, _, err = await ctl("status", "--wait", "RUNNING", "--timeout", "0.2")
    assert (status, "no coordinator answers" in err) == (4, True)
    assert (await ctl("status", "--wait", "STOPPED"))[0] == 0
    waiting = asyncio.create_task(ctl("status", "--wait", "RUNNING"))  # a fleet that is on its way
    _, slow = await begin(ctl, "a", "slow")
    assert (await waiting)[0] == 0
    slow.hold_steps.clear()
    assert (await ctl("pause", "--owner", "me", "--no-wait"))[0] == 0
    waiting = asyncio.create_task(ctl("status", "--wait", "PAUSED"))
    await slow.until(lambda: slow.member.state == "PAUSING")
    slow.hold_steps.set()
    status, out, err = await waiting
    assert status == 0
    assert "target PAUSED" in out
    assert "slow (PAUSING)" in err or err == ""
    status, _, err = await ctl("status", "--wait", "RUNNING", "--timeout", "0.2")
    assert status == 4
    assert "the fleet is not RUNNING after 0.2 s: the fleet's target is PAUSED" in err


async def test_a_fleet_is_not_whole_while_an_expected_engine_has_not_come(ctl: Ctl) -> None:
    await ctl.fleet.start_coordinator(expected=["a", "b"], recovering_s=0.01)
    await ctl.fleet.engine("a", abilities=ABLE)
    await ctl.fleet.start_dispatcher()
    await ctl.fleet.ready("a")
    status, _, err = await ctl("status", "--wait", "RUNNING", "--timeout", "0.3")
    assert (status, "waiting for b (not heard yet)" in err) == (4, True)
    assert "b is awaited" in (await ctl("status"))[1]
    await ctl.fleet.engine("b", abilities=ABLE)
    assert (await ctl("status", "--wait", "RUNNING"))[0] == 0
    assert "awaited" not in (await ctl("status"))[1]


async def test_a_command_that_is_not_waited_for_is_asked_about_later(ctl: Ctl) -> None:
    (engine,) = await begin(ctl, "a")
    engine.hold_steps.clear()
    _, out, _ = await ctl("pause", "--owner", "me", "--no-wait")
    command_id = out.split("command ")[1].split("`")[0]
    status, out, _ = await ctl("command", command_id)
    assert status == 0
    assert "PAUSE by me" in out
    assert "under way" in out
    assert "waiting for a to be PAUSED" in out
    engine.hold_steps.set()
    await ctl.fleet.until(lambda: engine.member.state == "PAUSED")
    await ctl("status", "--wait", "PAUSED")
    assert "done" in (await ctl("command", command_id))[1]


async def test_holds_show_who_and_how_long_and_the_rest_says_who_still_holds(ctl: Ctl) -> None:
    await begin(ctl, "a")
    await ctl("pause", "--owner", "trainer")
    await ctl("pause", "--owner", "operator", "--hold-seconds", "60")
    out = (await ctl("status"))[1]
    assert "held by trainer (mode keep)" in out
    assert "held by operator (mode keep, ends in " in out
    _, out, _ = await ctl("unpause", "--owner", "operator")
    assert "the fleet stays paused, held by trainer" in out
    assert (await ctl("unpause", "--break-hold-of", "trainer"))[0] == 0


async def test_stop_says_whether_the_fleet_has_ended(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interlock.cli.ctl.END_SECONDS", 0.2)
    (engine,) = await begin(ctl, "a")
    status, out, err = await ctl("drain", "--owner", "me")
    assert status == 0
    assert "its engines have ended" in out
    assert (engine.taken[-2].step, engine.taken[-2].mode) == ("PAUSE", "wait")
    assert "STOPPED" in err


async def test_events_are_lines_with_numbers_and_since_leaves_out_older_ones(ctl: Ctl) -> None:
    await begin(ctl, "a")
    await ctl("pause", "--owner", "me")
    status, out, _ = await ctl("events")
    lines = out.splitlines()
    assert status == 0
    assert [line.split()[1] for line in lines] == [str(n) for n in range(1, len(lines) + 1)]
    assert any(" hold " in line and "owner=me" in line for line in lines)
    later = (await ctl("events", "--since", str(len(lines) - 2)))[1].splitlines()
    assert later == lines[-2:]
    assert (await ctl("events", "--since", "1h"))[1].splitlines() == lines
    objects = [msgspec.json.decode(line) for line in (await ctl("events", "--json"))[1].splitlines()]
    assert [found["number"] for found in objects] == list(range(1, len(lines) + 1))


async def test_metrics_and_forget(ctl: Ctl) -> None:
    await begin(ctl, "a", "b")
    assert 'interlock_coordinator_members{state="RUNNING"} 2.0' in (await ctl("metrics"))[1]
    status, _, err = await ctl("forget", "c")
    assert (status, "c is no member; there are: a, b" in err) == (1, True)
    assert (await ctl("forget", "b"))[0] == 0
    assert 'state="LOST"} 1.0' in (await ctl("metrics"))[1]
    assert (await ctl("pause", "--owner", "me"))[1].endswith("1 standing, 1 gone\n")


async def test_who_is_only_awaited_can_be_forgotten_and_nobody_waits_for_it(ctl: Ctl) -> None:
    """Never heard by this coordinator, whose state is lost: it has no life that could be named."""
    await ctl.fleet.start_coordinator(expected=["a", "b"], recovering_s=0.1)
    await ctl.fleet.engine("a")
    await ctl.fleet.until(lambda: ctl.fleet.coordinator.fleet.phase == "LEADING")
    status, _, err = await ctl("forget", "c")
    assert (status, "c is no member; there are: a, b" in err) == (1, True)
    assert (await ctl("pause", "--owner", "me", "--timeout", "0.3"))[0] != 0
    status, out, _ = await ctl("forget", "b")
    assert (status, out) == (0, "b: counts as gone from now on; nobody waits for it\n")
    assert (await ctl("pause", "--owner", "me"))[1].endswith("1 standing\n")
    await ctl.fleet.engine("b")
    await ctl.fleet.until(lambda: len(ctl.fleet.coordinator._members.records()) == 2)


async def test_metrics_say_nothing_of_when_a_series_was_made(ctl: Ctl) -> None:
    await begin(ctl, "a")
    names = {
        line.split("{")[0].split()[0] for line in (await ctl("metrics"))[1].splitlines() if line[0] != "#"
    }
    assert "interlock_member_transitions_total" in names
    assert not [name for name in names if name.endswith("_created")]


async def test_a_member_that_is_gone_has_no_weights_to_differ_in(ctl: Ctl) -> None:
    await begin(ctl, "a", "b")
    await ctl("forget", "b")
    assert (await ctl("status"))[1].splitlines()[-1].split()[:4] == ["b", "LOST", "gone", "-"]


async def test_a_refusal_names_the_epoch_as_status_does(ctl: Ctl) -> None:
    await begin(ctl, "a")
    said = (await ctl("status"))[1].splitlines()[0]
    number = said.partition("(epoch ")[2].partition(")")[0]
    assert f"UNPAUSE is refused at epoch {number}: the fleet's target is RUNNING" in (await ctl("unpause"))[2]


async def test_options_of_the_fleet_may_stand_before_the_verb(
    ctl: Ctl, capsys: pytest.CaptureFixture[str]
) -> None:
    await begin(ctl, "a")
    status = await asyncio.to_thread(main, ["ctl", "--port", str(PORT), "--json", "status"])
    assert (status, msgspec.json.decode(capsys.readouterr().out)["target"]) == (0, "RUNNING")
    assert (await ctl("status", "--wait", "running"))[0] == 0


@pytest.mark.parametrize(
    ("verb", "seconds"),
    [("pause", 60.0), ("update", 600.0), ("resume", 600.0), ("start", 600.0), ("drain", 600.0)],
)
def test_what_starts_engines_anew_gets_the_time_that_takes(verb: str, seconds: float) -> None:
    more = ["v1", "/weights"] if verb == "update" else []
    parse = make_parser().parse_args
    assert timeout_of(parse(["ctl", verb, *more])) == seconds
    assert timeout_of(parse(["ctl", verb, *more, "--timeout", "5"])) == 5.0
    assert timeout_of(parse(["ctl", "--timeout", "7", verb, *more])) == 7.0


def test_a_wait_without_news_says_for_whom(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, who in (("start", "the engines to start"), ("pause", "the coordinator")):
        Teller(0.0, verb=verb, quiet=False).still(5.0)
        assert capsys.readouterr().err == f"    5.00 s  still waiting for {who}\n"


@pytest.mark.parametrize("how", ["interrupted", "nobody reads"])
async def test_events_that_are_followed_end_without_a_word_of_python(ctl: Ctl, how: str) -> None:
    await begin(ctl, "a")
    argv = [sys.executable, "-m", "interlock", "ctl", "events", "--follow", "--port", str(PORT)]
    following = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert following.stdout is not None
    assert following.stderr is not None
    async with asyncio.timeout(30):
        assert b"coordinator_without_state" in await following.stdout.readline()
        if how == "interrupted":
            following.send_signal(signal.SIGINT)
        else:
            following._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
            for number in range(50):  # until one finds that the pipe is closed
                await ctl("pause" if number % 2 == 0 else "unpause", "--owner", "me")
                if following.returncode is not None:
                    break
        status = await following.wait()
        errors = await following.stderr.read()
    assert (status, errors) == (130 if how == "interrupted" else 1, b"")

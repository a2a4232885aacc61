"""`interlock explore` says what it saw, and its exit status says whether all is well."""

import argparse
import json

import pytest

from interlock.checking import gallery
from interlock.checking.explorer import World
from interlock.checking.gallery import Exhibit
from interlock.checking.museum import tair_208
from interlock.cli import explore


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    explore.add_parser(parser.add_subparsers())
    args = parser.parse_args(["explore", *argv])
    status: int = args.run(args)
    return status


def use_worlds(monkeypatch: pytest.MonkeyPatch, *worlds: World[object]) -> None:
    monkeypatch.setattr(gallery, "worlds_of", lambda name, budget: worlds)


def test_a_sound_world_is_printed_with_its_counts_and_status_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_worlds(monkeypatch, tair_208.EXHIBIT.mended())
    assert run("joins") == 0
    assert "51 states, 171 edges, depth 6" in capsys.readouterr().out


def test_a_violation_is_printed_as_its_story_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_worlds(monkeypatch, tair_208.EXHIBIT.broken())
    assert run("joins") == 1
    out = capsys.readouterr().out
    assert "VIOLATED" in out
    assert "the report of rank 0 on attempt 1 arrives\n  => the node raised AssertionError" in out


def test_what_is_not_exhausted_is_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_worlds(monkeypatch, tair_208.EXHIBIT.mended())
    assert run("joins", "--seconds", "0") == 2
    assert "NOT exhausted" in capsys.readouterr().out


def test_json_has_a_line_a_world(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_worlds(monkeypatch, tair_208.EXHIBIT.mended(), tair_208.EXHIBIT.broken())
    assert run("joins", "--json") == 1
    sound, broken = map(json.loads, capsys.readouterr().out.splitlines())
    assert sound["exhausted"] is True
    assert sound["violation"] is None
    assert len(broken["violation"]["story"]) == 3


def test_an_unknown_protocol_is_a_sentence_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tea") == 2
    assert "There is no protocol 'tea'. Explore one of: " in capsys.readouterr().err


def test_the_museum_prints_rule_story_and_our_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gallery, "exhibits", lambda: [tair_208.EXHIBIT])
    assert run("--museum") == 0
    out = capsys.readouterr().out
    assert "alibaba/tair-kvcache #208" in out
    assert "found in 3 steps" in out
    assert run("--museum", "--json") == 0
    assert json.loads(capsys.readouterr().out)["as_stated"] is True
    assert run("sessions", "--museum") == 0
    assert capsys.readouterr().out == ""


def test_a_museum_whose_race_is_not_found_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tair_208.EXHIBIT
    sound = Exhibit(
        title=whole.title,
        protocol="joins",
        public=whole.public,
        rule=whole.rule,
        broken=whole.mended,
        mended=whole.mended,
        story_steps=3,
    )
    monkeypatch.setattr(gallery, "exhibits", lambda: [sound])
    assert run("--museum") == 1
    printed = capsys.readouterr()
    assert "NOT FOUND" in printed.out
    assert "not as the exhibit states" in printed.err


def test_worlds_walked_in_processes_of_their_own_give_the_same_results() -> None:
    alone = [(r.name, r.states, r.edges) for r in gallery.explore_all(["sessions"], "small")]
    together = [(r.name, r.states, r.edges) for r in gallery.explore_all(["sessions"], "small", jobs=2)]
    assert alone == together

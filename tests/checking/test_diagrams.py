"""Diagrams come from tables: what is checked in is what the tables say."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from interlock.checking.diagrams import Change, Diagram, all_diagrams, draw, from_table, stale, write_all
from interlock.core import joins

DOCS = Path(__file__).parent.parent.parent / "docs" / "protocols"


def test_no_diagram_is_stale() -> None:
    assert stale(DOCS) == [], "run tools/diagrams"


@pytest.mark.parametrize("name", sorted(all_diagrams()))
def test_every_diagram_is_well_formed_and_shown_on_its_page(name: str) -> None:
    assert ElementTree.fromstring(all_diagrams()[name]).tag.endswith("svg")
    pages = [path for path in DOCS.glob("*.md") if f"({name})" in path.read_text()]
    assert pages, f"no page in docs/protocols shows {name}"


def test_a_change_of_the_table_makes_its_diagram_stale(tmp_path: Path) -> None:
    assert set(write_all(tmp_path)) == set(all_diagrams())
    assert stale(tmp_path) == []
    (tmp_path / "joins.svg").write_text((tmp_path / "joins.svg").read_text().replace("RankLost", "Lost"))
    assert stale(tmp_path) == ["joins.svg"]
    assert write_all(tmp_path) == ["joins.svg"]


def test_every_row_of_a_table_is_in_its_drawing() -> None:
    changes = from_table(joins.TABLE)
    assert Change("EARLY", "Abort", "FAILED") in changes
    assert len(changes) == sum(len(move.to) for move in joins.TABLE.values())
    drawn = draw(
        Diagram(
            "t",
            ["A", "B<"],
            [Change("A", "go", "B<"), Change("B<", "stop", "A"), Change("A", "sit", "A")],
            "A",
            ["B<"],
        )
    )
    for text in ("B&lt;", ">go<", ">stop<", ">sit<", "stays on"):
        assert text in drawn


def test_a_state_that_is_not_drawn_is_named() -> None:
    with pytest.raises(ValueError, match="names a state that is not drawn"):
        draw(Diagram("t", ["A"], [Change("A", "go", "B")], "A"))

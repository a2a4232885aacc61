"""Draws the transitions of a protocol as SVG, from its table: states are columns, each change of state is an arrow on a row.

No lay-out is searched, so nothing overlaps and equal tables give equal files. What leaves a state as it is stands under it.

A protocol has diagrams when its module in checking/worlds/ defines `diagrams()`, a dictionary of titles to what `draw` gets:

    def diagrams() -> dict[str, Diagram]:
        return {"joins": Diagram("One join", tuple(Phase), from_table(TABLE), initial=Phase.EARLY, final=(Phase.COMPLETED,))}

`tools/diagrams` writes each to docs/protocols/<key>.svg; a test fails when a file is not what its table says.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from interlock.checking import worlds
from interlock.checking.gallery import protocols


class Change(NamedTuple):
    """One arrow: in state `source`, `event` may lead to `target`."""

    source: str
    event: str
    target: str


class Diagram(msgspec.Struct, frozen=True):
    """What `draw` draws. `states` in the order of the columns; every state named by `changes` is among them."""

    title: str
    states: Sequence[str]
    changes: Sequence[Change]
    initial: str
    final: Sequence[str] = ()


def from_table(table: Mapping[tuple[Any, type], Any]) -> tuple[Change, ...]:
    """The changes of a table {(state, event type): row}, where `row.to` lists the states the row may lead to."""
    return tuple(
        Change(str(state), event.__name__, str(target))
        for (state, event), row in table.items()
        for target in row.to
    )


COLUMN, MARGIN, BOX_WIDTH, BOX_HEIGHT, ROW, LINE = 190, 24, 150, 34, 34, 15
HEAD = 58
STYLE = (
    "text{font-family:ui-sans-serif,system-ui,sans-serif;font-size:13px;fill:#1c2733}"
    ".title{font-size:16px;font-weight:600}.state{font-weight:600;text-anchor:middle}"
    ".stays{font-size:11px;fill:#5a6b7b;text-anchor:middle}.event{font-size:12px;text-anchor:middle}"
    "rect{fill:#eef3f8;stroke:#33506b}.final{fill:#e4f1e6;stroke:#2f6b3a;stroke-width:2.5}"
    ".life{stroke:#c3ced9;stroke-dasharray:3 4}.arrow{stroke:#33506b;stroke-width:1.4;fill:none}"
)


def draw(diagram: Diagram) -> str:
    """The diagram as one SVG document. Raises `ValueError` when a change names a state that is not drawn."""
    columns = {state: index for index, state in enumerate(map(str, diagram.states))}
    for change in diagram.changes:
        if change.source not in columns or change.target not in columns:
            raise ValueError(f"{diagram.title}: {change} names a state that is not drawn")
    stays = {state: [c.event for c in diagram.changes if c.source == c.target == state] for state in columns}
    arrows = _arrows(diagram.changes, columns)
    width = 2 * MARGIN + COLUMN * len(columns)
    rows_top = HEAD + BOX_HEIGHT + LINE * (1 + max(map(len, stays.values()))) + ROW
    height = rows_top + ROW * len(arrows) + MARGIN // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#33506b"/></marker></defs>',
        f'<path d="M0 0h{width}v{height}H0z" fill="#fff"/>',
        f'<text class="title" x="{MARGIN}" y="30">{escape(diagram.title)}</text>',
    ]
    finals = set(map(str, diagram.final))
    for state, column in columns.items():
        parts += _column(state, _x(column), stays[state], height, state in finals, state == diagram.initial)
    for row, ((source, target), events) in enumerate(arrows):
        parts += _arrow(_x(columns[source]), _x(columns[target]), rows_top + ROW * row, events)
    return "\n".join([*parts, "</svg>", ""])


def _arrows(changes: Iterable[Change], columns: Mapping[str, int]) -> list[tuple[tuple[str, str], list[str]]]:
    """Changes of state with the events that make them, from left to right."""
    together: dict[tuple[str, str], list[str]] = {}
    for change in changes:
        if change.source != change.target:
            together.setdefault((change.source, change.target), []).append(change.event)
    return sorted(together.items(), key=lambda item: (columns[item[0][0]], columns[item[0][1]]))


def _x(column: int) -> int:
    return MARGIN + COLUMN * column + COLUMN // 2


def _column(state: str, x: int, stays: Sequence[str], height: int, final: bool, initial: bool) -> list[str]:
    top = HEAD
    parts = [
        f'<line class="life" x1="{x}" y1="{top + BOX_HEIGHT}" x2="{x}" y2="{height - 6}"/>',
        f'<rect class="{"final" if final else "box"}" x="{x - BOX_WIDTH // 2}" y="{top}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="8"/>',
        f'<text class="state" x="{x}" y="{top + 22}">{escape(state)}</text>',
    ]
    if initial:
        parts.append(f'<circle cx="{x - BOX_WIDTH // 2 - 8}" cy="{top + BOX_HEIGHT // 2}" r="5"/>')
    if stays:
        bottom = top + BOX_HEIGHT + LINE
        block = LINE * (len(stays) + 1)
        parts.append(
            f'<path d="M{x - BOX_WIDTH // 2} {bottom - LINE + 2}h{BOX_WIDTH}v{block}h-{BOX_WIDTH}z" fill="#fff"/>'
        )
        for number, line in enumerate(["stays on", *stays]):
            parts.append(f'<text class="stays" x="{x}" y="{bottom + LINE * number}">{escape(line)}</text>')
    return parts


def _arrow(start: int, end: int, y: int, events: Sequence[str]) -> list[str]:
    label = escape(", ".join(events))
    room = 6.6 * len(label) + 8
    middle = (start + end) / 2
    return [
        f'<path d="M{middle - room / 2:.0f} {y - 18}h{room:.0f}v14h-{room:.0f}z" fill="#fff"/>',
        f'<text class="event" x="{middle:.0f}" y="{y - 7}">{label}</text>',
        f'<path class="arrow" marker-end="url(#tip)" d="M{start} {y}H{end - 2 if end > start else end + 2}"/>',
    ]


def all_diagrams() -> dict[str, str]:
    """File names in docs/protocols with what must stand in them."""
    files = {}
    for name in protocols():
        module = importlib.import_module(f"{worlds.__name__}.{name}")
        for key, diagram in getattr(module, "diagrams", dict)().items():
            files[f"{key}.svg"] = draw(diagram)
    return files


def stale(folder: Path) -> list[str]:
    """Names of the diagrams in `folder` that are missing or not what their tables say."""
    return [
        name
        for name, text in all_diagrams().items()
        if not (folder / name).is_file() or (folder / name).read_text() != text
    ]


def write_all(folder: Path) -> list[str]:
    """Writes every diagram to `folder`; returns the names of those that changed."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = stale(folder)
    for name, text in all_diagrams().items():
        (folder / name).write_text(text)
    return changed

"""A defect in the making of one answer ends that answer by name: no client waits for a choice that nobody makes any more."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.text.stream import TextStream


@pytest.mark.parametrize("count", [1, 2])
async def test_a_defect_while_text_is_made_ends_the_answer(
    world: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    def push(*_: object) -> str:
        raise IndexError("a defect")

    monkeypatch.setattr(TextStream, "push", push)
    got = await world.complete(n=count, max_tokens=9)
    assert (got.status, got.error["code"]) == (500, "internal_error")
    assert not world.fleet.running

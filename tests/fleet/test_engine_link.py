"""What a link sees of its engine's end is acted upon, or the front ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Fleet


async def test_a_defect_of_ours_at_an_engines_end_is_not_lost(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests would wait for ever for tokens of an engine that is no more."""
    await fleet.start_coordinator(exit_is_proof=False)
    child = await fleet.engine_process("a", 0.01)
    dispatcher = await fleet.start_dispatcher()
    await fleet.ready("a")

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect of ours")

    with monkeypatch.context() as patched:
        patched.setattr(dispatcher, "on_gone", broken)
        assert await child.end_tree(5.0)
        await fleet.until(lambda: dispatcher.stale is not None and dispatcher.stale.done())
    assert dispatcher.stale is not None
    assert isinstance(dispatcher.stale.result(), ZeroDivisionError)

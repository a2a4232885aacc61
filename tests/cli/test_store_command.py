"""A store node by itself, as somebody with a plain vLLM runs it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from interlock.cli.main import main
from interlock.host.real import RealHost


@pytest.fixture
def home() -> Iterator[Path]:
    """Short enough for a socket's path."""
    path = Path(tempfile.mkdtemp(prefix="il-"))
    yield path
    shutil.rmtree(path)


async def test_a_node_serves_its_counters_until_it_is_told_to_leave(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host, socket = RealHost(), home / "kv.sock"
    argv = [sys.executable, "-m", "interlock", "store", "run", "--address", f"unix:{socket}", "--gib", "0.01"]
    child = await host.spawn(
        [*argv, "--state-dir", str(home / "state")], env=dict(os.environ), log=home / "log"
    )
    try:
        async with asyncio.timeout(30):
            while not socket.exists():
                assert child.returncode is None, (home / "log").read_text()
                await host.clock.sleep_s(0.02)
        assert await host.in_thread(main, ["store", "stats", "--address", f"unix:{socket}"]) == 0
        assert "interlock_store_integrity_failures_total 0" in capsys.readouterr().out
        child.terminate()
        async with asyncio.timeout(10):
            await child.wait()
        assert not socket.exists()
    finally:
        assert await child.end_tree(10)


def test_a_node_that_is_not_there_is_named_with_status_1(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "stats", "--address", f"unix:{home}/none.sock"]) == 1
    assert "none.sock" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["run", "--address", "kv.sock"], [], ["stats", "--address", "tcp:1.2.3.4:5"]]
)
def test_impossible_words_are_refused_with_status_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", *words]) == 2
    assert capsys.readouterr().err.startswith("interlock: ")

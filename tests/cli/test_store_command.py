"""A store node by itself, as somebody with a plain vLLM runs it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
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


@pytest.fixture
def filled(home: Path) -> Iterator[tuple[str, list[bytes]]]:
    """A node in a thread with five blocks of alice's and five of bob's; its address, and alice's keys."""
    import numpy as np

    from interlock.core.layouts import KVLayout
    from interlock.store.api import Store

    layout = KVLayout(layers=2, heads=4, block_tokens=4, content=32, dtype="float32")
    words = ["store", "run", "--address", f"unix:{home}/kv.sock", "--gib", "0.01"]
    words += ["--state-dir", str(home / "state"), "--quota", "alice=0.001", "--quota", "carol=0"]
    child = subprocess.Popen([sys.executable, "-m", "interlock", *words], stderr=subprocess.PIPE)
    try:
        address = f"unix:{home}/kv.sock"
        keys = {
            name: [name.encode() * 6 + bytes([n]) * (32 - 6 * len(name)) for n in range(5)]
            for name in ("al", "bob")
        }
        with Store.open(address, layout, timeout_s=30.0) as store:
            for name, tenant in (("al", "alice"), ("bob", "bob"), ("al", "carol")):
                data = np.full((5, layout.block_bytes), 7, dtype=np.uint8)
                result = store.put(keys[name], data, tenant=tenant)
                assert result.stored + result.present == 5
            assert (
                store.put([b"c" * 32], np.zeros((1, layout.block_bytes), np.uint8), tenant="carol").left == 1
            )
        yield address, keys["al"]
    finally:
        child.terminate()
        child.communicate(timeout=20)


def test_what_is_stored_can_be_listed_checked_and_removed(
    filled: tuple[str, list[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    address, keys = filled

    def say(*words: str) -> tuple[int, str]:
        status = main(["store", *words, "--address", address])
        return status, capsys.readouterr().out

    status, out = say("ls", "--json")
    listed = [json.loads(line) for line in out.splitlines()]
    assert (status, len(listed)) == (0, 10)
    assert {block["key"] for block in listed if block["tenant"] == "alice"} == {key.hex() for key in keys}
    assert len(say("ls", "--tenant", "bob", "--limit", "3")[1].splitlines()) == 3
    assert say("ls", "--prefix", keys[2].hex())[1].startswith(keys[2].hex() + "\t")
    assert say("verify") == (0, "10 blocks checked, 0 bad\n")
    stats = json.loads(say("stats", "--json")[1])
    assert stats["tenants"]["alice"] == {"bytes": 5 * 4096, "quota_bytes": int(0.001 * (1 << 30))}
    assert "tenant bob: 20480 bytes, no quota" in say("stats")[1]
    assert say("rm", "--tenant", "alice") == (0, "5 blocks forgotten\n")
    assert json.loads(say("rm", "--all", "--json")[1]) == {"removed": 5, "missed": []}
    assert say("ls") == (0, "")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["rm"], "--all"),
        (["rm", "--all", "--tenant", "x"], "--all"),
        (["rm", "--prefix", "xyz"], "hexadecimal"),
        (["run", "--quota", "alice"], "TENANT=GIB"),
        (["run", "--quota", "alice=-1"], "TENANT=GIB"),
        (["run", "--quota", "alice=much"], "TENANT=GIB"),
    ],
)
def test_words_that_would_do_something_else_than_meant_are_refused(
    home: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", *words, "--address", f"unix:{home}/kv.sock"]) == 2
    assert why in capsys.readouterr().err


def test_events_for_the_whole_network_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["store", "run", "--address", f"unix:{home}/kv.sock", "--gib", "0.01", "--state-dir", f"{home}/s"]
    assert main([*words, "--kv-events", "tcp://0.0.0.0:5557"]) == 1
    assert "can be reached by others" in capsys.readouterr().err

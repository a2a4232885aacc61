"""`interlock transfer` against a real process that serves."""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

INTERLOCK = [sys.executable, "-m", "interlock", "transfer"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    tmp_path.chmod(0o700)
    address = f"unix:{tmp_path}/b.sock"
    process = subprocess.Popen(
        [*INTERLOCK, "serve", "--name", "b", "--address", address, "--mib", "32"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 30)[0], "it did not start"
    assert "b offers 32 MiB" in process.stdout.readline()
    yield address
    process.terminate()
    assert process.wait(10) == 0
    assert not Path(address.removeprefix("unix:")).exists(), "it leaves its socket behind"
    process.stdout.close()


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*INTERLOCK, *words], capture_output=True, text=True, timeout=40, check=False)


def test_explain_says_which_lane_and_why_and_peers_names_who_is_not_there(
    served: str, tmp_path: Path
) -> None:
    said = ask("explain", f"b={served}")
    assert said.returncode == 0, said.stderr
    assert "CONNECTED" in said.stdout
    assert "by way of mapped" in said.stdout
    assert "dialled by us; connections: 1 to read over" in said.stdout
    gone = ask("peers", f"b={served}", f"c=unix:{tmp_path}/nobody.sock", "--timeout", "1")
    assert gone.returncode == 1
    assert "b: connected within" in gone.stdout
    assert "nobody listens there" in gone.stdout


def test_a_peer_without_an_address_is_asked_for_in_words() -> None:
    said = ask("ping", "b")
    assert said.returncode == 2
    assert "NAME=ADDRESS" in said.stderr

"""`interlock snapshots` names what is damaged, and touches nothing that is not its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from interlock.cli.main import main
from interlock.snapshots.store import SnapshotStore

NAME = "ab" * 16


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    store = SnapshotStore(tmp_path / "s", owner="test")
    for request in ("kept", "live"):
        store.save(request, 8, {"x": np.arange(5000, dtype=np.int32)}, {"n": 1})
    store.flush(timeout_s=20)
    assert store.promote("kept", 8, NAME)
    store.close(erase=False)
    return tmp_path / "s"


def test_ls_show_and_verify_see_every_snapshot(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshots", "ls", str(directory)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["snapshots", "show", str(directory), "abab"]) == 0
    assert "x  I32 [5000]" in capsys.readouterr().out
    assert main(["snapshots", "verify", str(directory)]) == 0
    assert "2 snapshots, 0 damaged" in capsys.readouterr().out


def test_a_damaged_file_names_itself_and_the_tensor(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = directory / "kept" / NAME
    data = bytearray(path.read_bytes())
    data[4096 + 100] ^= 1
    path.write_bytes(data)
    assert main(["snapshots", "verify", str(directory)]) == 1
    assert f"tensor x of snapshot kept/{NAME} is damaged" in capsys.readouterr().out


def test_rm_removes_promoted_ones_only(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshots", "rm", str(directory), "8.0"]) == 1
    assert main(["snapshots", "rm", str(directory), NAME[:6]]) == 0
    assert main(["snapshots", "ls", str(directory)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # one line of rm, one snapshot left
    assert main(["snapshots", "ls", str(directory / "live")]) == 1

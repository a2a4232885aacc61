"""Weights are named by content: equal bytes share a name wherever they stand, other bytes never do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from interlock.host.files import RealFiles
from interlock.store import models
from interlock.store.models import UnknownModelError, model_identity


def checkpoint(folder: Path, weights: bytes = b"w" * 100, config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(config)
    (folder / "README.md").write_text(str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "digests.json"


def name_of(path: Path, cache: Path) -> str:
    return model_identity(str(path), None, files=RealFiles(), cache=cache)


def test_copies_share_a_name_and_other_weights_or_configurations_do_not(tmp_path: Path, cache: Path) -> None:
    one, copy = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "copy")
    other = checkpoint(tmp_path / "other", weights=b"v" * 100)
    roped = checkpoint(tmp_path / "roped", config='{"rope_theta": 1}')
    names = [name_of(path, cache) for path in (one, copy, other, roped)]
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_weights_overwritten_in_place_get_an_other_name(tmp_path: Path, cache: Path) -> None:
    path = checkpoint(tmp_path / "one")
    before = name_of(path, cache)
    (path / "model.safetensors").write_bytes(b"x" * 100)  # same size
    os.utime(path / "model.safetensors", ns=(1, 1))
    assert name_of(path, cache) != before


def test_an_unchanged_checkpoint_is_read_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path / "one")
    before = name_of(path, cache)
    monkeypatch.setattr(models, "sha256_of", lambda file: pytest.fail(f"{file} was read again"))
    assert name_of(path, cache) == before
    cache.write_text("not json")
    monkeypatch.undo()
    assert name_of(path, cache) == before, "a damaged cache costs a reading, nothing else"


def test_a_hub_id_needs_a_commit(cache: Path) -> None:
    with pytest.raises(UnknownModelError, match="40-digit commit"):
        model_identity("org/model", "main", files=RealFiles(), cache=cache)
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert model_identity("org/model", commit, files=RealFiles(), cache=cache) == f"hub:org/model@{commit}"


def test_a_directory_without_weights_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UnknownModelError, match="holds no weights"):
        name_of(tmp_path, cache)

"""The demo model: the same everywhere, built once, and an instrument that shows wrong KV."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from interlock.engines import demo_model
from interlock.engines.checkpoint import check_tensor_parallel, read_checkpoint
from interlock.engines.demo_model import SPECIALS, build_demo_model, demo_model_path
from interlock.engines.random_llama import write_llama


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_model(tmp_path_factory.mktemp("demo"))


def test_two_builds_are_equal_to_the_byte(built: Path, tmp_path: Path) -> None:
    assert digests(build_demo_model(tmp_path)) == digests(built)


def test_it_is_a_checkpoint_of_twenty_to_thirty_million_parameters(built: Path) -> None:
    checkpoint = read_checkpoint(str(built))
    check_tensor_parallel(checkpoint, 2)
    header = (built / "model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    tensors = json.loads(header[8 : 8 + size])
    offsets = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    assert 20e6 < max(offsets) / 4 < 30e6


def test_its_tokenizer_takes_any_text_and_gives_it_back(built: Path) -> None:
    tokenizer = Tokenizer.from_file(str(built / "tokenizer.json"))
    for text in ("def main():\n    return 1", "Zürich ☃ 東京", "\x00\t\r\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokens_that_are_no_text_are_never_the_most_likely(built: Path) -> None:
    from safetensors.numpy import load_file

    head = load_file(built / "model.safetensors")["lm_head.weight"]
    tokenizer = Tokenizer.from_file(str(built / "tokenizer.json"))
    silent = {row for row in range(len(head)) if not head[row].any()}
    assert {tokenizer.token_to_id(special) for special in SPECIALS} <= silent
    for row in set(range(len(head))) - silent:
        assert "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode([row])


@pytest.mark.parametrize("bytes_max", [1000, 50_000])
def test_a_disk_that_takes_nothing_is_an_error_of_the_system(tmp_path: Path, bytes_max: int) -> None:
    """Below the tokenizer's size, and between that and the weights': the libraries that write them have errors of their own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            if bytes_max == 1000:
                build_demo_model(tmp_path)
            else:
                write_llama(tmp_path / "m", demo_model.SHAPE, 1, end=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_built_model_is_not_built_again(built: Path) -> None:
    before = (built / "config.json").stat().st_mtime_ns
    assert build_demo_model(built.parent) == built
    assert (built / "config.json").stat().st_mtime_ns == before


def test_a_builder_waits_for_another_and_takes_what_that_one_built(tmp_path: Path) -> None:
    target = demo_model_path(tmp_path)
    lock = os.open(tmp_path / f".{target.name}.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    results: list[Path] = []
    second = threading.Thread(target=lambda: results.append(build_demo_model(tmp_path)))
    second.start()
    target.mkdir()  # the first builder's rename
    os.close(lock)
    second.join(timeout=30)
    assert results == [target]
    assert not list(target.iterdir())


def test_a_build_that_fails_leaves_nothing_and_the_next_one_removes_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = tmp_path / f".{demo_model_path(tmp_path).name}.building-x"
    leftover.mkdir()

    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setattr(demo_model, "_write_model", fail)
    with pytest.raises(OSError, match="full"):
        build_demo_model(tmp_path)
    assert not leftover.exists()
    assert [path.name for path in tmp_path.iterdir()] == [f".{demo_model_path(tmp_path).name}.lock"]

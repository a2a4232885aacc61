"""What can be said of a model before an engine has loaded it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from interlock.engines.checkpoint import BadCheckpoint, check_tensor_parallel, read_checkpoint


def checkpoint(folder: Path, **config: object) -> Path:
    folder.mkdir()
    made = {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    } | config
    (folder / "config.json").write_text(json.dumps(made))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_checkpoint_directory_is_taken(tmp_path: Path) -> None:
    found = read_checkpoint(str(checkpoint(tmp_path / "m")))
    assert (found.architecture, found.heads, found.kv_heads) == ("LlamaForCausalLM", 8, 4)


def test_heads_of_a_multimodal_model_are_found_in_its_text_part(tmp_path: Path) -> None:
    text = {"num_attention_heads": 16, "num_key_value_heads": 2}
    assert read_checkpoint(str(checkpoint(tmp_path / "m", text_config=text))).heads == 16


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "tokenizer.json"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, missing: str, words: str) -> None:
    (checkpoint(tmp_path / "m") / missing).unlink()
    with pytest.raises(BadCheckpoint, match=words):
        read_checkpoint(str(tmp_path / "m"))


def test_a_path_that_is_not_there_and_one_that_is_a_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="there is no directory"):
        read_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadCheckpoint, match="is a file"):
        read_checkpoint(str(tmp_path / "file"))


@pytest.mark.parametrize("content", ["not json", "[1]", "\xff"])
def test_a_damaged_configuration_is_refused_in_words(tmp_path: Path, content: str) -> None:
    (checkpoint(tmp_path / "m") / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        read_checkpoint(str(tmp_path / "m"))


def test_tensor_parallel_must_divide_the_heads(tmp_path: Path) -> None:
    found = read_checkpoint(str(checkpoint(tmp_path / "m")))
    for ranks in (1, 2, 4, 8):
        check_tensor_parallel(found, ranks)
    with pytest.raises(BadCheckpoint, match="choose one of 1, 2, 4, 8"):
        check_tensor_parallel(found, 3)


def test_kv_heads_must_be_split_or_replicated_evenly(tmp_path: Path) -> None:
    found = read_checkpoint(str(checkpoint(tmp_path / "m", num_attention_heads=12, num_key_value_heads=4)))
    with pytest.raises(BadCheckpoint, match="KV heads"):
        check_tensor_parallel(found, 6)

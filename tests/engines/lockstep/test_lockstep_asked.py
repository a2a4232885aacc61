"""What `interlock serve --data-parallel` refuses before a process is started, in one sentence each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from interlock.cli.main import main
from interlock.engines.checkpoint import BadCheckpoint, check_data_parallel, read_checkpoint


def checkpoint(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps({"architectures": ["SomeMoeForCausalLM"], **config}))
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").touch()
    return folder


@pytest.mark.parametrize("name", ["num_local_experts", "n_routed_experts", "num_experts"])
def test_experts_are_counted_whatever_a_family_calls_them(tmp_path: Path, name: str) -> None:
    read = read_checkpoint(str(checkpoint(tmp_path, **{name: 6})))
    check_data_parallel(read, 3)
    with pytest.raises(
        BadCheckpoint, match=r"does not divide the model's 6 experts; choose one of 1, 2, 3, 6"
    ):
        check_data_parallel(read, 4)


def test_a_model_without_experts_has_nothing_to_share(tmp_path: Path) -> None:
    read = read_checkpoint(str(checkpoint(tmp_path)))
    check_data_parallel(read, 1)
    with pytest.raises(BadCheckpoint, match="SomeMoeForCausalLM has no experts"):
        check_data_parallel(read, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "is for Transformers engines"),
        (["--engine", "vllm:1,transformers:1"], "is for Transformers engines"),
        (["--engine", "transformers", "--tp", "2"], "do not go together"),
    ],
)
def test_shapes_that_no_engine_has_are_refused(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(checkpoint(tmp_path, num_experts=4))
    assert main(["serve", model, "--data-parallel", "2", *words]) == 2
    assert said in capsys.readouterr().err

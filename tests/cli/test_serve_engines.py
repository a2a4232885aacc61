"""Which engines `interlock serve` starts, from what an operator says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from interlock.cli import serve_checks, serve_plan
from interlock.cli.errors import Usage
from interlock.cli.main import main, make_parser
from interlock.host.sockets import free_port


def kinds(*arguments: str) -> list[str]:
    parsed = make_parser().parse_args(["serve", *arguments])
    return serve_checks.chosen_kinds(parsed.engine, parsed.engines)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], ["vllm", "vllm"]),
        (["--engines", "3"], ["vllm"] * 3),
        (["--engine", "transformers"], ["transformers"] * 2),
        (["--engine", "transformers", "--engines", "1"], ["transformers"]),
        (["--engine", "vllm:1,transformers:2"], ["vllm", "transformers", "transformers"]),
        (["--engine", "vllm:1", "--engine", "transformers:1"], ["vllm", "transformers"]),
        (["--engine", "vllm,transformers"], ["vllm", "transformers"]),
        (["--engine", "transformers:4", "--engines", "4"], ["transformers"] * 4),
    ],
)
def test_engines_are_what_was_said(arguments: list[str], found: list[str]) -> None:
    assert kinds(*arguments) == found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "vllm:1,transformers"], "for every kind or for none"),
        (["--engine", "vllm:2", "--engines", "3"], "do not agree"),
        (["--engine", "vllm,transformers", "--engines", "4"], "say how many of each"),
        (["--engine", "transformers:1000", "--engine", "vllm:1000"], "more than the 1024"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(Usage, match=words):
        kinds(*arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "sglang"], "no kind of engine: vllm or transformers is"),
        (["--engine", "vllm:0"], "not a number from 1"),
        (["--engine", "transformers", "--", "--max-model-len", "512"], "no vLLM engine is asked for"),
    ],
)
def test_wrong_kinds_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["serve", *arguments]) == 2
    assert words in capsys.readouterr().err


def checkpoint(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8}')
    (model / "model.safetensors").write_bytes(b"")
    (model / "tokenizer.json").write_text("{}")
    return model


def test_each_engine_gets_its_own_kind_and_all_get_one_cache(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    words = ["serve", str(model), "--engine", "vllm:1,transformers:1", "--port", str(free_port())]
    found = serve_checks.check(make_parser().parse_args(words), ["--max-model-len", "512"])
    run = tmp_path / "run"
    run.mkdir()
    plan = serve_plan.make_plan(found, run, "sha256:x")
    configs = [msgspec.json.decode(part.config) for part in plan.engines]
    assert [(c["vllm"] is not None, c["transformers"] is not None) for c in configs] == [
        (True, False),
        (False, True),
    ]
    vllm, ours = configs[0]["vllm"], configs[1]["transformers"]
    assert vllm["arguments"] == ["--max-model-len", "512"]
    assert vllm["store"] == ours["store"] == plan.store_address
    assert vllm["model_id"] == ours["model_id"] == "sha256:x"
    assert vllm["state_dir"] != ours["state_dir"]
    assert all(c["runner"]["weights"] == str(model) for c in configs)


@pytest.mark.parametrize(
    ("arguments", "gib"),
    [
        ([], 0.0),
        (["--engine", "transformers"], 2.0),
        (["--engine", "vllm:1,transformers:1"], 2.0),
        (["--engine", "transformers", "--tp", "2"], 0.0),
        (["--engine", "transformers", "--snapshots-gib", "0"], 0.0),
        (["--engine", "transformers", "--tp", "2", "--snapshots-gib", "0"], 0.0),
        (["--engine", "transformers", "--snapshots-gib", "0.5"], 0.5),
    ],
)
def test_the_plan_carries_boundary_snapshots_to_each_transformers_engine_that_can_take_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], gib: float
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    port = free_port()
    words = ["serve", str(checkpoint(tmp_path)), "--port", str(port), *arguments]
    found = serve_checks.check(make_parser().parse_args(words), [])
    run = tmp_path / "run"
    run.mkdir()
    for index, part in enumerate(serve_plan.make_plan(found, run, "sha256:x").engines):
        config = msgspec.json.decode(part.config)["transformers"]
        if config is None:
            continue
        if not gib:
            assert config["snapshots"] is None
            continue
        assert config["snapshots"] == str(tmp_path / f"cache/interlock/snapshots/{port}/engine-{index}")
        assert config["snapshot_bytes"] == int(gib * (1 << 30))
        assert config["snapshot_blocks"] == serve_plan.SNAPSHOT_BLOCKS
    assert found.snapshot_bytes == int(gib * (1 << 30))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--snapshots-gib", "1"], "for Transformers engines, and none is asked for"),
        (["--engine", "transformers", "--tp", "2", "--snapshots-gib", "1"], "engines of one rank"),
        (["--engine", "transformers", "--snapshots-gib", "-1"], "not a number of GiB"),
    ],
)
def test_snapshots_that_cannot_be_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["serve", *arguments]) == 2
    assert words in capsys.readouterr().err

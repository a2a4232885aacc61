"""The command line: what is refused before anything starts, in which words, with which status."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from interlock.cli import serve_checks, serve_plan
from interlock.cli.main import main, make_parser
from interlock.fleet.launchers.rundir import base_folder, coordinator_address
from interlock.host.sockets import free_port


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(list(arguments))
    return status, capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8, "num_key_value_heads": 4}'
    )
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to do"),
        (["fly"], "invalid choice"),
        (["serve", "--engines", "0"], "not a number from 1"),
        (["serve", "--engines", "two"], "not a number from 1"),
        (["serve", "--port", "99999"], "not a port"),
        (["serve", "--store-gib", "-1"], "GiB"),
        (["serve", "--tensor-parallel", "2"], "unrecognized arguments"),
        (["serve", "--eng", "2"], "unrecognized arguments"),
        (["serve", "--host", "0.0.0.0"], "needs --api-key"),
        (["serve", "--", "--tensor-parallel-size", "2"], "use --tp"),
        (["serve", "/no/such/model"], "there is no directory"),
        (["ctl"], "ctl needs one of"),
        (["ctl", "pause", "--mode", "softly"], "invalid choice"),
        (["ctl", "status", "--", "--x"], "for `interlock serve` only"),
        (["store", "run", "--address", "unix:/x", "--gib", "nan"], "not a number of GiB"),
        (["store", "run", "--address", "unix:/x", "--disk-gib", "-1"], "not a number of GiB"),
        (["store", "ls", "--address", "unix:/x", "--limit", "-3"], "not a number above 0"),
        (["store", "ls", "--addr", "unix:/x"], "the following arguments are required: --address"),
        (["transfer", "ping", "b=unix:/x", "--timeout", "-1"], "not a number of seconds"),
        (["transfer", "serve", "--name", "b", "--address", "unix:/x", "--mib", "0"], "not a number of MiB"),
        (["store", "run", "--address", "unix:/x", "--disk", "/etc/passwd"], "/etc/passwd is no directory"),
        (["serve", "--disk", "/etc/passwd"], "/etc/passwd is no directory"),
        (["serve", "--state-dir", "/etc/passwd"], "/etc/passwd is no directory"),
        (["attach", "http://127.0.0.1:1", "--port", "99999"], "not a port"),
        (["demo", "--port", "0"], "not a port"),
        (["demo", "/no/such/model"], "/no/such/model is no directory"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_two(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    status, said = asked(capsys, *arguments)
    assert status == 2
    assert words in said
    assert said.startswith("interlock: ")
    assert "Traceback" not in said


def test_a_busy_port_is_said_before_anything_starts(
    capsys: pytest.CaptureFixture[str], checkpoint: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, said = asked(capsys, "serve", checkpoint, "--port", str(port))
    assert (status, f"port {port}" in said, "in use" in said) == (1, True, True)


def test_tensor_parallel_that_does_not_divide_is_refused(
    capsys: pytest.CaptureFixture[str], checkpoint: str
) -> None:
    status, said = asked(capsys, "serve", checkpoint, "--tp", "3", "--port", str(free_port()))
    assert (status, "does not divide the model's 8 attention heads" in said) == (2, True)


def test_what_was_asked_is_what_is_planned(checkpoint: str, tmp_path: Path) -> None:
    port = free_port()
    parsed = make_parser().parse_args(
        ["serve", checkpoint, "--engines", "3", "--tp", "2", "--port", str(port), "--store-gib", "0.5"]
    )
    found = serve_checks.check(parsed, ["--max-model-len", "512"])
    assert (found.engines, found.tensor_parallel, found.served_name) == (3, 2, "model")
    assert found.store_bytes == 1 << 29
    plan = serve_plan.make_plan(found, tmp_path, "sha256:x")
    assert [part.name for part in plan.engines] == ["engine-0", "engine-1", "engine-2"]
    assert b"--max-model-len" in plan.engines[0].config
    assert (tmp_path / "admin-token").stat().st_mode & 0o777 == 0o600


def test_a_key_in_the_environment_is_a_key(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERLOCK_API_KEY", "secret")
    parsed = make_parser().parse_args(["serve", checkpoint, "--host", "0.0.0.0", "--port", str(free_port())])
    assert serve_checks.check(parsed, []).api_key == "secret"


def test_ranks_never_get_more_threads_than_there_are_cores_to_spare(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(33)))
    for engines, tensor_parallel, threads in ((1, 1, 32), (2, 1, 16), (4, 2, 4), (40, 1, 1)):
        found = serve_checks.Asked(
            model=Path(checkpoint),
            architecture="x",
            served_name="x",
            kinds=["vllm"] * engines,
            tensor_parallel=tensor_parallel,
            host="127.0.0.1",
            port=1,
            store_bytes=1,
            api_key=None,
            vllm_arguments=[],
        )
        assert serve_plan.threads_per_rank(found) == threads


def test_the_run_directory_is_private_to_its_user_and_named_by_its_port(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert coordinator_address(8000) == f"unix:{tmp_path}/interlock/8000/coordinator.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    assert base_folder().name == f"interlock-{os.getuid()}"


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from interlock.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'vllm', 'transformers', 'numpy', 'msgspec', 'asyncio', 'starlette', 'uvicorn', 'tokenizers'}\n"
        "sys.exit(str(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "interlock", "--version"], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "interlock")

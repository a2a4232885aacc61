"""Two store nodes as two people run them: what is put into one is got through the other, until the other is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interlock.cli import serve_checks, serve_plan, store_peers
from interlock.cli.errors import Usage
from interlock.cli.main import main, make_parser
from interlock.cli.processes import decode_config
from interlock.core.layouts import KVLayout
from interlock.store.api import Store
from interlock.store.main import StoreConfig

LAYOUT = KVLayout(layers=2, heads=4, block_tokens=4, content=32, dtype="float32")
PATIENCE_S = 30.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def node(directory: Path, name: str, words: list[str]) -> Iterator[tuple[str, Any]]:
    home = directory / name
    home.mkdir()
    address = f"unix:{home}/kv.sock"
    argv = [sys.executable, "-m", "interlock", "store", "run", "--address", address, "--gib", "0.01"]
    argv += [
        "--state-dir",
        f"{home}/state",
        "--name",
        name,
        "--peers-token-file",
        f"{directory}/token",
        *words,
    ]
    with (home / "log").open("wb") as log:
        child = subprocess.Popen(argv, stderr=log, stdout=log)
    try:
        yield address, child
    finally:
        child.terminate()
        child.wait(timeout=20)


@contextlib.contextmanager
def coordinator(directory: Path) -> Iterator[str]:
    address = f"unix:{directory}/coordinator.sock"
    program = (
        "import asyncio, sys; from pathlib import Path; from interlock.host.real import RealHost; "
        "from interlock.fleet.coordinator_main import CoordinatorConfig, run_coordinator; "
        "asyncio.run(run_coordinator(RealHost(), CoordinatorConfig(address=sys.argv[1], state_dir=Path(sys.argv[2]))))"
    )
    child = subprocess.Popen([sys.executable, "-c", program, address, f"{directory}/coordinator"])
    try:
        yield address
    finally:
        child.kill()
        child.wait(timeout=20)


def make_certificates(where: Path) -> list[str]:
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    key, certificate = f"{where}/key.pem", f"{where}/cert.pem"
    argv = ["openssl", *command.split(), "-keyout", key, "-out", certificate]
    subprocess.run(argv, check=True, capture_output=True, timeout=30)
    words = ["--peers-tls-certificate", certificate, "--peers-tls-key", key]
    return [*words, "--peers-tls-authority", certificate]


@pytest.fixture(params=["addresses", "tls", "coordinator"])
def words_of_two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """How node a and node b are told of each other."""
    if request.param == "coordinator":
        with coordinator(tmp_path) as address:
            common = ["--peers-address", "tcp:127.0.0.1:0", "--coordinator", address]
            yield [*common, "--peer", "b"], [*common, "--peer", "a"]
        return
    a, b = (f"tcp:127.0.0.1:{free_port()}" for _ in range(2))
    tls = make_certificates(tmp_path) if request.param == "tls" else []
    yield ["--peers-address", a, "--peer", f"b={b}", *tls], ["--peers-address", b, "--peer", f"a={a}", *tls]


def keys_of(start: int, count: int) -> list[bytes]:
    return [(start + n).to_bytes(2, "big") * 16 for n in range(count)]


def until_got(store: Store, keys: list[bytes]) -> Any:
    """Asks again while blocks are on their way, as every client does."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        found = store.get(keys)
        if len(found) == len(keys) or time.monotonic() > end_s:
            return found
        time.sleep(0.02)


def test_a_block_put_into_one_node_is_got_through_the_other_and_a_dead_node_is_a_miss(
    words_of_two: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(os.urandom(32).hex())
    first, second = keys_of(1, 8), keys_of(100, 8)
    data = np.random.default_rng(5).integers(0, 256, (16, LAYOUT.block_bytes), dtype=np.uint8)
    with (
        node(tmp_path, "a", words_of_two[0]) as (a, process),
        node(tmp_path, "b", words_of_two[1]) as (b, _),
        Store.open(a, LAYOUT, timeout_s=PATIENCE_S) as into,
        Store.open(b, LAYOUT, timeout_s=PATIENCE_S) as through,
    ):
        assert into.put(first, data[:8]).stored == 8
        assert into.put(second, data[8:]).stored == 8
        assert np.array_equal(until_got(through, first), data[:8])
        stats = through.stats()
        assert stats["interlock_store_peers_promoted_blocks_total"] == 8
        assert stats["interlock_store_peers_known_blocks"] == 16, "b does not know what it is about to miss"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
        begun_s = time.monotonic()
        while through.stats()["interlock_store_peers_known_blocks"]:
            assert len(through.get(second, timeout_s=1.0)) == 0, "bytes came from a node that is dead"
            assert time.monotonic() - begun_s < PATIENCE_S, "b still believes in a node that is dead"
            time.sleep(0.02)
        assert len(through.get(second, timeout_s=1.0)) == 0
        assert np.array_equal(through.get(first, timeout_s=1.0), data[:8]), "what came before is b's own"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--peer", "b=tcp:10.0.0.6:7400"], "--peers-address"),
        (["--peers-address", "tcp:10.0.0.5:7400"], "token"),
        (["--peers-address", "10.0.0.5:7400"], "no address"),
        (["--peers-address", "unix:/p", "--peer", "b"], "coordinator"),
        (["--peers-address", "unix:/p", "--peer", "b="], "NAME=ADDRESS"),
        (["--peers-address", "unix:/p", "--peer", "store=unix:/q"], "own name"),
        (["--peers-address", "unix:/p", "--peer", "b=unix:/q", "--peer", "b=unix:/r"], "twice"),
        (["--peers-address", "unix:/p", "--peer", "b=unix:/q", "--coordinator", "unix:/c"], "one of them"),
        (["--peers-address", "unix:/p", "--peers-tls-key", "k"], "together"),
        (["--peers-address", "tcp:0.0.0.0:7400", "--peers-token-file", "TOKEN"], "could dial"),
        (["--peers-address", "tcp:10.0.0.5:0", "--peers-token-file", "TOKEN"], "port"),
        (
            [
                "--peers-address",
                "unix:/p",
                *(f"--peers-tls-{x}=/none" for x in ("certificate", "key", "authority")),
            ],
            "no file",
        ),
    ],
)
def test_peers_that_cannot_be_had_are_refused_in_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("x" * 32)
    words = [str(token) if word == "TOKEN" else word for word in words]
    status = main(["store", "run", "--address", f"unix:{tmp_path}/s", "--state-dir", f"{tmp_path}/d", *words])
    assert status == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "text", "sentence"), [(0o644, "x" * 32, "chmod 600"), (0o600, "short", "bytes")]
)
def test_a_token_that_others_read_or_could_guess_is_refused(
    mode: int, text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text(text)
    token.chmod(mode)
    words = ["--peers-address", "tcp:127.0.0.1:7400", "--peers-token-file", str(token)]
    status = main(["store", "run", "--address", f"unix:{tmp_path}/s", "--state-dir", f"{tmp_path}/d", *words])
    assert status == 1
    assert sentence in capsys.readouterr().err


def fleet(words: list[str], directory: Path, **more: Any) -> serve_checks.Asked:
    parsed = make_parser().parse_args(["serve", "a-model", *words])
    return serve_checks.Asked(
        model=directory,
        architecture="any",
        served_name="any",
        kinds=["transformers"],
        tensor_parallel=1,
        host="127.0.0.1",
        port=1,
        store_bytes=1 << 20,
        store_name=parsed.store_name,
        peers=store_peers.config_of_fleet(parsed),
        api_key=None,
        vllm_arguments=[],
        **more,
    )


def test_a_served_fleets_node_is_told_of_its_peers_and_its_secrets_stay_in_the_run_directory(
    tmp_path: Path,
) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("x" * 32)
    tls = [word.replace("--peers-tls", "--store-tls") for word in make_certificates(tmp_path)]
    words = [
        "--store-listen",
        "tcp:10.0.0.5:7400",
        "--store-peer",
        "b=tcp:10.0.0.6:7400",
        "--store-name",
        "a",
    ]
    asked = fleet([*words, "--store-token-file", str(token), *tls], tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    part = serve_plan.make_plan(asked, run, "sha256:x").store
    config = decode_config(part.config, StoreConfig)  # what the node's process reads
    assert config.name == "a"
    assert config.peers == asked.peers
    assert config.peers is not None
    assert (config.peers.address, config.peers.peers) == ("tcp:10.0.0.5:7400", {"b": "tcp:10.0.0.6:7400"})
    assert config.peers.token == b"x" * 32
    assert config.peers.tls is not None


def test_a_served_fleet_is_alone_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = decode_config(
        serve_plan.make_plan(fleet([], tmp_path), run, "sha256:x").store.config, StoreConfig
    )
    assert (config.name, config.peers) == ("store", None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--store-peer", "b=tcp:10.0.0.6:7400"], "--store-listen"),
        (["--store-listen", "tcp:10.0.0.5:7400", "--store-peer", "b=tcp:10.0.0.6:7400"], "token"),
        (["--store-listen", "unix:/p", "--store-peer", "b"], "where is b"),
        (["--store-listen", "unix:/p", "--store-peer", "store=unix:/q"], "own name"),
        (["--store-listen", "unix:/p", "--store-tls-key", "k"], "--store-tls-certificate"),
    ],
)
def test_a_served_fleets_peers_that_cannot_be_had_are_refused_in_a_sentence(
    words: list[str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(Usage, match=sentence):
        fleet(words, tmp_path)

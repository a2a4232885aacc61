"""What the connector's tests share: the folder of their helpers, a tiny model, a store node in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
if str(HERE) not in sys.path:  # helpers beside the tests; the ranks of vLLM find them by PYTHONPATH
    sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from interlock.engines.random_llama import TINY, write_llama

    return write_llama(tmp_path_factory.mktemp("model") / "tiny", TINY, seed=7)


@contextmanager
def environment(cache: Path) -> Iterator[None]:
    """vLLM in this process, on shared cores, without network."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CACHE_ROOT": str(cache),
            "VLLM_RPC_BASE_PATH": str(cache),  # its sockets, which it leaves behind
            "OMP_NUM_THREADS": "1",  # threads that wait for a core spin: two are slower on a busy machine
            "PYTHONPATH": str(HERE),
        }.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def reference(tiny_model: Path, vllm_cache: Path) -> list[Any]:
    """The undisturbed run of `connector_rig.PROMPTS`, without connector."""
    import connector_rig as rig

    with environment(vllm_cache), rig.engine(tiny_model) as plain:
        return plain.run(rig.PROMPTS)


@pytest.fixture(scope="module")
def vllm_environment(vllm_cache: Path) -> Iterator[None]:
    with environment(vllm_cache):
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import connector_rig as rig

    running = rig.Store(tmp_path_factory.mktemp("store"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")

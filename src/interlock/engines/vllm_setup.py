"""How vLLM is started: what it is told by its environment and by its arguments. vLLM is imported only when it is built."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from interlock.engines.base import EngineStartError
from interlock.engines.vllm_args import check_vllm_args

BLOCK_TOKENS = 32
"""The smallest block vLLM's CPU kernels like; the tail below one block is what a hit still has to compute."""
GIB = 1 << 30


class VllmConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that one vLLM engine is started with."""

    model: str
    model_id: str
    name: str
    store: str | None
    """Address of the store node; None: no shared cache."""
    state_dir: str
    scratch_dir: str
    """Where vLLM puts its sockets; ours to remove."""
    tensor_parallel: int = 1
    threads: int = 1
    """OpenMP threads of each rank: several engines share the machine's cores."""
    kv_bytes: int = GIB
    """KV memory of the engine, over all its ranks; `--kv-cache-memory-bytes` among `arguments` overrides it."""
    arguments: list[str] = []
    log: str | None = None
    """Where this process's output goes, to find the cause of a failed start."""


def prepare_environment(config: VllmConfig) -> None:
    """Before vLLM is imported. What the user has set of vLLM's own stays, where it cannot break the fleet."""
    forced = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_RPC_BASE_PATH": config.scratch_dir,
        "VLLM_HOST_IP": "127.0.0.1",
        # Pinning would give every engine the same cores; the kernel spreads unpinned threads better.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(config.threads),
        "VLLM_CPU_KVCACHE_SPACE": "",  # would override what we ask for
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ.update(forced)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def engine_arguments(config: VllmConfig) -> Any:
    """vLLM's `AsyncEngineArgs`: the user's, and ours over them. Raises `EngineStartError`."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    check_vllm_args(config.arguments)

    class Parser(FlexibleArgumentParser):  # type: ignore[misc, unused-ignore]
        def error(self, message: str) -> None:
            raise EngineStartError(f"vLLM does not accept the arguments after --: {message}")

    parser = AsyncEngineArgs.add_cli_args(Parser(allow_abbrev=False))
    chosen = parser.parse_args(list(config.arguments))
    ours: dict[str, Any] = {
        "model": config.model,
        "dtype": "float32" if _on_cpu() else "auto",
        "block_size": BLOCK_TOKENS,
        "tensor_parallel_size": config.tensor_parallel,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "distributed_executor_backend": "mp",
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    if _on_cpu():
        ours["enforce_eager"] = True
        if chosen.kv_cache_memory_bytes is None:
            ours["kv_cache_memory_bytes"] = config.kv_bytes // config.tensor_parallel
    if config.store is not None:
        ours["kv_transfer_config"] = KVTransferConfig(
            kv_connector="InterlockConnector",
            kv_connector_module_path="interlock.connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={
                "store": config.store,
                "engine": config.name,
                "model_id": config.model_id,
                "state_dir": config.state_dir,
                "weights_in_salt": True,
                "owner_pid": os.getpid(),
            },
        )
    for name, value in ours.items():
        setattr(chosen, name, value)
    return AsyncEngineArgs.from_cli_args(chosen)


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())

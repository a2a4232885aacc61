"""The arguments after `--`: which ones Interlock sets itself, and so refuses by name. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

OURS: dict[str, str] = {
    "model": "name it as MODEL",
    "model_tag": "name it as MODEL",
    "tokenizer": "text is made by the front, with the tokenizer beside the weights",
    "tokenizer_mode": "text is made by the front, with the tokenizer beside the weights",
    "skip_tokenizer_init": "the engine needs the model's end tokens",
    "served_model_name": "use --served-model-name before the --",
    "host": "use --host before the --",
    "port": "use --port before the --",
    "uds": "use --host and --port before the --",
    "api_key": "use --api-key before the --",
    "tensor_parallel_size": "use --tp before the --",
    "tp": "use --tp before the --",
    "pipeline_parallel_size": "a block's layers must be on one rank; use --tp before the --",
    "pp": "a block's layers must be on one rank; use --tp before the --",
    "data_parallel_size": "use --engines before the --",
    "dp": "use --engines before the --",
    "kv_transfer_config": "the shared KV cache is set up by Interlock",
    "block_size": "all engines that share a KV cache must cut it alike",
    "dtype": "all engines that share a KV cache must compute alike",
    "enable_prefix_caching": "the shared cache needs it; it is on",
    "no_enable_prefix_caching": "the shared cache needs it",
    "scheduling_policy": "requests carry priorities, so it is priority",
    "distributed_executor_backend": "an engine is one process tree on this machine",
    "async_scheduling": "not possible on CPU, and set where it is",
    "disable_log_stats": "the engine's load is read from its statistics",
    "enable_log_requests": "prompts do not belong into logs",
}
"""Argument → what to do instead."""


class RefusedArgument(Exception):  # noqa: N818 - says what is, as the others do
    """One of the arguments after `--` is not the user's to set; the message names it and says what to do."""


def check_vllm_args(arguments: Sequence[str]) -> None:
    """Raises `RefusedArgument`. Whether vLLM knows an argument at all is said by vLLM when the engine starts."""
    for argument in arguments:
        if not argument.startswith("-"):
            continue
        name = argument.lstrip("-").partition("=")[0].partition(".")[0].replace("-", "_")
        if name in OURS:
            raise RefusedArgument(f"{argument.partition('=')[0]} cannot be passed to vLLM: {OURS[name]}")

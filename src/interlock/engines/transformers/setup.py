"""How a model is loaded: from a local directory, by the library's own loader, with no code but the library's unless asked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from interlock.core.limits import LOCKSTEP_STEP_SECONDS
from interlock.engines.base import EngineStartError
from interlock.engines.transformers.scheduler import Limits

BLOCK_TOKENS = 32
GIB = 1 << 30
MODEL_TOKENS_DEFAULT = 1 << 17
"""For models that name no longest sequence (recurrent ones): a bound all the same."""
DTYPES = ("float32", "bfloat16", "float16")


class ExpertGroup(msgspec.Struct, frozen=True):
    """Which of the data-parallel ranks that share a model's experts this process is (`engines/lockstep`)."""

    ranks: int
    rank: int
    meeting: str
    """A file, absent before the first of them starts, by which they find each other."""


class TransformersConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that one engine of this kind is started with."""

    model: str
    """A local checkpoint directory."""
    model_id: str
    name: str
    store: str | None = None
    """Address of the store node; None: no shared cache."""
    state_dir: str
    scratch_dir: str
    tensor_parallel: int = 1
    data_parallel: int = 1
    """Ranks that each serve requests of their own and share the experts: they meet in every step (`engines/lockstep`)."""
    lockstep_step_seconds: float = LOCKSTEP_STEP_SECONDS
    """What a step of such a group has until a rank counts as frozen, beside its tokens' share: more for large models."""
    expert_group: ExpertGroup | None = None
    """Of one such rank's own process; nobody else sets it."""
    threads: int = 1
    """Of each rank: several engines share the machine's cores."""
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False
    kv_bytes: int = GIB
    """KV of running requests, over all ranks, padding counted; the copy at a change of the batch is not."""
    block_tokens: int = BLOCK_TOKENS
    step_tokens: int = 512
    """Tokens computed in one step: what a decoding request waits for a neighbour's prompt."""
    running_max: int = 64
    waiting_max: int = 1024
    max_model_tokens: int | None = None
    snapshots: str | None = None
    """A directory of this engine's own for snapshots at block boundaries (`boundaries`); for models that no store shares."""
    snapshot_bytes: int | None = None
    """Of that directory, what is kept and what is being written together; None: the limits of the snapshot store."""
    snapshot_blocks: int | None = None
    """Where boundary snapshots are taken, prompts' chunks end at least every so many blocks; a prompt resumes there."""
    collective_seconds: float = 60.0
    """A rank that answers no collective for so long is taken for dead, and with it the engine."""
    log: str | None = None


def prepare_environment(config: TransformersConfig) -> None:
    """Before torch is imported."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        TRANSFORMERS_NO_ADVISORY_WARNINGS="1",
        OMP_NUM_THREADS=str(config.threads),
    )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def load_model(config: TransformersConfig, path: str) -> Any:
    """The model at `path` ("": the configured one), in evaluation mode. Raises `EngineStartError`."""
    import torch
    import transformers

    torch.set_num_threads(config.threads)
    transformers.utils.logging.disable_progress_bar()
    if config.dtype not in DTYPES:
        raise EngineStartError(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    where = Path(path or config.model)
    if not where.is_dir():
        raise EngineStartError(
            f"{where} is no directory; name a local checkpoint (models are not downloaded)"
        )
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "local_files_only": True,
        "trust_remote_code": config.trust_remote_code,
    }
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            str(where), output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except Exception as error:
        raise EngineStartError(f"{where} cannot be loaded: {_first_line(error)}") from error
    _demand_whole(where, model, found)
    if config.tensor_parallel > 1:
        model = _shard(model, config.tensor_parallel)
    if config.expert_group is not None:
        from interlock.engines.lockstep.experts import spread_experts

        model = spread_experts(model, config.expert_group.ranks)
    if config.device != "cpu":
        model = model.to(config.device)
    return model.eval()


def _demand_whole(where: Path, model: Any, found: Mapping[str, Any]) -> None:
    """The library fills what a checkpoint lacks, or has in other shapes, with random numbers, and only warns.

    Raises `EngineStartError`, also for weights that are no numbers: every answer by them would be one token, again and again.
    """
    import torch

    missing = sorted(map(str, found["missing_keys"]))
    if missing:
        raise EngineStartError(
            f"{where} lacks {_named(missing)} of {type(model).__name__}; is the download, or what wrote it, complete?"
        )
    other = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in found["mismatched_keys"])
    if other:
        raise EngineStartError(
            f"{where} has {_named(other)} in other shapes than its config.json says for {type(model).__name__}"
        )
    broken = [
        name
        for name, tensor in model.named_parameters()
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise EngineStartError(
            f"{where} holds values that are no numbers (NaN, infinity) in {_named(broken)}"
        )


def _named(tensors: Sequence[str]) -> str:
    more = f" and {len(tensors) - 1} tensors more" if len(tensors) > 1 else ""
    return f"{tensors[0]}{more}"


def _shard(model: Any, ranks: int) -> Any:
    """This rank's part, by the library's own plan for the family. Raises `EngineStartError`.

    Sharded after loading and not while loading: the library's loader needs the accelerate package for that, and gives the
    same tensors. Each rank holds the whole model for a moment.
    """
    from transformers.distributed import DistributedConfig

    if not model.tp_plan:
        raise EngineStartError(
            f"the library has no tensor-parallel plan for {type(model).__name__}; serve it with --tp 1"
        )
    try:
        plan, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=ranks, tp_plan="auto"))
        return type(model).maybe_distribute_model(model, plan, mesh)
    except Exception as error:
        raise EngineStartError(
            f"{type(model).__name__} cannot be split over {ranks} ranks: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def longest_sequence(config: TransformersConfig, model: Any) -> int:
    """Prompt and answer together, in tokens."""
    own = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    named = config.max_model_tokens
    if own is None:
        return named or MODEL_TOKENS_DEFAULT
    return min(named, int(own)) if named else int(own)


def end_tokens(model: Any) -> list[int]:
    """The model's end-of-text token first, then whatever else its generation config ends at."""
    found: list[int] = []
    for config in (model.config.get_text_config(decoder=True), model.generation_config):
        named = getattr(config, "eos_token_id", None)
        for token in named if isinstance(named, list) else [named]:
            if isinstance(token, int) and token >= 0 and token not in found:
                found.append(token)
    return found


def scheduler_limits(config: TransformersConfig, model: Any, token_bytes: int, *, continues: bool) -> Limits:
    """`token_bytes`: of one token's KV on this rank."""
    model_tokens = longest_sequence(config, model)
    held = config.kv_bytes // (token_bytes * config.tensor_parallel) if token_bytes else 1 << 62
    return Limits(
        step_tokens=config.step_tokens,
        running_max=config.running_max,
        waiting_max=config.waiting_max,
        kv_tokens=held,
        model_tokens=model_tokens,
        block_tokens=config.block_tokens,
        continues=continues,
        stop_every_blocks=config.snapshot_blocks,
    )

"""What the connector is told, what it learns from vLLM's configuration, and what it refuses by name.

Refusals happen at construction, all at once, each saying what to do: an engine that cannot share its KV cache safely
must not start as if it could (hazards W6, §2 items 1 to 3).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from interlock.core.errors import InterlockError
from interlock.core.layouts import KVLayout, Shard, shard_of_rank
from interlock.core.limits import NAME_CHARS_MAX, RANKS_MAX, STORE_LOOKUP_SECONDS_MAX


class UnsupportedEngineError(InterlockError):
    """This engine's configuration is one that the connector does not serve; the message names all reasons."""


class ConnectorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kv_connector_extra_config`, validated."""

    store: Annotated[str, msgspec.Meta(min_length=1)]
    """Address of the machine's store node, `unix:/path`."""
    engine: Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    """Name of this engine; no two engines at one node share it."""
    state_dir: str | None = None
    """Where the incarnation and the weights' digests are remembered; default: `$XDG_STATE_HOME/interlock`."""
    model_id: str | None = None
    """Names the weights where their content cannot be told; whoever sets it vouches for it."""
    tenant: str = ""
    """Separates everything this engine shares from what other tenants' engines share."""
    lookup_seconds: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = STORE_LOOKUP_SECONDS_MAX
    """How long a scheduler's step may wait for the store; more finds more on a busy machine and delays every request."""
    owner_pid: int | None = None
    """All processes of the engine end when this one is gone."""

    @property
    def state(self) -> Path:
        if self.state_dir:
            return Path(self.state_dir)
        root = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        return Path(root) / "interlock"


class EngineShape(msgspec.Struct, frozen=True, kw_only=True):
    """What of vLLM's configuration decides keys, slots and shards."""

    layout: KVLayout
    ranks: int
    name: str
    """The engine's name at the store; data-parallel replicas get their own."""
    life: str
    """vLLM's id of this engine's life, the same in all its processes."""
    model: str
    revision: str | None
    variant: tuple[tuple[str, str], ...]
    """(name, value) of what changes KV besides the weights' files; goes into the salt."""

    def shard(self, rank: int) -> Shard:
        """What `rank` writes."""
        return shard_of_rank(rank, self.ranks, layers=self.layout.layers, heads=self.layout.heads)

    def heads_of(self, rank: int) -> tuple[int, int]:
        """Heads [start, stop) that `rank` holds and loads; replicas hold what only the lowest of them writes."""
        start = rank * self.layout.heads // self.ranks
        return start, start + max(1, self.layout.heads // self.ranks)


def parse_config(extra: Mapping[str, Any]) -> ConnectorConfig:
    """Raises `UnsupportedEngineError` with the path of what is wrong."""
    try:
        return msgspec.convert(dict(extra), ConnectorConfig)
    except msgspec.ValidationError as error:
        raise UnsupportedEngineError(
            f"kv_connector_extra_config of InterlockConnector is not usable: {error}",
            hint='it needs {"store": "unix:/path/store.sock", "engine": "name"}',
        ) from error


def shape_of(vllm_config: Any, kv_cache_config: Any, config: ConnectorConfig) -> EngineShape:
    """What this engine shares, from vLLM's own configuration objects. Raises `UnsupportedEngineError`."""
    faults = [*_configuration_faults(vllm_config), *_cache_faults(vllm_config, kv_cache_config)]
    if faults:
        raise UnsupportedEngineError(
            "InterlockConnector cannot share this engine's KV cache: " + "; ".join(faults),
            engine=config.engine,
        )
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    group = kv_cache_config.kv_cache_groups[0]
    spec = group.kv_cache_spec
    layout = KVLayout(
        layers=len(group.layer_names),
        heads=model.get_total_num_kv_heads(),
        block_tokens=spec.block_size,
        content=spec.head_size + spec.head_size_v,
        dtype=str(spec.dtype).removeprefix("torch."),
    )
    name = config.engine
    if parallel.data_parallel_size > 1:
        name += f".dp{parallel.data_parallel_rank}"
    return EngineShape(
        layout=layout,
        ranks=parallel.tensor_parallel_size,
        name=name,
        life=vllm_config.kv_transfer_config.engine_id,
        model=str(model.model),
        revision=model.revision,
        variant=_variant(vllm_config),
    )


def _configuration_faults(vllm_config: Any) -> list[str]:
    """Reasons that do not depend on the KV cache's layout."""
    parallel, transfer = vllm_config.parallel_config, vllm_config.kv_transfer_config
    tensor, faults = parallel.tensor_parallel_size, []
    if transfer.kv_load_failure_policy != "recompute":
        faults.append(
            f'kv_load_failure_policy is "{transfer.kv_load_failure_policy}", so a lost block would fail its request: '
            'set it to "recompute" in kv_transfer_config'
        )
    if transfer.kv_role != "kv_both":
        faults.append(f'kv_role is "{transfer.kv_role}": set it to "kv_both"')
    if parallel.pipeline_parallel_size > 1:
        faults.append(
            "pipeline parallelism is not supported: use tensor parallelism, pipeline_parallel_size=1"
        )
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        faults.append(
            "context parallelism is not supported (ranks hold slices of tokens): set both sizes to 1"
        )
    if tensor > RANKS_MAX:
        faults.append(f"tensor_parallel_size {tensor} is above {RANKS_MAX}")
    if vllm_config.speculative_config is not None:
        faults.append("speculative decoding is not supported (a draft model's KV has no key): leave it off")
    if vllm_config.model_config.use_mla:
        faults.append("latent attention (MLA) is not supported: start this model without the connector")
    if vllm_config.load_config.load_format == "dummy" and not _extra(transfer).get("model_id"):
        faults.append(
            'load_format "dummy" makes weights that no file names: pass model_id in the extra config'
        )
    return faults


def _extra(transfer: Any) -> Mapping[str, Any]:
    return transfer.kv_connector_extra_config or {}


def _cache_faults(vllm_config: Any, kv_cache_config: Any) -> list[str]:
    """Reasons that lie in the KV cache: its groups, its kind of attention, its dtype, its heads."""
    faults = []
    dtype = vllm_config.cache_config.cache_dtype
    if dtype not in ("auto", "float16", "bfloat16", "float32"):
        faults.append(f'kv_cache_dtype "{dtype}" needs scales that a block does not carry: use "auto"')
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups) or "none"
        return [
            *faults,
            f"the model has {len(groups)} KV cache groups ({kinds}), as hybrid and sliding-window models do; only models "
            "with full attention in every layer are supported: start this one without the connector",
        ]
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ != "FullAttentionSpec" or spec.sliding_window or spec.attention_chunk_size:
        faults.append(
            f"the model's attention is {type(spec).__name__}, not plain full attention: start it without the connector"
        )
        return faults
    if spec.num_head_slots is not None or spec.state_content_bytes is not None or spec.tokens_per_state != 1:
        faults.append(
            "the attention backend packs KV in a way the store has no layout for: choose another backend"
        )
    heads, ranks = (
        vllm_config.model_config.get_total_num_kv_heads(),
        vllm_config.parallel_config.tensor_parallel_size,
    )
    if heads % ranks and ranks % heads:
        faults.append(
            f"{heads} KV heads can be neither split over nor replicated on {ranks} ranks: change the size"
        )
    return faults


def _variant(vllm_config: Any) -> tuple[tuple[str, str], ...]:
    """Overrides (rope scaling, quantization, …) change KV without changing a file of the checkpoint."""
    model = vllm_config.model_config
    described = dict(model.hf_text_config.to_dict())
    for moving in ("_name_or_path", "transformers_version"):
        described.pop(moving, None)
    text = json.dumps(described, sort_keys=True, default=str)
    return (
        ("compute_dtype", str(model.dtype).removeprefix("torch.")),
        ("quantization", str(model.quantization or "")),
        ("configuration", hashlib.sha256(text.encode()).hexdigest()),
    )

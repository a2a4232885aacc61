"""What the connector is told, what it learns from vLLM's configuration, and what it refuses by name.

Refusals happen at construction, all at once, each saying what to do: an engine that cannot share its KV cache safely
must not start as if it could (hazards W6, §2 items 1 to 3).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from interlock.core.errors import InterlockError
from interlock.core.layouts import (
    EMPTY_SHARD,
    ITEM_BYTES,
    KVLayout,
    Shard,
    Span,
    cuts_of,
    grid_shards,
    heads_of_rank,
)
from interlock.core.limits import LAYER_GROUPS_MAX, NAME_CHARS_MAX, RANKS_MAX, STORE_LOOKUP_SECONDS_MAX
from interlock.store.keys import variant_of

PLAIN_DTYPES = frozenset({"auto", "float16", "bfloat16", "float32"})
SCALED_DTYPES = frozenset({"fp8", "fp8_e4m3", "fp8_e5m2"})
"""vLLM's kv_cache_dtype with one scale a layer for K and one for V; they stand behind each layer of a block."""
PACKED_DTYPES = frozenset({"fp8_per_token_head", "int8_per_token_head", "fp8_ds_mla"})
"""Those whose scales lie beside each token, in what the backend calls its content."""


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
    weights_in_salt: bool = False
    """Every request's cache_salt names the weights, as our front's does. Else dropped caches are taken for new weights, which get
    a name of their own."""
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
    """All of one replica: tensor-parallel times pipeline-parallel."""
    name: str
    """The engine's name at the store; data-parallel replicas get their own."""
    life: str
    """vLLM's id of this engine's life, the same in all its processes."""
    model: str
    revision: str | None
    variant: tuple[tuple[str, str], ...]
    """(name, value) of what changes KV besides the weights' files; goes into the salt."""
    stages: tuple[Span, ...] = ()
    """The layers of each pipeline stage; empty: one stage has them all."""

    @property
    def tensor_ranks(self) -> int:
        return self.ranks // max(1, len(self.stages))

    def shard(self, rank: int) -> Shard:
        """What `rank` writes. Ranks count as in vLLM: all tensor-parallel ones of the first stage, then of the second."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank {rank} is not one of {self.ranks}")
        stages = self.stages or ((0, self.layout.layers),)
        return grid_shards(stages, self.tensor_ranks, heads=self.layout.heads)[rank]

    def writes(self, rank: int) -> bool:
        return self.shard(rank) != EMPTY_SHARD

    def heads_of(self, rank: int) -> tuple[int, int]:
        """Heads [start, stop) that `rank` holds and loads; replicas hold what only the lowest of them writes."""
        return heads_of_rank(rank % self.tensor_ranks, self.tensor_ranks, self.layout.heads)

    def stage_of(self, rank: int) -> Span:
        """Layers [start, stop) that `rank` holds."""
        return self.stages[rank // self.tensor_ranks] if self.stages else (0, self.layout.layers)


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
    stages = _stages(vllm_config)
    dtype = str(spec.dtype).removeprefix("torch.")
    layout = KVLayout(
        layers=stages[-1][1] if stages else len(group.layer_names),
        heads=_heads(model),
        block_tokens=spec.block_size,
        content=_content_bytes(spec, dtype) // ITEM_BYTES[dtype],
        dtype=dtype,
        scales=2 if vllm_config.cache_config.cache_dtype in SCALED_DTYPES else 0,
        cuts=cuts_of(stages),
    )
    name = config.engine
    if parallel.data_parallel_size > 1:
        name += f".dp{parallel.data_parallel_rank}"
    return EngineShape(
        layout=layout,
        ranks=parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
        name=name,
        life=vllm_config.kv_transfer_config.engine_id,
        model=str(model.model),
        revision=model.revision,
        variant=_variant(vllm_config),
        stages=stages,
    )


def _heads(model: Any) -> int:
    """Latent attention keeps one vector a token for all heads."""
    return 1 if model.use_mla else int(model.get_total_num_kv_heads())


def _content_bytes(spec: Any, dtype: str) -> int:
    """Of one token, head and layer, as the backend packs them; scales per token lie in it."""
    packed = spec.state_content_bytes
    return int(packed if packed is not None else (spec.head_size + spec.head_size_v) * ITEM_BYTES[dtype])


def _stages(vllm_config: Any) -> tuple[Span, ...]:
    """The layers of each pipeline stage, by vLLM's own rule; empty for one stage."""
    count = vllm_config.parallel_config.pipeline_parallel_size
    if count == 1:
        return ()
    from vllm.distributed.utils import get_pp_indices

    layers = vllm_config.model_config.get_total_num_hidden_layers()
    return tuple(get_pp_indices(layers, stage, count) for stage in range(count))


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
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        faults.append(
            "context parallelism is not supported (ranks hold slices of tokens): set both sizes to 1"
        )
    ranks, stages = tensor * parallel.pipeline_parallel_size, parallel.pipeline_parallel_size
    if ranks > RANKS_MAX or stages > LAYER_GROUPS_MAX:
        faults.append(f"{ranks} ranks in {stages} stages are above {RANKS_MAX} and {LAYER_GROUPS_MAX}")
    if vllm_config.speculative_config is not None:
        faults.append("speculative decoding is not supported (a draft model's KV has no key): leave it off")
    if vllm_config.model_config.use_mla and not vllm_config.cache_config.enable_prefix_caching:
        # vLLM's plain CPU backend computes a prefill without looking at what came before it.
        faults.append(
            "latent attention (MLA) runs here without prefix caching, so this backend may not compute from loaded blocks: "
            "choose a backend that has it, or start this model without the connector"
        )
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
    if dtype not in PLAIN_DTYPES | SCALED_DTYPES | PACKED_DTYPES:
        faults.append(
            f'kv_cache_dtype "{dtype}" is one whose scales are not known to lie in a block: use "auto" or "fp8"'
        )
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups) or "none"
        return [
            *faults,
            f"the model has {len(groups)} KV cache groups ({kinds}), as hybrid and sliding-window models do; only models "
            "with full attention in every layer are supported: start this one without the connector",
        ]
    spec = groups[0].kv_cache_spec
    wanted = "MLAAttentionSpec" if vllm_config.model_config.use_mla else "FullAttentionSpec"
    if type(spec).__name__ != wanted or spec.sliding_window or spec.attention_chunk_size:
        faults.append(
            f"the model's attention is {type(spec).__name__}, not {wanted} without a window: only full attention in every "
            "layer is supported, start this model without the connector"
        )
        return faults
    item = str(spec.dtype).removeprefix("torch.")
    if dtype in PLAIN_DTYPES and ITEM_BYTES.get(item) == 1:
        faults.append(
            f'the checkpoint asks for a KV cache of {item} and kv_cache_dtype is "{dtype}", so which scales belong to it is '
            'not known: set kv_cache_dtype to "fp8"'
        )
    if (
        spec.num_head_slots is not None
        or spec.tokens_per_state != 1
        or item not in ITEM_BYTES
        or (spec.state_content_bytes is not None and dtype not in PACKED_DTYPES)
        or _content_bytes(spec, item) % ITEM_BYTES[item]
    ):
        faults.append(
            "the attention backend packs KV in a way the store has no layout for: choose another backend"
        )
    heads, ranks = _heads(vllm_config.model_config), vllm_config.parallel_config.tensor_parallel_size
    if heads % ranks and ranks % heads:
        faults.append(
            f"{heads} KV heads can be neither split over nor replicated on {ranks} ranks: change the size"
        )
    return faults


def _variant(vllm_config: Any) -> tuple[tuple[str, str], ...]:
    model = vllm_config.model_config
    variant = variant_of(
        model.hf_text_config.to_dict(),
        compute_dtype=str(model.dtype).removeprefix("torch."),
        quantization=str(model.quantization or ""),
    )
    dtype = vllm_config.cache_config.cache_dtype
    if dtype in PLAIN_DTYPES:
        return variant
    # Two formats are both bytes in vLLM's tensors, and "fp8" is one of them by the platform's choice.
    return (*variant, ("kv_cache_dtype", "fp8_e4m3" if dtype == "fp8" else dtype))

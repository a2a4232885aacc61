"""What the connector refuses at start-up, and how the processes of one engine agree on their life."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from interlock.connectors.vllm.config import UnsupportedEngineError, parse_config, shape_of
from interlock.connectors.vllm.life import engine_incarnation
from interlock.host.blocking import BlockingHost

EXTRA = {"store": "unix:/run/store.sock", "engine": "engine-0"}


class FullAttentionSpec(SimpleNamespace):
    """By vLLM's name: the connector asks for exactly this kind."""


class MLAAttentionSpec(SimpleNamespace):
    """Likewise, of latent attention."""


class SlidingWindowSpec(SimpleNamespace):
    pass


def spec(kind: type = FullAttentionSpec, **changes: Any) -> Any:
    fields = {
        "block_size": 32,
        "num_kv_heads": 4,
        "head_size": 64,
        "head_size_v": 64,
        "dtype": torch.float32,
        "sliding_window": None,
        "attention_chunk_size": None,
        "num_head_slots": None,
        "state_content_bytes": None,
        "tokens_per_state": 1,
    }
    return kind(**(fields | changes))


def vllm_config(**changes: Any) -> Any:
    """As much of VllmConfig as the connector reads; keys are `part.field`."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            data_parallel_size=1,
            data_parallel_rank=0,
        ),
        kv_transfer_config=SimpleNamespace(
            kv_load_failure_policy="recompute",
            kv_role="kv_both",
            kv_connector_extra_config=EXTRA,
            engine_id="a-life",
        ),
        model_config=SimpleNamespace(
            model="/models/m",
            revision=None,
            use_mla=False,
            dtype=torch.float32,
            quantization=None,
            hf_text_config=SimpleNamespace(to_dict=lambda: {"rope_theta": 1e4, "_name_or_path": "/models/m"}),
            get_total_num_kv_heads=lambda: 4,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", enable_prefix_caching=True),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
    )
    for path, value in changes.items():
        part, _, field = path.partition("__")
        setattr(getattr(config, part) if field else config, field or part, value)
    return config


def cache_config(*specs: Any) -> Any:
    return SimpleNamespace(
        kv_cache_groups=[
            SimpleNamespace(kv_cache_spec=one, layer_names=["layers.0", "layers.1"])
            for one in specs or (spec(),)
        ]
    )


def shaped(config: Any = None, cache: Any = None) -> Any:
    return shape_of(config or vllm_config(), cache or cache_config(), parse_config(EXTRA))


def test_an_ordinary_engine_is_described() -> None:
    found = shaped()
    assert (found.layout.layers, found.layout.heads, found.layout.block_tokens) == (2, 4, 32)
    assert (found.layout.content, found.layout.dtype, found.ranks) == (128, "float32", 1)
    assert (found.name, found.life) == ("engine-0", "a-life")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_transfer_config__kv_load_failure_policy": "fail"}, 'set it to "recompute"'),
        ({"kv_transfer_config__kv_role": "kv_producer"}, 'set it to "kv_both"'),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__tensor_parallel_size": 3}, "4 KV heads"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"cache_config__cache_dtype": "nvfp4"}, "scales"),
        ({"model_config__use_mla": True}, "FullAttentionSpec, not MLAAttentionSpec"),
        ({"load_config__load_format": "dummy"}, "model_id"),
    ],
)
def test_what_cannot_be_shared_safely_is_refused_by_name_with_what_to_do(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UnsupportedEngineError, match=says):
        shaped(vllm_config(**changes))


def test_ranks_of_a_pipeline_write_their_layers_and_the_keys_do_not_know_of_it() -> None:
    config = vllm_config(parallel_config__pipeline_parallel_size=2, parallel_config__tensor_parallel_size=2)
    config.model_config.get_total_num_hidden_layers = lambda: 5
    found = shaped(config)
    assert (found.ranks, found.tensor_ranks, found.stages) == (4, 2, ((0, 3), (3, 5)))
    assert (found.layout.layers, found.layout.cuts) == (5, (3,))
    assert [tuple(msgspec.structs.astuple(found.shard(rank))) for rank in range(4)] == [
        (0, 3, 0, 2),
        (0, 3, 2, 4),
        (3, 5, 0, 2),
        (3, 5, 2, 4),
    ]
    assert [(found.stage_of(rank), found.heads_of(rank)) for rank in (0, 3)] == [
        ((0, 3), (0, 2)),
        ((3, 5), (2, 4)),
    ]
    assert found.layout.digest() == msgspec.structs.replace(found.layout, cuts=()).digest()


def test_latent_attention_has_one_head_that_the_lowest_rank_of_each_stage_writes() -> None:
    config = vllm_config(model_config__use_mla=True, parallel_config__tensor_parallel_size=4)
    latent = spec(MLAAttentionSpec, num_kv_heads=1, head_size=576, head_size_v=0, dtype=torch.bfloat16)
    found = shaped(config, cache_config(latent))
    assert (found.layout.heads, found.layout.content, found.layout.scales) == (1, 576, 0)
    assert [found.writes(rank) for rank in range(4)] == [True, False, False, False]
    assert [found.heads_of(rank) for rank in range(4)] == [(0, 1)] * 4


def test_latent_attention_that_computes_without_context_is_refused() -> None:
    config = vllm_config(model_config__use_mla=True, cache_config__enable_prefix_caching=False)
    with pytest.raises(UnsupportedEngineError, match="without prefix caching"):
        shaped(config, cache_config(spec(MLAAttentionSpec)))


@pytest.mark.parametrize(
    ("dtype", "changes", "content", "scales"),
    [
        ("fp8", {}, 128, 2),
        ("fp8_e5m2", {}, 128, 2),
        ("fp8_per_token_head", {"state_content_bytes": 136}, 136, 0),
    ],
)
def test_quantised_kv_carries_its_scales_beside_or_inside_its_content(
    dtype: str, changes: dict[str, Any], content: int, scales: int
) -> None:
    quantised = spec(dtype=torch.uint8, **changes)
    found = shaped(vllm_config(cache_config__cache_dtype=dtype), cache_config(quantised))
    assert (found.layout.dtype, found.layout.content, found.layout.scales) == ("uint8", content, scales)
    assert found.variant != shaped().variant


def test_formats_of_quantised_kv_that_are_equal_in_bytes_have_other_keys() -> None:
    def variant(dtype: str) -> Any:
        return shaped(
            vllm_config(cache_config__cache_dtype=dtype), cache_config(spec(dtype=torch.uint8))
        ).variant

    assert variant("fp8") == variant("fp8_e4m3")
    assert variant("fp8") != variant("fp8_e5m2")


def test_a_checkpoint_that_quantises_by_itself_is_refused_until_the_dtype_is_said() -> None:
    with pytest.raises(UnsupportedEngineError, match='set kv_cache_dtype to "fp8"'):
        shaped(cache=cache_config(spec(dtype=torch.uint8)))


def test_models_of_several_cache_groups_or_other_attention_are_refused() -> None:
    with pytest.raises(UnsupportedEngineError, match="2 KV cache groups"):
        shaped(cache=cache_config(spec(), spec(SlidingWindowSpec)))
    with pytest.raises(UnsupportedEngineError, match="SlidingWindowSpec"):
        shaped(cache=cache_config(spec(SlidingWindowSpec)))
    with pytest.raises(UnsupportedEngineError, match="full attention"):
        shaped(cache=cache_config(spec(sliding_window=1024)))


def test_all_reasons_are_named_at_once() -> None:
    with pytest.raises(UnsupportedEngineError, match=r"recompute.*context parallelism"):
        shaped(
            vllm_config(
                kv_transfer_config__kv_load_failure_policy="fail",
                parallel_config__decode_context_parallel_size=2,
            )
        )


def test_overrides_change_the_variant_and_paths_do_not() -> None:
    def variant(**described: Any) -> Any:
        text = SimpleNamespace(to_dict=lambda: {"rope_theta": 1e4} | described)
        return shaped(vllm_config(model_config__hf_text_config=text)).variant

    assert variant() == variant(_name_or_path="/elsewhere", transformers_version="9")
    assert variant() != variant(rope_theta=5e5)


def test_data_parallel_replicas_have_names_of_their_own() -> None:
    config = vllm_config(parallel_config__data_parallel_size=2, parallel_config__data_parallel_rank=1)
    assert shaped(config).name == "engine-0.dp1"


@pytest.mark.parametrize(
    ("extra", "says"),
    [({"engine": "e"}, "store"), ({**EXTRA, "stor": 1}, "stor"), ({**EXTRA, "owner_pid": "x"}, "owner_pid")],
)
def test_a_wrong_extra_config_is_refused_with_its_path(extra: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=says):
        parse_config(extra)


def test_processes_of_one_life_agree_and_each_new_life_is_above_the_last(tmp_path: Path) -> None:
    host = BlockingHost()
    first = engine_incarnation(host, tmp_path, "a/../b", "life-1")
    assert engine_incarnation(host, tmp_path, "a/../b", "life-1") == first
    second = engine_incarnation(host, tmp_path, "a/../b", "life-2")
    assert second > first
    assert engine_incarnation(host, tmp_path, "other", "life-2") != second
    assert {path.parent for path in tmp_path.rglob("*.json")} == {tmp_path / "engines"}

"""Every cache of the installed library comes back as it was, or its class is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import cache_utils as library  # noqa: E402

from interlock.snapshots import caches  # noqa: E402
from interlock.snapshots.caches import UnknownCacheError, dump_cache, load_cache  # noqa: E402

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "conv_L_cache": 3},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
}


def tiny(family: str, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def fresh(model: Any) -> Any:
    return library.DynamicCache(config=model.config)


def forward(model: Any, cache: Any, tokens: list[int]) -> Any:
    name = "cache_params" if "cache_params" in model.forward.__code__.co_varnames else "past_key_values"
    with torch.no_grad():
        out = model(torch.tensor([tokens]), **{name: cache}, use_cache=True)
    return out.logits[0, -1]


def go_on(model: Any, cache: Any, token: int, count: int) -> list[int]:
    made = []
    for _ in range(count):
        token = int(forward(model, cache, [token]).argmax())
        made.append(token)
    return made


def copied(cache: Any) -> Any:
    """Through JSON and copies of the tensors, as a file would take it."""
    tensors, structure = dump_cache(cache)
    return load_cache(json.loads(json.dumps(structure)), {n: t.clone() for n, t in tensors.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_restored_cache_continues_with_the_same_tokens(family: str, dtype: Any) -> None:
    model = tiny(family, dtype)
    cache = fresh(model)
    prompt = [int(t) for t in torch.randint(2, VOCABULARY, (21,), generator=torch.Generator().manual_seed(3))]
    first = int(forward(model, cache, prompt).argmax())
    again = copied(cache)
    assert same(vars(cache), vars(again))
    expected = go_on(model, cache, first, 12)
    assert go_on(model, again, first, 12) == expected
    assert same(vars(cache), vars(again)), "the two went different ways in state that tokens do not show"


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if type(left).__module__.startswith("transformers."):
        return type(left) is type(right) and same(vars(left), vars(right))
    return bool(left == right)


def test_a_layer_of_one_dropped_counter_is_noticed() -> None:
    """The comparison above can fail."""
    model = tiny("gemma3_text")
    cache = fresh(model)
    forward(model, cache, list(range(2, 20)))
    again = copied(cache)
    again.layers[0].cumulative_length -= 1
    assert not same(vars(cache), vars(again))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.int8, torch.bfloat16])
def test_every_layer_class_keeps_dtype_lengths_and_counters(dtype: Any) -> None:
    keys = torch.arange(2 * 3 * 8).reshape(1, 2, 3, 8).to(dtype)
    for kind in (library.StaticLayer, library.StaticSlidingWindowLayer, library.StaticIndexedLayer):
        extra = {"sliding_window": 4} if kind is library.StaticSlidingWindowLayer else {}
        layer = kind(max_cache_len=16, **extra)
        layer.lazy_initialization(keys, keys)
        layer.keys[:, :, :3] = keys
        layer.cumulative_length.add_(3)
        cache = library.Cache(layers=[layer])
        assert same(vars(cache), vars(copied(cache)))
    indexed = library.DynamicIndexedLayer()
    indexed.keys, indexed.values, indexed.is_initialized = keys, keys, True
    indexed.update_indexer(torch.ones(1, 3, 4, dtype=torch.bfloat16))
    again = copied(library.Cache(layers=[indexed]))
    assert again.layers[0].indexer_keys.dtype is torch.bfloat16
    assert again.layers[0].keys is again.layers[0].values, "one tensor under two names stays one"


def test_an_encoder_decoder_cache_is_nested_and_comes_back() -> None:
    def one(length: int) -> Any:
        cache = library.DynamicCache()
        cache.update(torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4), 0)
        return cache

    cache = library.EncoderDecoderCache(one(3), one(7))
    again = copied(cache)
    assert same(vars(cache), vars(again))
    assert again.cross_attention_cache.get_seq_length() == 7
    assert again.is_updated == {0: True}


def test_an_unknown_class_is_refused_by_name() -> None:
    class OurOwnLayer(library.DynamicLayer):
        pass

    with pytest.raises(UnknownCacheError, match="OurOwnLayer"):
        dump_cache(library.Cache(layers=[OurOwnLayer()]))


def test_a_file_cannot_name_a_class_outside_the_tables() -> None:
    for word in ("os.system", "object", "Popen", "QuantizedLayer"):
        with pytest.raises(UnknownCacheError, match="no cache or layer"):
            load_cache({"object": word, "held": {}}, {})
    with pytest.raises(ValueError, match="no cache"):
        load_cache({"object": "DynamicLayer", "held": {}}, {})
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        load_cache({"import": "os"}, {})


def test_tensors_that_belong_nowhere_are_refused() -> None:
    tensors, structure = dump_cache(library.DynamicCache())
    with pytest.raises(ValueError, match="belong to no layer"):
        load_cache(structure, {**tensors, "more": torch.zeros(1)})


def test_the_tables_name_every_layer_class_of_the_installed_library() -> None:
    """Quantised layers are left out: their backends keep objects of their own, and none is installed here."""
    left_out = {"QuantizedLayer", "QuantoQuantizedLayer", "HQQQuantizedLayer", "CacheLayerMixin"}
    base = (library.CacheLayerMixin, library.LinearAttentionCacheLayerMixin)
    found = {
        name
        for name, kind in vars(library).items()
        if isinstance(kind, type) and issubclass(kind, base) and kind not in base
    }
    assert found - left_out == set(caches._LAYERS)

"""Llama checkpoints of random weights that are good instruments: each next token depends on the whole context.

Attention is peaked and weighs as much as the token itself, so a wrong or missing KV block changes what follows, at once.
(A usual initialisation repeats one token for ever, whatever the context, and would hide it.) Logits are spread enough that
float error decides no step. Drawn by NumPy's PCG64 alone: the same files on every machine.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import numpy as np


class LlamaShape(msgspec.Struct, frozen=True, kw_only=True):
    """What config.json says of it. `embedding_gain` is the token's own weight beside what attention adds."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    positions: int
    embedding_gain: float = 1.0

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


TINY = LlamaShape(vocabulary=512, hidden=256, layers=4, heads=4, kv_heads=4, inner=512, positions=2048)
"""For tests: 3 million weights, a forward in a millisecond."""


def write_llama(
    folder: Path, shape: LlamaShape, seed: int, *, end: int | None = None, never: Sequence[int] = ()
) -> Path:
    """Writes config.json and model.safetensors, no tokenizer; returns `folder`, which is made where it is missing.

    `end` is the end token; tokens in `never` have an output row of zeros, so that greedy decoding does not choose them.
    Raises `OSError` (full disk).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": shape.positions,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": end,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = draw_weights(shape, seed, never)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(folder)) from error
    return folder


def draw_weights(shape: LlamaShape, seed: int, never: Sequence[int] = ()) -> dict[str, np.ndarray[Any, Any]]:
    """By the names that the Hugging Face library gives them."""
    import numpy as np

    random = np.random.Generator(np.random.PCG64(seed))

    def normal(rows: int, columns: int, gain: float) -> np.ndarray[Any, Any]:
        """A matrix that maps a vector of unit mean square to one of mean square gain²."""
        drawn = random.standard_normal((rows, columns), dtype=np.float32)
        return drawn * np.float32(gain / columns**0.5)

    def ones() -> np.ndarray[Any, Any]:
        return np.ones(hidden, dtype=np.float32)

    hidden, inner, kv = shape.hidden, shape.inner, shape.head_size * shape.kv_heads
    weights = {
        "model.embed_tokens.weight": normal(shape.vocabulary, hidden, shape.embedding_gain * hidden**0.5),
        "model.norm.weight": ones(),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": ones(),
            prefix + "post_attention_layernorm.weight": ones(),
            # Scores get a standard deviation of 1.6² = 2.6: a query sees a handful of tokens, not an average of all.
            prefix + "self_attn.q_proj.weight": normal(hidden, hidden, 1.6),
            prefix + "self_attn.k_proj.weight": normal(kv, hidden, 1.6),
            prefix + "self_attn.v_proj.weight": normal(kv, hidden, 1.4),
            prefix + "self_attn.o_proj.weight": normal(hidden, hidden, 1.4),
            prefix + "mlp.gate_proj.weight": normal(inner, hidden, 1.0),
            prefix + "mlp.up_proj.weight": normal(inner, hidden, 1.0),
            prefix + "mlp.down_proj.weight": normal(hidden, inner, 1.0),
        }
    head = normal(shape.vocabulary, hidden, 2.5)
    head[list(never)] = 0.0
    weights["lm_head.weight"] = head
    return weights

"""A Llama of a few hundred thousand weights whose every token depends on the whole context, as engines/demo_model's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, POSITIONS = 512, 256, 4, 4, 4, 512, 2048


def build(folder: Path, seed: int = 7) -> Path:
    """Writes a checkpoint without tokenizer: prompts are token ids."""
    folder.mkdir(parents=True)
    random = np.random.Generator(np.random.PCG64(seed))

    def normal(rows: int, columns: int, gain: float) -> np.ndarray:
        return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(gain / columns**0.5)

    ones = np.ones(HIDDEN, dtype=np.float32)
    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN, HIDDEN**0.5),
        "model.norm.weight": ones,
        "lm_head.weight": normal(VOCABULARY, HIDDEN, 2.5),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": ones,
            prefix + "post_attention_layernorm.weight": ones,
            prefix + "self_attn.q_proj.weight": normal(HIDDEN, HIDDEN, 1.4),
            prefix + "self_attn.k_proj.weight": normal(HIDDEN, HIDDEN, 1.4),
            prefix + "self_attn.v_proj.weight": normal(HIDDEN, HIDDEN, 1.4),
            prefix + "self_attn.o_proj.weight": normal(HIDDEN, HIDDEN, 1.4),
            prefix + "mlp.gate_proj.weight": normal(INNER, HIDDEN, 1.0),
            prefix + "mlp.up_proj.weight": normal(INNER, HIDDEN, 1.0),
            prefix + "mlp.down_proj.weight": normal(HIDDEN, INNER, 1.0),
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": POSITIONS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder

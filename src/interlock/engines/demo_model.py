"""A small Llama checkpoint, built here from nothing but the standard library: what `interlock serve` serves by default.

It is no language model: its weights are random. They are drawn so that it is a good instrument. Attention is peaked and
weighs as much as the token itself, so each next token depends on the whole context: a wrong or missing KV block changes
what follows, at once. (A usual initialisation repeats one token for ever, whatever the context, and would hide it.)
Logits are spread enough that float error decides no step.

The tokenizer is trained on the standard library's sources. Tokens that are no whole text (half of a UTF-8 sequence,
control characters, special tokens) have an output row of zeros, so that greedy decoding yields valid text; this
includes the end token: the model ends when `max_tokens` says so.

Everything is a function of `VERSION` and of this Python's standard library, and is drawn by NumPy's PCG64 alone: the
same files on every machine with the same Python.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

VERSION = 1
"""Raise it whenever a byte of the result changes: caches are keyed by it."""

VOCABULARY = 8000
HIDDEN = 512
LAYERS = 6
HEADS = 8
KV_HEADS = 4
INNER = 1408
POSITIONS_MAX = 8192
SEED = 20260501

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = [END_OF_TEXT, TURN_START, TURN_END]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "__pycache__",
}


def cache_folder() -> Path:
    """Where built models are kept: `$XDG_CACHE_HOME/interlock/models`, else `~/.cache/interlock/models`."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "interlock" / "models"


def demo_model_path(cache: Path | None = None) -> Path:
    """Where the demo model stands, or will."""
    python = platform.python_version()
    return (cache or cache_folder()) / f"demo-{VERSION}-python-{python}"


def build_demo_model(cache: Path | None = None) -> Path:
    """The demo model's directory; builds it on the first call (some seconds), atomically and only once at a time.

    Raises `OSError` when the cache folder cannot be written.
    """
    target = demo_model_path(cache)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{target.name}.lock"):
        if target.is_dir():
            return target
        for leftover in target.parent.glob(f".{target.name}.building-*"):  # of builders that were killed
            shutil.rmtree(leftover)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.building-", dir=target.parent))
        try:
            _write_model(building)
            building.chmod(0o755)
            os.rename(building, target)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time; the kernel unlocks for a builder that dies, so the wait is as long as one build."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_model(folder: Path) -> None:
    from safetensors.numpy import save_file

    tokenizer = _train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "model_max_length": POSITIONS_MAX,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    end = SPECIALS.index(TURN_END)
    _write_json(folder / "generation_config.json", {"eos_token_id": end, "do_sample": False})
    _write_json(
        folder / "config.json",
        {
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
            "max_position_embeddings": POSITIONS_MAX,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": None,
            "eos_token_id": end,
        },
    )
    save_file(_draw_weights(tokenizer), folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _sources() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT.isdisjoint(parts) and not path.name.startswith("_sysconfigdata"):
            yield path.read_text(encoding="utf-8", errors="replace")


def _train_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sources(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(
            f"the standard library of this Python yields only {tokenizer.get_vocab_size()} tokens of {VOCABULARY}: "
            "is it installed without its sources? Name a checkpoint directory: interlock serve MODEL"
        )
    return tokenizer


def _is_text(token: str, tokenizer: Tokenizer) -> bool:
    text = tokenizer.decoder.decode([token])
    return "\N{REPLACEMENT CHARACTER}" not in text and all(c.isprintable() or c == "\n" for c in text)


def _draw_weights(tokenizer: Tokenizer) -> dict[str, np.ndarray[Any, Any]]:
    import numpy as np

    random = np.random.Generator(np.random.PCG64(SEED))

    def normal(rows: int, columns: int, gain: float) -> np.ndarray[Any, Any]:
        """A matrix that maps a vector of unit mean square to one of mean square gain²."""
        drawn = random.standard_normal((rows, columns), dtype=np.float32)
        return drawn * np.float32(gain / columns**0.5)

    def ones() -> np.ndarray[Any, Any]:
        return np.ones(HIDDEN, dtype=np.float32)

    kv = HIDDEN // HEADS * KV_HEADS
    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN, 0.5 * HIDDEN**0.5),
        "model.norm.weight": ones(),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": ones(),
            prefix + "post_attention_layernorm.weight": ones(),
            # Scores get a standard deviation of 1.6² = 2.6: a query sees a handful of tokens, not an average of all.
            prefix + "self_attn.q_proj.weight": normal(HIDDEN, HIDDEN, 1.6),
            prefix + "self_attn.k_proj.weight": normal(kv, HIDDEN, 1.6),
            prefix + "self_attn.v_proj.weight": normal(kv, HIDDEN, 1.4),
            prefix + "self_attn.o_proj.weight": normal(HIDDEN, HIDDEN, 1.4),
            prefix + "mlp.gate_proj.weight": normal(INNER, HIDDEN, 1.0),
            prefix + "mlp.up_proj.weight": normal(INNER, HIDDEN, 1.0),
            prefix + "mlp.down_proj.weight": normal(HIDDEN, INNER, 1.0),
        }
    head = normal(VOCABULARY, HIDDEN, 2.5)
    for token, row in tokenizer.get_vocab().items():
        if token in SPECIALS or not _is_text(token, tokenizer):
            head[row] = 0.0
    weights["lm_head.weight"] = head
    return weights

"""A small Llama checkpoint, built here from nothing but the standard library: what `interlock serve` serves by default.

It is no language model: its weights are random (`engines/random_llama`).

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

from interlock.engines.random_llama import LlamaShape, write_llama

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSION = 1
"""Raise it whenever a byte of the result changes: caches are keyed by it."""

SHAPE = LlamaShape(
    vocabulary=8000, hidden=512, layers=6, heads=8, kv_heads=4, inner=1408, positions=8192, embedding_gain=0.5
)
VOCABULARY = SHAPE.vocabulary
POSITIONS_MAX = SHAPE.positions
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
    tokenizer = _train_tokenizer()
    (folder / "tokenizer.json").write_text(
        tokenizer.to_str(pretty=True)
    )  # `save` has no OSError for a full disk
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
    textless = sorted(
        row
        for token, row in tokenizer.get_vocab().items()
        if token in SPECIALS or not _is_text(token, tokenizer)
    )
    write_llama(folder, SHAPE, SEED, end=end, never=textless)


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

"""A tiny model's text files, made in milliseconds: for tests that need a tokenizer but no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TRAINING_TEXT = [
    "An interlocking makes it impossible to set two conflicting routes, whatever order the levers are pulled in.",
    "def main() -> None:\n    print('hello, world')\n",
    "Grüße aus Zürich: über 10 Öfen, äußerst heiß. 日本語のテキスト 🚂🚃🚃",
]
SPECIALS = ["<|end|>", "<|begin|>", "<|user|>", "<|assistant|>", "<|system|>"]
END_ID = 0
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' ~ message['role'] ~ '|>' }}{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    """As GPT-2's and Llama 3's: every byte is a token, a character may be several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: pieces with ▁ for spaces, single bytes for what the pieces lack, a first space that is stripped."""
    pieces = [*SPECIALS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlorw,.!"]
    merges = [("▁", "h"), ("h", "e"), ("l", "l"), ("▁", "w"), ("o", "r")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)  # noqa: S106
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def write_text_files(
    folder: Path, *, tokenizer: Tokenizer | None = None, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """Fills `folder` as a checkpoint would, weights apart, and returns it."""
    (tokenizer or byte_level_tokenizer()).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "bos_token": {"__type": "AddedToken", "content": "<|begin|>", "special": True},
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    generation = {"eos_token_id": [END_ID], "temperature": 0.5, "top_k": 20}
    for name, content in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content))
    return folder

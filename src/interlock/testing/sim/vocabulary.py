"""Text for the simulated model: fifty thousand made-up words, some of which begin or end in the middle of a character."""

from __future__ import annotations

import functools

import msgspec

from interlock.testing.sim.tokens import TOKEN_IDS
from interlock.text.decoding import byte_alphabet
from interlock.text.files import TextFiles
from interlock.text.model import TextModel

SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
HALVES = (b"\xc3", b"\xa9")
"""Of é: where a word ends with the first and the next begins with the second, the two share a character."""


@functools.cache
def text_model() -> TextModel:
    """A byte-level vocabulary without merges: made once, it never changes."""
    letters = {byte: shown for shown, byte in byte_alphabet().items()}
    pieces = [*SPECIALS, *letters.values()]
    for number in range(len(pieces), TOKEN_IDS):
        word = f" {number:x}z".encode()
        if number % 7 == 0:
            word += HALVES[0]
        elif number % 7 == 1:
            word = HALVES[1] + word
        pieces.append("".join(letters[byte] for byte in word))
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": number, "content": content, "special": True, "normalized": False,
                "single_word": False, "lstrip": False, "rstrip": False,
            }
            for number, content in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {piece: number for number, piece in enumerate(pieces)}, "merges": []},
    }  # fmt: skip
    return TextModel(
        TextFiles(
            tokenizer_json=msgspec.json.encode(tokenizer),
            special_tokens={"eos_token": SPECIALS[0]},
            special_contents=frozenset(SPECIALS),
            chat_template=CHAT_TEMPLATE,
            eos_token_ids=frozenset(),
            sampling_defaults={},
            vocabulary_size=TOKEN_IDS,
        )
    )

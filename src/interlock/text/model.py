"""What a front knows of a model: its tokenizer, its chat template, its special and end tokens. Loaded without transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
from tokenizers import Tokenizer

from interlock.text.decoding import REPLACEMENT, ByteDecoder, Decoder, WindowDecoder, byte_alphabet
from interlock.text.errors import ModelFilesError, PromptError
from interlock.text.files import TextFiles, read_text_files
from interlock.text.template import ChatTemplate

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""One byte in vocabularies with byte fallback (SentencePiece)."""
CONTEXT_TOKENS = 8
"""Prompt tokens that a stream's decoder sees before the first new one: enough for any split character or stripped space."""


class TextModel:
    """Thread-safe: tokenising and rendering may run off the loop."""

    def __init__(self, files: TextFiles, *, now: Callable[[], datetime] = datetime.now) -> None:
        try:
            self._tokenizer = Tokenizer.from_buffer(files.tokenizer_json)
            decoder = msgspec.json.decode(files.tokenizer_json, type=dict[str, Any]).get("decoder")
        except Exception as error:
            raise ModelFilesError(f"tokenizer.json cannot be used: {error}") from error
        # A tokenizer.json may carry training's truncation and padding; a server must neither cut nor fill a prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._alphabet = byte_alphabet() if _is_byte_level(decoder) else None
        self._pieces: dict[int, bytes] = {}  # bounded by the vocabulary
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(
            token_id
            for token_id, token in added.items()
            if token.special or token.content in files.special_contents
        )
        """Ids that streams leave out of the text."""
        self.eos_token_ids: Collection[int] = files.eos_token_ids
        self.special_tokens: Mapping[str, str] = files.special_tokens
        self.sampling_defaults: Mapping[str, float] = files.sampling_defaults
        highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.vocabulary_size = max(files.vocabulary_size, highest + 1)
        """Ids that a prompt may hold lie below."""
        self._template = (
            ChatTemplate(files.chat_template, files.special_tokens, now) if files.chat_template else None
        )

    @classmethod
    def load(cls, model_dir: Path | str, *, now: Callable[[], datetime] = datetime.now) -> TextModel:
        """Reads the files once. Raises `ModelFilesError`. `now` is the local time that templates may ask for."""
        return cls(read_text_files(Path(model_dir)), now=now)

    @property
    def has_chat_template(self) -> bool:
        """Without one `apply_chat_template` raises `PromptError`."""
        return self._template is not None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special` as the tokenizer's own post-processor has it (BOS, …).

        Raises `PromptError` for text that is not Unicode (lone surrogates).
        """
        try:
            # encode() would hold the GIL: a megabyte stopped every stream of a front for a second.
            (encoded,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special)
            return list(encoded.ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(
                "the text holds lone surrogates (\\ud800 to \\udfff), which no text has"
            ) from error

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The prompt's text; it is encoded with `add_special=False`, for templates write special tokens themselves.

        Raises `PromptError` for what the template refuses, and where the model has none.
        """
        if self._template is None:
            raise PromptError("this model has no chat template", hint="use /v1/completions")
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of a whole sequence; an incomplete character in it is U+FFFD."""
        kept = [i for i in token_ids if not (skip_special and i in self.special_ids)]
        if self._alphabet is not None:
            return b"".join(map(self.token_bytes, kept)).decode(errors="replace")
        return self._text_of(kept)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token stands for, alone. b"" for an id that the vocabulary lacks."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._make_piece(token_id)
            if 0 <= token_id < self.vocabulary_size:
                self._pieces[token_id] = piece
        return piece

    def token_text(self, token_id: int) -> str:
        """How this token is shown alone; where it is part of a character, its bytes as OpenAI writes them: `bytes:\\xe2`."""
        piece = self.token_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def make_decoder(self, prompt: Sequence[int] = ()) -> Decoder:
        """A decoder for what follows `prompt`."""
        before = [i for i in prompt[-CONTEXT_TOKENS:] if i not in self.special_ids]
        if self._alphabet is not None:
            return ByteDecoder(self.token_bytes, before)
        return WindowDecoder(self._text_of, before)

    def _text_of(self, token_ids: Sequence[int]) -> str:
        known = [i for i in token_ids if 0 <= i < 2**32]
        return str(self._tokenizer.decode(known, skip_special_tokens=False))

    def _make_piece(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        if self._alphabet is not None:
            try:
                return bytes(self._alphabet[character] for character in token)
            except KeyError:
                return bytes(token.encode())  # an added token is text, not bytes in disguise
        if BYTE_TOKEN.fullmatch(token) and REPLACEMENT in self._text_of([token_id]):
            return bytes.fromhex(token[3:5])
        # Behind another token, so that a decoder that strips a text's first space leaves this one's.
        pair, single = self._text_of([token_id, token_id]), self._text_of([token_id])
        return pair[len(single) :].encode() if pair.startswith(single) else single.encode()


def _is_byte_level(decoder: Any) -> bool:
    """Also inside a sequence, where it is the only member."""
    while isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        members = decoder.get("decoders")
        decoder = members[0] if isinstance(members, list) and len(members) == 1 else None
    return isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"

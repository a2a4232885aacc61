"""From token ids to text, one id at a time, never splitting a character.

A character may take several tokens, so text is handed on only when it cannot change any more. For byte-level
vocabularies (GPT-2, Llama 3, Qwen, …) each token is some bytes and an incremental UTF-8 decoder is exact: it holds
back at most 3 bytes. Other decoders (SentencePiece with byte fallback, WordPiece, …) look at neighbouring tokens, so
there the text of a small window is compared before and after each token, as in tokenizers' DecodeStream, but without its
two defects: it never fails where text is not monotonic (vLLM #17448), and what is held back is bounded.

Both take ids one by one, so the result is a function of the id sequence, whatever the cut into messages.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PENDING_TOKENS_MAX = 16
"""A character has at most 4 bytes. Vocabularies whose tokens hold parts of two characters may stay pending longer; beyond
this the bytes are taken for what they are: invalid."""


class Decoder(Protocol):
    """Token ids of one answer to its text, one at a time; what it has given out it never takes back."""

    def push(self, token_id: int) -> str:
        """The text that this token settles; "" while a character is incomplete. Special tokens are not passed here."""
        ...


class ByteDecoder:
    """For byte-level vocabularies. `bytes_of(id)` are a token's bytes."""

    def __init__(self, bytes_of: Callable[[int], bytes], before: Sequence[int] = ()) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in before:
            self._utf8.decode(bytes_of(token_id))

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))


class WindowDecoder:
    """For all other decoders. `text_of(ids)` is the text of a run of tokens that stands alone."""

    def __init__(self, text_of: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._text_of = text_of
        self._window = list(before)
        self._settled = len(self._window)  # so many tokens of the window have been handed on
        self._prefix = text_of(self._window) if self._window else ""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._text_of(self._window)
        pending = len(self._window) - self._settled
        if text.endswith(REPLACEMENT) and pending < PENDING_TOKENS_MAX:
            return ""
        if text.startswith(self._prefix):
            new = text[len(self._prefix) :]
        else:
            new = self._text_of(self._window[self._settled :])
        # The tokens just settled stay as context of the next ones: some decoders strip a text's first space.
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        self._prefix = self._text_of(self._window)
        return new


def byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level vocabularies (GPT-2's bytes_to_unicode, reversed)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}

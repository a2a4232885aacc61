"""The text of one stream of token ids: incremental, UTF-8 safe, cut at stop strings.

This is the one place where a request's text is made. It sees ids one by one, in order, so the text is the same function of
the id sequence whatever the cut into messages, and a request that is continued on another engine cannot change its text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from interlock.text.model import TextModel
from interlock.text.stops import StopFinder


class TextStream:
    """`push` ids, get text. Ends by itself at a stop string (`stopped`), or by `finish`.

    `prompt` is context alone: its text is not repeated. Stop strings are looked for after `min_tokens` tokens (vLLM's rule).
    `end_ids` (end of text, stop token ids) end a generation and are no part of its text; being told apart by id, not by the
    end's message, they are none either where that message was lost with an engine.
    What is held back is shorter than the longest stop string, plus an incomplete character.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        end_ids: Collection[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._decoder = model.make_decoder(prompt)
        self._finder = StopFinder(stops, include_stop)
        self._skipped = model.special_ids if skip_special else frozenset()
        if not self._skipped.issuperset(end_ids):
            self._skipped = self._skipped.union(end_ids)
        self._min_tokens = min_tokens
        self.tokens = 0
        """Ids taken so far, up to the one that completed a stop string."""

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._finder.matched

    def push(self, token_ids: Sequence[int]) -> str:
        """New text. Ids behind the one that completes a stop string are not taken: compare `tokens`."""
        released = []
        for token_id in token_ids:
            if self._finder.matched is not None:
                break
            self.tokens += 1
            if token_id not in self._skipped:
                text = self._decoder.push(token_id)
                released.append(self._finder.feed(text, armed=self.tokens > self._min_tokens))
        return "".join(released)

    def finish(self) -> str:
        """No more ids come: what was held back for a stop string. An incomplete character is dropped, never U+FFFD."""
        return "" if self._finder.matched is not None else self._finder.finish()

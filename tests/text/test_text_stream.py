"""One id sequence, one text: whatever the cut into messages, whatever the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.text.decoding import PENDING_TOKENS_MAX
from interlock.text.model import TextModel
from interlock.text.stream import TextStream

TEXTS = st.text(alphabet="abhelo wrd,.!äß語🚂\n�", max_size=40)


def run(
    model: TextModel, pieces: Sequence[Sequence[int]], stops: Sequence[str] = (), **options: object
) -> tuple[str, str | None, int]:
    stream = TextStream(model, stops=stops, **options)  # type: ignore[arg-type]
    text = ""
    for piece in pieces:
        text += stream.push(piece)
        if stream.stopped is not None:
            break
    return text + stream.finish(), stream.stopped, stream.tokens


def cut(ids: list[int], at: set[int]) -> list[list[int]]:
    borders = [0, *sorted(border for border in at if 0 < border < len(ids)), len(ids)]
    return [ids[left:right] for left, right in pairwise(borders)]


@given(
    ids=st.lists(st.integers(0, 430), max_size=60),
    borders=st.sets(st.integers(1, 60)),
    stops=st.lists(st.text(alphabet="abelo �ä", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 10),
)
def test_any_partition_of_any_ids_gives_the_same_text_stop_and_count(
    model: TextModel, ids: list[int], borders: set[int], stops: list[str], include: bool, min_tokens: int
) -> None:
    options = {"include_stop": include, "min_tokens": min_tokens}
    whole = run(model, [ids], stops, **options)
    assert run(model, cut(ids, borders), stops, **options) == whole
    assert run(model, [[i] for i in ids], stops, **options) == whole


@given(text=TEXTS, borders=st.sets(st.integers(1, 120)))
def test_streamed_text_is_the_text_that_was_encoded(model: TextModel, text: str, borders: set[int]) -> None:
    ids = model.encode(text, add_special=False)
    # Byte fallback strips the first space of a text and knows no U+FFFD from a broken character at its very end.
    streamed = run(model, cut(ids, borders))[0]
    assert streamed.rstrip("�") == text.rstrip("�")


@given(text=TEXTS)
def test_no_piece_ever_shows_half_a_character(byte_level: TextModel, text: str) -> None:
    stream = TextStream(byte_level)
    for token_id in byte_level.encode(text, add_special=False):
        piece = stream.push([token_id])
        assert "�" not in piece or "�" in text


@given(text=TEXTS.filter(lambda t: "�" not in t), stop=st.text(alphabet="abelo ä語", min_size=1, max_size=5))
def test_a_stop_string_cuts_exactly_where_it_begins_in_the_whole_text(
    model: TextModel, text: str, stop: str
) -> None:
    ids = model.encode(text, add_special=False)
    got, stopped, _ = run(model, [[i] for i in ids], [stop])
    at = text.find(stop)
    assert (got, stopped) == ((text[:at], stop) if at >= 0 else (text, None))
    got, stopped, _ = run(model, [[i] for i in ids], [stop], include_stop=True)
    assert (got, stopped) == ((text[: at + len(stop)], stop) if at >= 0 else (text, None))


@given(
    text=TEXTS, stops=st.lists(st.text(alphabet="abelo wrd", min_size=1, max_size=8), min_size=1, max_size=4)
)
@settings(max_examples=50)
def test_what_is_held_back_is_shorter_than_the_longest_stop_string(
    byte_level: TextModel, text: str, stops: list[str]
) -> None:
    stream = TextStream(byte_level, stops=stops)
    for token_id in byte_level.encode(text, add_special=False):
        stream.push([token_id])
        assert stream._finder.held_chars < max(map(len, stops))


def test_the_first_stop_string_to_end_wins_then_the_first_listed(byte_level: TextModel) -> None:
    ids = byte_level.encode("abcdef", add_special=False)
    assert run(byte_level, [ids], ["bcde", "cd"])[:2] == ("ab", "cd")
    assert run(byte_level, [ids], ["cd", "bcd"])[:2] == ("ab", "cd")
    assert run(byte_level, [ids], ["bcd", "cd"])[:2] == ("a", "bcd")


def test_tokens_behind_the_one_that_completed_a_stop_string_are_not_taken(byte_level: TextModel) -> None:
    ids = [byte_level.encode(c, add_special=False)[0] for c in "abcdef"]
    assert run(byte_level, [ids], ["cd"]) == ("ab", "cd", 4)


def test_stop_strings_within_min_tokens_are_ordinary_text(byte_level: TextModel) -> None:
    ids = [byte_level.encode(c, add_special=False)[0] for c in "abab"]
    assert run(byte_level, [ids], ["ab"], min_tokens=2) == ("ab", "ab", 4)
    assert run(byte_level, [ids], ["ab"], min_tokens=1) == ("", "ab", 2)


def test_a_stop_string_that_was_ordinary_text_stays_so_when_min_tokens_are_over(
    byte_level: TextModel,
) -> None:
    ids = [byte_level.encode(c, add_special=False)[0] for c in "abcd"]
    assert run(byte_level, [[i] for i in ids], ["ab", "zzzzzz"], min_tokens=2)[:2] == ("abcd", None)


def test_broken_bytes_behind_a_character_do_not_repeat_it(byte_fallback: TextModel) -> None:
    ids = byte_fallback.encode("語", add_special=False)
    assert len(ids) > 3, "its bytes, one by one"
    text = run(
        byte_fallback, [[i] for i in [*ids, ids[-3], *byte_fallback.encode("hello", add_special=False)]]
    )[0]
    assert text == "語� hello", "only the broken byte is shown as broken"


def test_special_tokens_are_no_text_unless_asked_for(byte_level: TextModel) -> None:
    ids = [*byte_level.encode("hello", add_special=False), *byte_level.encode("<|end|>", add_special=False)]
    assert run(byte_level, [ids])[0] == "hello"
    assert run(byte_level, [ids], skip_special=False)[0] == "hello<|end|>"


def test_end_ids_are_no_text_wherever_the_end_was_announced(byte_level: TextModel) -> None:
    ids = byte_level.encode("hello, world", add_special=False)
    assert run(byte_level, [ids[:-1], ids[-1:]], end_ids=ids[-1:])[0] == byte_level.decode(ids[:-1])


def test_a_character_that_never_completes_is_dropped_at_the_end(byte_level: TextModel) -> None:
    ids = byte_level.encode("語", add_special=False)
    if len(ids) == 1:
        pytest.skip("the vocabulary learnt the whole character")
    assert run(byte_level, [ids[:-1]])[0] == ""


def test_a_character_split_between_prompt_and_completion_is_whole_in_the_completion(
    byte_level: TextModel,
) -> None:
    first, second = (i for i in range(400) if byte_level.token_bytes(i) in (b"\xc3", b"\xb1"))
    ids = {byte_level.token_bytes(i): i for i in (first, second)}
    stream = TextStream(byte_level, prompt=[ids[b"\xc3"]])
    assert stream.push([ids[b"\xb1"]]) == "ñ"


def test_the_space_before_the_first_word_is_kept_behind_a_prompt(byte_fallback: TextModel) -> None:
    prompt = byte_fallback.encode("hello", add_special=False)
    world = byte_fallback.encode("hello world", add_special=False)[len(prompt) :]
    assert TextStream(byte_fallback, prompt=prompt).push(world) == " world"


def test_endless_broken_bytes_are_given_up_on_and_cost_no_more_than_a_window(
    byte_fallback: TextModel,
) -> None:
    broken = next(i for i in range(400) if byte_fallback.token_bytes(i) == b"\xe8")
    stream = TextStream(byte_fallback)
    text = "".join(stream.push([broken]) for _ in range(100))
    assert len(text) >= 100 - PENDING_TOKENS_MAX
    assert len(stream._decoder._window) <= 2 * PENDING_TOKENS_MAX  # type: ignore[attr-defined]
    hello = byte_fallback.encode("hello", add_special=False)
    assert stream.push(hello).endswith("hello")


def test_ids_outside_the_vocabulary_are_no_text(model: TextModel) -> None:
    assert run(model, [[10**6, 2**40, -1]])[0] == ""

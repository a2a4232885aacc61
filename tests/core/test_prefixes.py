"""Keys stand for everything that a block depends on; the index finds the longest prefix."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.prefixes import KEY_BYTES, Block, KeySalt, PrefixIndex, chain_keys

SALT = KeySalt(model="m", dtype="float32", layout_digest=b"L" * 16)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def block(key: bytes, slot: int = 0) -> Block:
    return Block(key, b"", 0, slot, b"")


@given(TOKENS, st.integers(1, 5))
def test_only_full_blocks_have_keys_and_each_its_own(tokens: list[int], size: int) -> None:
    keys = chain_keys(tokens, size, SALT)
    assert len(keys) == len(tokens) // size
    assert len(set(keys)) == len(keys)
    assert all(len(key) == KEY_BYTES for key in keys)


@given(TOKENS, st.integers(1, 5), st.integers(0, 8))
def test_a_chain_continued_from_a_parent_equals_the_chain_made_at_once(
    tokens: list[int], size: int, blocks: int
) -> None:
    whole = chain_keys(tokens, size, SALT)
    head = chain_keys(tokens[: blocks * size], size, SALT)
    tail = chain_keys(tokens[len(head) * size :], size, SALT, parent=head[-1] if head else b"")
    assert head + tail == whole


@given(TOKENS, TOKENS)
def test_keys_agree_exactly_as_far_as_the_tokens_do(a: list[int], b: list[int]) -> None:
    keys = list(zip(chain_keys(a, 2, SALT), chain_keys(b, 2, SALT), strict=False))
    for index, (left, right) in enumerate(keys):
        assert (left == right) == (a[: 2 * index + 2] == b[: 2 * index + 2])


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"}, {"weights_version": "7"}, {"dtype": "bfloat16"}, {"layout_digest": b"M" * 16},
        {"lora": "a"}, {"tenant": "t"}, {"multimodal": ("image",)}, {"extra": (("a", "b"),)},
    ],
)  # fmt: skip
def test_every_part_of_the_salt_separates_keys(change: dict[str, object]) -> None:
    other = msgspec.structs.replace(SALT, **change)
    assert not set(chain_keys(range(64), 4, SALT)) & set(chain_keys(range(64), 4, other))


def test_every_field_of_the_salt_is_covered_by_the_test_above() -> None:
    assert set(KeySalt.__struct_fields__) == {
        "model", "weights_version", "dtype", "layout_digest", "lora", "tenant", "multimodal", "extra",
    }  # fmt: skip


TEXT = st.text(max_size=3)
SALTS = st.builds(
    KeySalt,
    model=TEXT,
    weights_version=TEXT,
    dtype=TEXT,
    layout_digest=st.binary(max_size=3),
    lora=TEXT,
    tenant=TEXT,
    multimodal=st.lists(TEXT, max_size=3).map(tuple),
    extra=st.lists(st.tuples(TEXT, TEXT), max_size=2).map(tuple),
)


@given(SALTS, SALTS)
def test_different_salts_have_different_digests(a: KeySalt, b: KeySalt) -> None:
    assert (a.digest() == b.digest()) == (a == b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"lora": "ab", "tenant": "c"}, {"lora": "a", "tenant": "bc"}),
        ({"multimodal": ("a", "b")}, {"multimodal": ("ab",)}),
        ({"multimodal": ("a",)}, {"extra": (("a", ""),)}),
        ({"multimodal": ("",)}, {"multimodal": ()}),
    ],
)
def test_moving_a_letter_from_field_to_field_changes_the_digest(
    a: dict[str, object], b: dict[str, object]
) -> None:
    assert msgspec.structs.replace(SALT, **a).digest() != msgspec.structs.replace(SALT, **b).digest()


def test_the_block_size_separates_keys_of_equal_bytes() -> None:
    assert chain_keys([1, 2], 1, SALT)[1:] != chain_keys([1, 2], 2, SALT)


def test_a_first_block_differs_from_the_same_tokens_after_a_parent() -> None:
    first = chain_keys([7, 7], 1, SALT)
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("tokens", "size", "parent"),
    [([1], 0, b""), ([-1], 1, b""), ([2**32], 1, b""), (["a"], 1, b""), ([1], 1, b"x")],
)
def test_impossible_tokens_sizes_and_parents_are_refused(tokens: list[int], size: int, parent: bytes) -> None:
    with pytest.raises(ValueError):
        chain_keys(tokens, size, SALT, parent=parent)


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "remove", "match"]), st.lists(st.integers(0, 9), min_size=1)),
        max_size=60,
    )
)
def test_the_index_answers_as_a_slow_model(steps: list[tuple[str, list[int]]]) -> None:
    index, model = PrefixIndex(), dict[bytes, Block]()
    for verb, numbers in steps:
        keys = [bytes([n]) * KEY_BYTES for n in numbers]
        first = keys[0]
        if verb == "add" and first in model:
            with pytest.raises(KeyError):
                index.add(block(first))
        elif verb == "add":
            model[first] = block(first, slot=len(model))
            index.add(model[first])
        elif verb == "remove" and first in model:
            assert index.remove(first) == model.pop(first)
        elif verb == "remove":
            with pytest.raises(KeyError):
                index.remove(first)
        else:
            slow = next((i for i, key in enumerate(keys) if key not in model), len(keys))
            assert index.longest_prefix(keys) == [model[key] for key in keys[:slow]]
        assert len(index) == len(model)
        assert {b.key for b in index} == set(model)
        assert all((key in index) == (key in model) and index.get(key) == model.get(key) for key in keys)


def test_a_salt_that_is_no_digest_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 5"):
        chain_keys([1, 2], 1, b"short")


def test_a_prefix_that_is_here_to_its_end_is_found_to_its_end() -> None:
    keys = [bytes([n]) * KEY_BYTES for n in range(3)]
    index = PrefixIndex()
    blocks = [block(key, slot) for slot, key in enumerate(keys)]
    for each in blocks:
        index.add(each)
    assert index.longest_prefix(keys) == blocks
    assert index.longest_prefix([*keys[:2], bytes(KEY_BYTES - 1) + b"x", keys[2]]) == blocks[:2]

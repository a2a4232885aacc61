"""Tokens for KV events: bounded, exact, forgotten with their tenant, and asked for only by a node that publishes them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.errors import ChannelFault
from interlock.store.changes import Change, ChangeKind
from interlock.store.kv_events import BlockStored, events_of
from interlock.store.told_tokens import ENTRY_BYTES, TokenBook, pack_tokens, unpack_tokens
from interlock.wire.store_messages import StartWrite


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=40))
def test_tokens_come_out_as_they_were_packed(ids: list[int]) -> None:
    assert unpack_tokens(pack_tokens(ids)) == ids


def test_what_is_no_token_is_refused() -> None:
    for wrong in (-1, 1 << 32):
        with pytest.raises(OverflowError):
            pack_tokens([wrong])


def test_beyond_its_bound_the_oldest_are_forgotten() -> None:
    book = TokenBook(3 * (ENTRY_BYTES + 8))
    for n in range(5):
        book.learn(bytes([n]), pack_tokens([n, n]))
    assert len(book) == 3
    assert book.bytes == 3 * (ENTRY_BYTES + 8)
    assert [bool(book.of(bytes([n]))) for n in range(5)] == [False, False, True, True, True]
    book.learn(bytes([2]), pack_tokens([7]))
    book.learn(bytes([3]), b"")
    assert (unpack_tokens(book.of(bytes([2]))), book.of(bytes([3])), len(book)) == ([7], b"", 2)
    assert book.bytes == 2 * ENTRY_BYTES + 8 + 4


def test_a_deleted_tenants_tokens_are_forgotten_and_nobody_elses() -> None:
    book = TokenBook()
    book.learn(b"a", pack_tokens([1]), "ann")
    book.learn(b"b", pack_tokens([2]), "bob")
    book.forget(lambda _, tenant: tenant == "ann")
    assert (book.of(b"a"), unpack_tokens(book.of(b"b"))) == (b"", [2])


def test_an_event_has_the_tokens_of_all_its_blocks_or_none() -> None:
    book = TokenBook()
    keys = [bytes([n]) * 32 for n in range(5)]
    for n in (0, 1, 3):
        book.learn(keys[n], pack_tokens([10 * n, 10 * n + 1]))
    changes = [
        Change(ChangeKind.STORED, key, parent, 2) for key, parent in zip(keys, [b"", *keys], strict=False)
    ]
    events = [event for event in events_of(changes, book) if isinstance(event, BlockStored)]
    assert [(event.block_hashes, event.token_ids) for event in events] == [
        (keys[:2], [0, 1, 10, 11]),
        (keys[2:3], []),
        (keys[3:4], [30, 31]),
        (keys[4:], []),
    ]
    assert all(not event.token_ids for event in events_of(changes) if isinstance(event, BlockStored))


def test_a_node_that_publishes_no_tokens_asks_for_none_and_keeps_none(rig: Any) -> None:
    rig.node()
    assert not rig.scheduler().wants_tokens


def test_a_publishing_node_asks_for_tokens_and_knows_those_of_what_it_granted(rig: Any, tools: Any) -> None:
    node = rig.node()
    book = TokenBook()

    def begin(inner: Any) -> None:
        inner._tokens = inner._desk.tokens = book

    node.look(begin)
    scheduler, rank = rig.scheduler(), rig.channel()
    rank.request(rig.attach(0, 1, "engine-0", 1, tools.LAYOUT), 5)
    assert scheduler.wants_tokens
    keys, parents = tools.make_keys(3)
    size = tools.LAYOUT.block_tokens
    told = [pack_tokens(range(n, n + size)) for n in range(3)]
    grant = scheduler.start_write("s", 1, keys, parents, tokens=told)
    assert len(grant.grants) == 3
    assert [book.of(key) for key in keys] == told
    channel = rig.channel()
    channel.request(rig.attach(None, 1, "engine-0", 1, tools.LAYOUT), 5)
    for wrong in (told[:1], [told[0], told[1], b"1234"[:3]]):
        with pytest.raises(ChannelFault, match="tokens are of every block or none"):
            channel.request(StartWrite("t", 1, keys, parents, tokens=wrong), 5)

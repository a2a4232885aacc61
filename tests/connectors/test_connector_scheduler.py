"""The scheduler's half against fabricated vLLM objects: what it asks, offers, loads, saves, burns and forgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from interlock.connectors.vllm.config import EngineShape
from interlock.connectors.vllm.keys import Salts
from interlock.connectors.vllm.metadata import RankNews, StepTasks
from interlock.connectors.vllm.scheduler import SchedulerSide
from interlock.core.layouts import KVLayout
from interlock.store.client import MatchResult, WriteGrant
from interlock.store.keys import KeyChain, ModelSalt
from interlock.store.told_tokens import unpack_tokens
from interlock.wire.locations import Location
from interlock.wire.store_messages import Grant

LAYOUT = KVLayout(layers=2, heads=2, block_tokens=4, content=8, dtype="float32")
SHAPE = EngineShape(layout=LAYOUT, ranks=1, name="e", life="l", model="m", revision=None, variant=())
SLAB = 77


class ScriptedStore:
    """Answers as it is told, and remembers what it was asked. `present` are the keys it holds; `away`: no answers."""

    def __init__(self) -> None:
        self.present: set[bytes] = set()
        self.away = False
        self.asked: list[list[bytes]] = []
        self.writes: list[list[bytes]] = []
        self.parents: list[bytes] = []
        self.withdrawn: list[tuple[bytes, int]] = []
        self.wants_tokens = False
        self.tokens: list[bytes] = []

    def match(self, keys: Sequence[bytes]) -> MatchResult | None:
        self.asked.append(list(keys))
        if self.away:
            return None
        locations = []
        for n, key in enumerate(keys):
            if key not in self.present:
                break
            locations.append(Location(100 + n, bytes(16)))
        return MatchResult(SLAB, locations)

    def start_write(
        self,
        session: str,
        attempt: int,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        *,
        tokens: Sequence[bytes] = (),
    ) -> WriteGrant | None:
        self.writes.append(list(keys))
        self.parents, self.tokens = list(parents), list(tokens)
        if self.away:
            return None
        missing = [i for i, key in enumerate(keys) if key not in self.present]
        self.present |= set(keys)
        return WriteGrant(session, attempt, 5, SLAB, [Grant(i, 200 + i) for i in missing])

    def withdraw(self, slab: int, keys: Sequence[bytes], slots: Sequence[int]) -> None:
        assert slab == SLAB
        self.withdrawn += zip(keys, slots, strict=True)
        self.present -= set(keys)

    def close(self) -> None: ...


def no_adapter(path: Path) -> str:
    raise AssertionError(path)


SALTS = Salts(ModelSalt(model="m", layout=LAYOUT), adapter_identity=no_adapter)


def request(name: str, tokens: Sequence[int], **changes: Any) -> SimpleNamespace:
    fields = {
        "request_id": name,
        "all_token_ids": list(tokens),
        "num_tokens": len(tokens),
        "num_computed_tokens": 0,
        "num_preemptions": 0,
        "prompt_token_ids": list(tokens),
        "prompt_embeds": None,
        "pooling_params": None,
        "resumable": False,
        "lora_request": None,
        "mm_features": [],
        "cache_salt": None,
        "skip_reading_prefix_cache": False,
    }
    return SimpleNamespace(**(fields | changes))


class Engine:
    """As much of vLLM's scheduler as decides what our half sees: block tables, and one step at a time."""

    def __init__(self, store: ScriptedStore) -> None:
        self.store = store
        self.side = SchedulerSide(SHAPE, SALTS, store)  # type: ignore[arg-type]
        self.tables: dict[str, list[int]] = {}
        self.requests: dict[str, SimpleNamespace] = {}

    def add(self, name: str, tokens: Sequence[int], **changes: Any) -> SimpleNamespace:
        new = self.requests[name] = request(name, tokens, **changes)
        self.tables[name] = [10 * (len(self.requests)) + n for n in range(len(tokens) // 4 + 1)]
        self.side.track(new)
        return new

    def step(self, **scheduled: int) -> StepTasks:
        state = SimpleNamespace(get_block_ids=lambda name: (self.tables[name],))
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            kv_connector_block_state=state,
        )
        tasks = self.side.step(output)
        for name, tokens in scheduled.items():
            self.requests[name].num_computed_tokens += tokens
        return tasks

    def sample(self, name: str, token: int = 3) -> None:
        self.requests[name].all_token_ids.append(token)
        self.requests[name].num_tokens += 1
        if self.requests[name].num_tokens % 4 == 1:
            self.tables[name].append(max(self.tables[name]) + 1)

    def load(self, name: str, computed: int = 0) -> StepTasks:
        """Asks, allocates what is offered, and takes the step that carries the load."""
        tokens = self.side.matched_tokens(self.requests[name], computed)
        self.side.allocated(self.requests[name], self.tables[name], tokens)
        return self.step()


@pytest.fixture
def store() -> ScriptedStore:
    return ScriptedStore()


@pytest.fixture
def engine(store: ScriptedStore) -> Engine:
    return Engine(store)


def keys_of(tokens: Sequence[int], salt: str | None = None) -> list[bytes]:
    digest = SALTS.of(request("r", tokens, cache_salt=salt))
    assert digest is not None
    return list(KeyChain(digest, 4).upto(len(tokens) // 4, tokens))


PROMPT = list(range(100, 114))  # three full blocks and two tokens


def test_a_waiting_request_is_looked_up_once_however_often_vllm_asks(
    engine: Engine, store: ScriptedStore
) -> None:
    store.present |= set(keys_of(PROMPT)[:2])
    asked = engine.add("r", PROMPT)
    assert [engine.side.matched_tokens(asked, 0) for _ in range(30)] == [8] * 30
    assert len(store.asked) == 1
    assert engine.side.matched_tokens(asked, 4) == 4, (
        "a growing local hit shrinks the offer, without a question"
    )
    assert len(store.asked) == 1


def test_an_unanswered_look_up_is_a_miss_and_is_not_repeated(engine: Engine, store: ScriptedStore) -> None:
    store.away = True
    asked = engine.add("r", PROMPT)
    assert [engine.side.matched_tokens(asked, 0) for _ in range(5)] == [0] * 5
    assert len(store.asked) == 1
    assert engine.side.counts["lookup_unanswered"] == 1


def test_at_least_one_token_is_left_to_compute(engine: Engine, store: ScriptedStore) -> None:
    whole = list(range(8))
    store.present |= set(keys_of(whole))
    assert engine.side.matched_tokens(engine.add("r", whole), 0) == 4


def test_a_load_names_blocks_slots_and_sums_after_the_local_hit(engine: Engine, store: ScriptedStore) -> None:
    keys = keys_of(PROMPT)
    store.present |= set(keys)
    engine.add("r", PROMPT)
    (task,) = engine.load("r", computed=4).loads
    assert (task.request, task.keys, task.block_ids) == ("r", keys[1:3], engine.tables["r"][1:3])
    assert [location.slot for location in task.source.locations] == [100, 101]
    assert engine.side.loading
    assert engine.step().loads == [], "a load is handed to the ranks once"
    engine.side.heard(["r"], set(), None)
    assert not engine.side.loading
    assert engine.side.counts["loaded_blocks"] == 2


def test_the_second_call_without_external_tokens_begins_no_load(engine: Engine, store: ScriptedStore) -> None:
    store.present |= set(keys_of(PROMPT))
    engine.add("r", PROMPT)
    engine.load("r")
    engine.side.heard(["r"], set(), None)
    engine.side.allocated(engine.requests["r"], engine.tables["r"], 0)
    assert engine.step(r=2).loads == []


def test_a_failed_block_is_burned_for_the_request_and_withdrawn_when_its_bytes_were_wrong(
    engine: Engine, store: ScriptedStore
) -> None:
    keys = keys_of(PROMPT)
    store.present |= set(keys)
    asked = engine.add("r", PROMPT)
    (task,) = engine.load("r").loads
    # Rank 0 fails block 2 in time's name, rank 1 finds block 1 corrupt a step later: the union counts.
    engine.side.heard([], {task.block_ids[2]}, None)
    engine.side.heard(["r"], {task.block_ids[1]}, RankNews({(task.attempt, 1)}, Counter()))
    assert store.withdrawn == [(keys[1], 101)]
    store.present |= set(keys)  # somebody saved it again
    assert engine.side.matched_tokens(asked, 4) == 0
    asked.num_preemptions += 1
    assert engine.side.matched_tokens(asked, 0) == 4, "blocks before the burned one stay usable"
    assert engine.step(r=14).saves == [], "a request whose load failed saves nothing"
    other = engine.add("s", PROMPT)
    assert engine.side.matched_tokens(other, 0) == 12, "the burn is the request's, not the block's"


def test_a_load_of_an_aborted_request_is_watched_to_its_release(engine: Engine, store: ScriptedStore) -> None:
    store.present |= set(keys_of(PROMPT))
    engine.add("r", PROMPT)
    (task,) = engine.load("r").loads
    engine.side.forget("r")
    assert engine.side.loading
    engine.side.heard(["r"], set(task.block_ids), RankNews({(task.attempt, 0)}, Counter()))
    assert not engine.side.loading
    assert len(store.withdrawn) == 1


def test_only_blocks_full_of_known_and_computed_tokens_are_saved(
    engine: Engine, store: ScriptedStore
) -> None:
    keys = keys_of(PROMPT)
    engine.add("r", PROMPT)
    (first,) = engine.step(r=7).saves  # a chunk that ends inside the second block
    assert (first.keys, first.block_ids) == (keys[:1], engine.tables["r"][:1])
    (second,) = engine.step(r=7).saves
    assert (second.keys, second.block_ids) == (keys[1:3], engine.tables["r"][1:3])
    assert store.parents == keys[:2]
    assert second.grant.slab == SLAB
    engine.sample("r")
    assert engine.step(r=1).saves == []
    # Asynchronous scheduling computes the token after this one before it is known: its block is not full of known tokens.
    engine.requests["r"].num_computed_tokens += 1
    assert engine.step(r=1).saves == []
    engine.sample("r")
    (third,) = engine.step(r=1).saves
    assert third.keys == keys_of([*PROMPT, 3, 3])[3:]


def test_what_the_look_up_found_is_not_offered_for_saving(engine: Engine, store: ScriptedStore) -> None:
    store.present |= set(keys_of(PROMPT)[:2])
    engine.add("r", PROMPT)
    engine.load("r")
    engine.side.heard(["r"], set(), None)
    engine.requests["r"].num_computed_tokens = 8
    engine.step(r=6)
    assert store.writes == [keys_of(PROMPT)[2:3]]


def test_a_refused_save_is_tried_again_with_the_next_full_block(engine: Engine, store: ScriptedStore) -> None:
    engine.add("r", PROMPT)
    store.away = True
    assert engine.step(r=14).saves == []
    engine.sample("r")
    store.away = False
    assert engine.step(r=1).saves == []
    assert len(store.writes) == 1, "no question a step: nothing new became full"
    engine.sample("r")
    (task,) = engine.step(r=1).saves
    assert task.keys == keys_of([*PROMPT, 3, 3])


def test_two_requests_that_complete_one_prefix_in_one_step_save_it_once(
    engine: Engine, store: ScriptedStore
) -> None:
    engine.add("a", PROMPT)
    engine.add("b", PROMPT)
    (task,) = engine.step(a=14, b=14).saves
    assert task.keys == keys_of(PROMPT)
    assert task.block_ids == engine.tables["a"][:3]


def test_the_tokens_of_each_block_are_told_to_a_store_that_publishes_them_and_to_no_other(
    engine: Engine, store: ScriptedStore
) -> None:
    engine.add("a", PROMPT)
    engine.step(a=14)
    assert store.tokens == []
    store.wants_tokens = True
    other = [9, *PROMPT[1:]]
    engine.add("b", other)
    engine.add("c", other)
    (task,) = engine.step(b=14, c=14).saves
    assert [unpack_tokens(each) for each in store.tokens] == [
        other[at : at + LAYOUT.block_tokens] for at in range(0, len(other), LAYOUT.block_tokens)
    ][: len(task.keys)]


def test_after_reset_cache_live_requests_neither_read_nor_save_and_new_ones_do_under_another_name(
    engine: Engine, store: ScriptedStore
) -> None:
    store.present |= set(keys_of(PROMPT))
    old = engine.add("old", PROMPT)
    engine.side.forget_lookups()
    assert engine.side.matched_tokens(old, 0) == 0
    new = engine.add("new", PROMPT)
    assert engine.side.matched_tokens(new, 0) == 0, "what is there was made by weights that may be no more"
    store.present.clear()
    assert engine.step(old=14).saves == []
    (saved,) = engine.step(new=14).saves
    assert not set(saved.keys) & set(keys_of(PROMPT))
    store.present |= set(saved.keys)
    assert engine.side.matched_tokens(engine.add("third", PROMPT), 0) > 0, "its own are hit"
    engine.side.forget_lookups()
    assert engine.side.matched_tokens(engine.add("fourth", PROMPT), 0) == 0, "until they change again"


def test_dropped_caches_say_nothing_where_every_request_names_its_weights(store: ScriptedStore) -> None:
    side = SchedulerSide(SHAPE, SALTS, store, weights_in_salt=True)  # type: ignore[arg-type]
    store.present |= set(keys_of(PROMPT))
    side.forget_lookups()
    later = request("later", PROMPT)
    side.track(later)
    assert side.matched_tokens(later, 0) > 0


def test_salts_keep_tenants_versions_adapters_images_and_models_apart(tmp_path: Path) -> None:
    def salted(salts: Salts = SALTS, **changes: Any) -> bytes | None:
        return salts.of(request("r", PROMPT, **changes))

    image = SimpleNamespace(identifier="i", mm_position=SimpleNamespace(offset=3, length=2))
    moved = SimpleNamespace(identifier="i", mm_position=SimpleNamespace(offset=4, length=2))
    adapter = SimpleNamespace(lora_path=str(tmp_path))
    told = Salts(ModelSalt(model="m", layout=LAYOUT), adapter_identity=lambda path: "sha256:1")
    other_model = Salts(ModelSalt(model="n", layout=LAYOUT), adapter_identity=no_adapter)
    digests = [
        salted(),
        salted(cache_salt="a|1"),
        salted(cache_salt="a|2"),
        salted(mm_features=[image]),
        salted(mm_features=[moved]),
        salted(told, lora_request=adapter),
        salted(other_model),
    ]
    assert None not in digests
    assert len(set(digests)) == len(digests)


def test_what_has_no_exact_name_is_neither_read_nor_saved(engine: Engine, store: ScriptedStore) -> None:
    nameless = SimpleNamespace(lora_path="/no/such/adapter")
    for n, changes in enumerate(
        [
            {"prompt_embeds": object()},
            {"prompt_token_ids": None},
            {"lora_request": nameless},
            {"resumable": True},
            {"pooling_params": object()},
        ]
    ):
        asked = engine.add(f"r{n}", PROMPT, **changes)
        assert engine.side.matched_tokens(asked, 0) == 0
        engine.side.allocated(asked, engine.tables[f"r{n}"], 0)
        assert engine.step(**{f"r{n}": 14}).saves == []
    assert store.asked == store.writes == []


# --- blocks on their way from the store's disk -------------------------------------------------------------------


class Steps:
    """A clock that moves when it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr("interlock.connectors.vllm.scheduler.monotonic_s", lambda: self.now_s)


class DiskStore(ScriptedStore):
    """Some blocks are in RAM, `coming` more are on their way."""

    coming = 0

    def match(self, keys: Sequence[bytes]) -> MatchResult | None:
        found = super().match(keys)
        return found and MatchResult(found.slab, found.locations, self.coming)


def test_a_request_waits_for_blocks_that_come_from_disk_and_gets_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, store = Steps(monkeypatch), DiskStore()
    side = SchedulerSide(SHAPE, SALTS, store)  # type: ignore[arg-type]
    asking = request("r", range(17))
    side.track(asking)
    keys = KeyChain(SALTS.of(asking), 4).upto(4, range(17))
    store.present, store.coming = set(keys[:1]), 3
    assert side.matched_tokens(asking, 0) is None
    assert side.matched_tokens(asking, 0) is None, "asked again in the same moment"
    assert len(store.asked) == 1
    clock.now_s += 0.01
    store.present, store.coming = set(keys), 0
    assert side.matched_tokens(asking, 0) == 16
    assert side.matched_tokens(asking, 0) == 16
    assert len(store.asked) == 2


def test_a_request_waits_for_a_disk_no_longer_than_its_bound_in_all_its_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hazards F7: "ask me later" without end starves the request."""
    clock, store = Steps(monkeypatch), DiskStore()
    side = SchedulerSide(SHAPE, SALTS, store)  # type: ignore[arg-type]
    asking = request("r", range(17))
    side.track(asking)
    keys = KeyChain(SALTS.of(asking), 4).upto(4, range(17))
    store.present, store.coming = set(keys[:2]), 2
    answers = []
    for _ in range(300):
        answers.append(side.matched_tokens(asking, 0))
        clock.now_s += 0.01
    assert answers.index(8) <= 101, "what is in RAM is taken when the bound has passed"
    assert set(answers[answers.index(8) :]) == {8}
    asking.num_preemptions += 1
    assert side.matched_tokens(asking, 0) == 8, "it does not begin to wait once more"


def test_a_request_that_says_no_store_reads_and_saves_nothing(engine: Engine, store: ScriptedStore) -> None:
    store.present |= set(keys_of(PROMPT)[:1])
    quiet = engine.add("quiet", PROMPT, kv_transfer_params={"no_store": True})
    assert engine.side.matched_tokens(quiet, 0) == 4
    assert engine.step(quiet=14).saves == []
    engine.add("loud", PROMPT)
    assert engine.step(loud=14).saves != []

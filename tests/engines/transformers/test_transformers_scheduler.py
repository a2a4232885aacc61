"""The scheduler by itself: chunks, fairness, memory, and books that agree whatever is asked in whatever order."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import work

from interlock.engines.base import RequestRejected
from interlock.engines.transformers.sampling import Sampler
from interlock.engines.transformers.scheduler import Limits, Request, Scheduler

BLOCK = 8


def scheduler(**limits: Any) -> Scheduler:
    chosen = {
        "step_tokens": 20, "running_max": 4, "waiting_max": 50, "kv_tokens": 400, "model_tokens": 200,
        "block_tokens": BLOCK, "continues": True, **limits,
    }  # fmt: skip
    return Scheduler(Limits(**chosen), None)


def request(key: str, tokens: int, order: int = 0, priority: int = 0, answer: int = 5) -> Request:
    made = work(key, [1] * tokens, max_tokens=answer)
    made = msgspec.structs.replace(made, priority=priority)
    return Request(made, Sampler(made.sampling, made.prompt, []), order)


def run_step(made: Scheduler) -> Any:
    made.admit(None)
    step = made.plan()
    if step is not None:
        answers = [c.key for c in step.chunks if c.answer] + [key for key, _ in step.decode]
        made.advance(step, dict.fromkeys(answers, (7, None)))
    made.check_integrity()
    return step


def test_chunks_end_on_block_boundaries_or_with_the_prompt() -> None:
    made = scheduler()
    made.add(request("a", 45))
    chunks = [(c.start, len(c.tokens), c.answer) for _ in range(3) for c in run_step(made).chunks]
    assert chunks == [(0, 16, False), (16, 16, False), (32, 13, True)]


def test_a_long_prompt_moves_on_by_a_block_a_step_beside_any_number_that_decode() -> None:
    made = scheduler(step_tokens=3)
    for n in range(3):
        made.add(request(str(n), 1, order=n, answer=50))
    run_step(made)
    run_step(made)
    run_step(made)
    made.add(request("long", 30, order=9))
    steps = [run_step(made) for _ in range(4)]
    assert [sum(len(c.tokens) for c in s.chunks) for s in steps] == [8, 8, 8, 6]
    assert all(len(s.decode) == 3 for s in steps)


def test_a_model_that_cannot_continue_gets_its_prompt_whole() -> None:
    made = scheduler(continues=False)
    made.add(request("a", 90))
    assert [len(c.tokens) for c in run_step(made).chunks] == [90]


def test_lower_priority_numbers_are_begun_first_and_equals_in_the_order_they_came() -> None:
    made = scheduler(running_max=1)
    for order, (key, priority) in enumerate([("x", 5), ("y", 1), ("z", 5)]):
        made.add(request(key, 3, order, priority, answer=1))
    begun = [run_step(made).chunks[0].key for _ in range(3)]
    assert begun == ["y", "x", "z"]


def test_what_never_fits_is_refused_when_it_comes() -> None:
    made = scheduler(kv_tokens=40)
    with pytest.raises(RequestRejected, match="KV memory"):
        made.add(request("a", 38))
    made.add(request("b", 35))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_every_request_gets_all_its_tokens_within_memory_whatever_comes_and_goes(data: Any) -> None:
    made = scheduler(kv_tokens=data.draw(st.integers(60, 300)), step_tokens=data.draw(st.integers(1, 40)))
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 15)), min_size=1, max_size=10))
    wanted: dict[str, int] = {}
    made_tokens: dict[str, int] = {}
    pending = [(f"r{n}", size, answer) for n, (size, answer) in enumerate(sizes)]
    for order in range(3000):
        if pending and data.draw(st.booleans()):
            key, size, answer = pending.pop()
            made.add(request(key, size, order, answer=answer))
            wanted[key] = answer
        if wanted and data.draw(st.integers(0, 9)) == 0:
            gone = data.draw(st.sampled_from(sorted(wanted)))
            made.remove(gone)
            wanted.pop(gone)
        made.admit(None)
        step = made.plan()
        made.check_integrity()
        assert len(made.running) <= 1 or made._held(list(made.running.values())) <= made.limits.kv_tokens
        if step is not None:
            answers = [c.key for c in step.chunks if c.answer] + [key for key, _ in step.decode]
            for told, progress in made.advance(step, dict.fromkeys(answers, (7, None))):
                made_tokens[told.key] = made_tokens.get(told.key, 0) + len(progress.tokens)
        if not pending and not made.requests:
            break
    assert {key: made_tokens[key] for key in wanted} == wanted
    assert not made.requests


def test_blocks_of_a_request_that_no_token_can_be_chosen_for_are_not_saved() -> None:
    """Its KV may be no numbers: whoever loaded it, with the same prompt, would fail as well, again and again."""
    saved = []

    class Blocks:
        def lookup(self, *_: Any) -> None: ...

        def completed(self, key: str, *_: Any) -> bytes:
            saved.append(key)
            return b"orders"

        def ended(self, key: str) -> None: ...

    blocks: Any = Blocks()
    made = Scheduler(scheduler().limits, blocks)
    made.add(request("good", BLOCK))
    made.add(request("poisoned", BLOCK, order=1))
    made.admit(None)
    step = made.plan()
    assert step is not None
    assert {chunk.key for chunk in step.chunks} == {"good", "poisoned"}
    made.advance(step, {"good": (7, None)}, {"poisoned"})
    assert saved == ["good"]
    assert made.remove("poisoned")
    made.check_integrity()

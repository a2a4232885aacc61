"""Every step of a lockstep rank is one forward, within what was granted."""

from __future__ import annotations

from typing import Any

from interlock.core.sampling import Sampling
from interlock.engines.base import Work
from interlock.engines.lockstep.stepping import OneForward
from interlock.engines.transformers.plans import Step
from interlock.engines.transformers.sampling import Sampler
from interlock.engines.transformers.scheduler import Limits, Request


def scheduler(**more: Any) -> OneForward:
    limits: dict[str, Any] = {
        "step_tokens": 64, "running_max": 8, "waiting_max": 8, "kv_tokens": 4096, "model_tokens": 512, "block_tokens": 16,
        "continues": True, **more,
    }  # fmt: skip
    return OneForward(Limits(**limits), None)


def add(made: OneForward, key: str, tokens: int, *, computed: int = 0) -> Request:
    sampling = Sampling(max_tokens=50, temperature=0.0)
    work = Work.of(key, [1] * tokens, sampling, "")
    request = Request(work, Sampler(sampling, work.prompt, []), len(made.requests))
    made.add(request)
    made.admit(None)
    request.computed = computed
    return request


def forwards(step: Step | None) -> int:
    return 0 if step is None else len(step.chunks) + bool(step.decode)


def plan(made: OneForward, tokens: int) -> Step | None:
    """The next step under a grant of so many tokens, as if it had been computed."""
    made.tokens_max = tokens
    step = made.plan()
    for chunk in step.chunks if step else []:
        made.running[chunk.key].computed += len(chunk.tokens)
    return step


def test_prompts_and_decoding_take_turns_and_no_step_is_more_than_one_forward() -> None:
    made = scheduler()
    add(made, "a", 200)
    add(made, "b", 200)
    add(made, "d", 20, computed=19)
    steps = [plan(made, 64) for _ in range(6)]
    assert [forwards(step) for step in steps] == [1] * 6
    assert ["decode" if step and step.decode else "chunk" for step in steps] == ["chunk", "decode"] * 3
    assert made.forwards == 6


def test_a_chunk_never_exceeds_the_grant_and_ends_on_a_block_boundary() -> None:
    made = scheduler()
    add(made, "a", 200)
    step = plan(made, 40)
    assert step is not None
    assert [len(chunk.tokens) for chunk in step.chunks] == [32]
    assert not step.chunks[0].answer
    assert forwards(plan(made, 8)) == 0, (
        "not even a block was granted: the rank runs empty, and asks for more"
    )
    assert made.wanted_tokens() == 64


def test_a_prompt_that_cannot_be_continued_waits_for_a_grant_of_all_of_it() -> None:
    made = scheduler(continues=False)
    add(made, "a", 200)
    assert made.wanted_tokens() == 200
    assert forwards(plan(made, 64)) == 0
    step = plan(made, 200)
    assert step is not None
    assert [len(chunk.tokens) for chunk in step.chunks] == [200]


def test_drops_go_along_with_an_empty_step_and_are_not_taken_for_a_forward() -> None:
    made = scheduler()
    add(made, "a", 20, computed=19)
    made.remove("a")
    step = plan(made, 64)
    assert step is not None
    assert (step.drops, forwards(step), made.forwards) == (["a"], 0, 0)
    assert plan(made, 64) is None

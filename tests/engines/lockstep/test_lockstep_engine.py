"""A lockstep group as one engine: the library's tokens, one common step at a pause, new weights, memory given back."""

from __future__ import annotations

import asyncio

import pytest
from lockstep_bench import Groups, Reading, empty_steps, living, log_of, only_on_rank_1, pids
from tiny_models import Library, prompts

from interlock.core.targets import Mode
from interlock.engines.base import EngineGone, EngineStartError
from interlock.engines.lockstep.engine import LockstepEngine, rank_states

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="session")]


async def settled(engine: LockstepEngine) -> int:
    """The step after which an idle group has stood for a while."""
    async with asyncio.timeout(30):
        while True:
            before = engine.group.leader.step
            await asyncio.sleep(0.3)
            if engine.group.leader.state.standing and engine.group.leader.step == before:
                return before


async def test_a_group_computes_the_librarys_tokens_and_stands_at_one_step(
    groups: Groups, library: Library
) -> None:
    """One start of two ranks costs seconds, so what needs no fresh one is asked here."""
    engine = await groups.take()
    assert "this rank holds 2 of the experts in each of 2 layers" in log_of(engine)

    # Prompts of many lengths on both ranks at once: every token is the undivided library's.
    readings = [Reading(engine, str(n), prompt, 20, logprobs=1) for n, prompt in enumerate(prompts())]
    for reading in readings:
        await reading.task
    assert [r.tokens for r in readings] == [library.greedy("mixtral", prompt) for prompt in prompts()]
    for reading, prompt in zip(readings, prompts(), strict=True):
        known = list(prompt)
        for token, logprob in zip(reading.tokens, reading.heard.logprobs, strict=True):
            undivided = library.logits("mixtral", known).log_softmax(-1)[token]
            assert abs(float(undivided) - logprob.logprob) < 1e-4
            known.append(token)

    # Without work no step is granted, and none is run empty.
    step = await settled(engine)
    assert rank_states(engine) == [(step, step)] * 2

    # A pause in the middle of a run with work at one rank only: both stand at the same step, and the other ran empty.
    prompt = prompts((40,))[0]
    before = empty_steps(engine)[0]
    reading = await only_on_rank_1(engine, prompt, 120)
    await reading.until(20)
    await engine.pause(Mode.KEEP)
    step = engine.group.leader.step
    assert rank_states(engine) == [(step, step)] * 2
    assert not reading.task.done(), "it was to be met in the middle"
    (
        state,
    ) = await engine.states()  # its rank's own count: the last token may still be on its way to the reader
    await asyncio.sleep(0.3)
    assert (reading.tokens, rank_states(engine)) == (state.tokens, [(step, step)] * 2)
    await engine.unpause()
    await reading.task
    assert reading.tokens == library.greedy("mixtral", prompt, 120)
    last = Reading(engine, "last", prompt, 1)  # on rank 0: with its token it tells its counters
    await last.task
    assert empty_steps(engine)[0] - before >= 20

    # New weights reach every rank; a kept request goes on; the next is computed by them alone.
    library.model("mixtral", seed=1)
    kept = [Reading(engine, f"kept {n}", prompts((30 + n,))[0], 60) for n in range(2)]
    for reading in kept:
        await reading.until(5)
    await engine.pause(Mode.KEEP)
    await engine.update_weights(library.path("mixtral", 1), "v1")
    await engine.unpause()
    for reading in kept:
        await reading.task
        assert len(reading.tokens) == 60
    fresh = [Reading(engine, f"fresh {n}", prompt, 20) for n in range(2)]
    for reading in fresh:
        await reading.task
        assert reading.tokens == library.greedy("mixtral", prompt, seed=1)

    # Suspended: the processes are gone, whole; resumed: the last weights, the same tokens.
    undisturbed = library.greedy("mixtral", prompt, 50, seed=1)
    readings = [Reading(engine, f"over {n}", prompt, 50) for n in range(2)]
    sampled = Reading(engine, "sampled", prompt, 50, temperature=1.0, seed=3)
    for reading in (*readings, sampled):
        await reading.until(5)
    await engine.pause(Mode.KEEP)
    ranks = pids(engine)
    await engine.suspend()
    assert living(ranks) == []
    late = Reading(engine, "late", prompt, 10)
    await asyncio.sleep(0.2)
    assert not late.tokens
    await engine.resume()
    assert len(living(pids(engine))) == 2
    await engine.unpause()
    for reading in (*readings, sampled, late):
        await reading.task
    assert [r.tokens for r in readings] == [undisturbed] * 2
    assert late.tokens == undisturbed[:10]
    again = Reading(engine, "sampled again", prompt, 50, temperature=1.0, seed=3)
    await again.task
    assert sampled.tokens == again.tokens, "the random generator came along"
    await engine.pause(Mode.KEEP)
    await engine.update_weights(groups.weights(engine), "v0")
    await engine.unpause()


async def test_a_prompt_takes_turns_with_decoding_and_no_token_differs(
    groups: Groups, library: Library
) -> None:
    engine = await groups.take()
    long = prompts((400,))[0]
    decoding = [Reading(engine, f"decoding {n}", prompts((17,))[0], 100) for n in range(2)]
    for reading in decoding:
        await reading.until(3)
    prefill = Reading(engine, "prefill", long, 5)
    made = [len(reading.tokens) for reading in decoding]
    await prefill.until(1)
    assert all(len(r.tokens) > before + 3 for r, before in zip(decoding, made, strict=True))
    for reading, prompt in ((prefill, long), *((r, prompts((17,))[0]) for r in decoding)):
        await reading.task
        assert reading.tokens == library.greedy("mixtral", prompt, len(reading.tokens))


async def test_a_resume_that_fails_leaves_the_group_suspended_and_a_stop_ends_one_under_way(
    groups: Groups, library: Library
) -> None:
    engine = await groups.take()
    weights, prompt = groups.weights(engine), prompts((40,))[0]
    kept, unwanted = (Reading(engine, name, prompt, 60) for name in ("kept", "unwanted"))
    for reading in (kept, unwanted):
        await reading.until(5)
    await engine.pause(Mode.KEEP)
    await engine.suspend()
    weights.unlink()
    death = asyncio.create_task(engine.died())
    with pytest.raises(EngineStartError, match="no directory"):
        await engine.resume()
    assert engine._living == set(), "nothing of the attempt is left"
    assert not death.done(), "it is suspended as before, not dead"
    assert [state.work.key for state in await engine.states()] == ["kept", "unwanted"]
    await engine.abort("unwanted")
    assert (await unwanted.task).finish == "abort"

    weights.symlink_to(library.path("mixtral"))
    await engine.resume()
    await engine.unpause()
    await kept.task
    assert kept.tokens == library.greedy("mixtral", prompt, 60)

    # A pause that aborts, of a suspended engine: what came before it ends, what came later waits.
    frozen = Reading(engine, "frozen", prompt, 400)
    await frozen.until(3)
    await engine.pause(Mode.KEEP)
    await engine.suspend()
    late = Reading(engine, "late", prompt, 3)
    await asyncio.sleep(0)
    await engine.pause(Mode.ABORT)
    assert (await frozen.task).finish == "abort"
    assert not late.task.done()

    resuming = asyncio.create_task(engine.resume())
    async with asyncio.timeout(30):
        while not any(len(group.processes.children) == 2 for group in engine._living):
            await asyncio.sleep(0.01)
    (group,) = engine._living
    ranks = [child.pid for child in group.processes.children.values()]
    await engine.stop()
    assert living(ranks) == []
    with pytest.raises(EngineGone):
        await resuming
    with pytest.raises(EngineGone):
        await late.task
    assert not death.done(), "a stop is no death"
    death.cancel()

"""Standing still, aborting, moving requests, changing weights: in every phase, by steps taken by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_models import TOKENS, Heard, Library, prompts, work

from interlock.core.targets import KeptCache, Mode
from interlock.engines.base import TAKEN, EngineGone, NotStanding, RequestRejected, UpdateFailed

LONG = prompts((90,))[0]
"""Three steps of prefill at 32 tokens a step."""


def start(bench: Any, request: Any) -> asyncio.Task[Heard]:
    return asyncio.create_task(Heard().listen(bench.engine.generate(request)))


async def arrive(bench: Any) -> None:
    """What was begun before has reached the engine's thread."""
    await asyncio.sleep(0)
    await bench.engine._ask(lambda: None)


# --- pausing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 9], ids=lambda n: f"after-{n}-steps")
async def test_a_pause_that_keeps_changes_no_token_wherever_it_falls(
    steps: int, bench: Any, library: Library
) -> None:
    made = await bench("gemma3", gated=True)
    listening = start(made, work("a", LONG))
    await arrive(made)
    await made.step(steps)
    await made.engine.pause(Mode.KEEP)
    before = made.engine.counts()["steps"]
    await made.step(3)
    assert made.engine.counts()["steps"] == before, "it stepped while it was paused"
    await made.engine.unpause()
    await made.step(40)
    assert (await listening).tokens == library.greedy("gemma3", LONG)


async def test_a_pause_that_waits_lets_go_on_what_came_before_and_begins_nothing_that_came_later(
    bench: Any, library: Library
) -> None:
    made = await bench("llama", gated=True)
    early = start(made, work("early", LONG))
    await arrive(made)
    pausing = asyncio.create_task(made.engine.pause(Mode.WAIT))
    await arrive(made)
    late = start(made, work("late", prompts((5,))[0]))
    await arrive(made)
    await made.step(10)
    assert not pausing.done()
    await made.step(20)
    await pausing
    assert (await early).tokens == library.greedy("llama", LONG)
    assert made.engine.load().waiting == 1
    assert not late.done()
    await made.engine.unpause()
    await made.step(25)
    assert (await late).finish == "length"


@pytest.mark.parametrize("steps", [0, 1, 6])
async def test_a_stricter_pause_ends_what_a_laxer_one_kept(steps: int, bench: Any) -> None:
    made = await bench("llama", gated=True)
    listening = start(made, work("a", LONG))
    await arrive(made)
    await made.step(steps)
    await made.engine.pause(Mode.KEEP)
    await made.engine.pause(Mode.ABORT)
    assert (await listening).finish == "abort"
    assert made.loop.ranks.computer._tokens == {}, "nothing of it is held by a rank that stands"


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
async def test_an_abort_ends_a_request_in_every_phase(steps: int, paused: bool, bench: Any) -> None:
    made = await bench("qwen3_next", gated=True)
    listening = start(made, work("a", LONG))
    await arrive(made)
    await made.step(steps)
    if paused:
        await made.engine.pause(Mode.KEEP)
    await made.engine.abort("a")
    heard = await listening
    assert (heard.finish, heard.last.cached_tokens) == ("abort", 0)  # type: ignore[union-attr]
    await made.engine.abort("a")
    made.loop.scheduler.check_integrity()


async def test_leaving_the_iterator_ends_the_request_in_the_engine(bench: Any) -> None:
    made = await bench("llama", gated=True)
    listening = start(made, work("a", LONG, max_tokens=300))
    await arrive(made)
    await made.step(5)
    assert made.engine.load().running == 1
    listening.cancel()
    await asyncio.wait([listening])
    await arrive(made)
    assert made.engine.load().running == 0
    await made.step()
    assert made.loop.ranks.computer._tokens == {}


async def test_requests_that_are_left_at_once_harm_nothing(bench: Any, library: Library) -> None:
    made = await bench("llama")
    for number in range(20):
        listening = start(made, work(str(number), LONG))
        for _ in range(number % 4):
            await asyncio.sleep(0)
        listening.cancel()
    assert (await made.run(work("stays", LONG)))[0].tokens == library.greedy("llama", LONG)
    await arrive(made)
    assert made.loop.scheduler.requests == []


# --- moving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "mamba2", "falcon_h1", "qwen3_next"])
async def test_a_request_moved_to_another_engine_after_every_step_gets_the_tokens_it_would_have_had(
    family: str, bench: Any
) -> None:
    chosen = {"temperature": 1.0, "top_p": 0.95, "presence_penalty": 0.5, "logprobs": 2, "max_tokens": 12}
    undisturbed = (await (await bench(family)).run(work("a", LONG, seed=7, **chosen)))[0]
    engines = [await bench(family, gated=True), await bench(family, gated=True)]
    here, moves = engines[0], 0
    beside = [start(made, work("beside", prompts((21,))[0], max_tokens=400)) for made in engines]
    stream = here.engine.generate(work("a", LONG, seed=7, **chosen))
    tokens: list[int] = []
    while True:
        listening = asyncio.create_task(Heard().listen(stream))
        await arrive(here)
        await here.step()
        await here.engine.pause(Mode.KEEP)
        if listening.done() or "a" not in [r.key for r in here.loop.scheduler.requests]:
            tokens += (await listening).tokens
            break
        state = await here.engine.take("a")
        heard = await listening
        assert (heard.finish, heard.last.detail) == ("abort", TAKEN)  # type: ignore[union-attr]
        tokens += heard.tokens
        assert state.tokens == tokens
        await here.engine.unpause()
        moves += 1
        here = engines[moves % 2]
        stream = here.engine.put(msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=type(state)))
    assert moves > 12
    assert tokens == undisturbed.tokens
    assert not any(b.done() for b in beside)
    for task in beside:
        task.cancel()
    await asyncio.wait(beside)


async def test_a_state_that_is_damaged_or_of_another_model_is_refused_or_ends_in_an_error(bench: Any) -> None:
    made, other = await bench("llama", gated=True), await bench("mamba2")
    listening = start(made, work("a", LONG))
    await arrive(made)
    await made.step(5)
    with pytest.raises(NotStanding):
        await made.engine.take("a")
    await made.engine.pause(Mode.KEEP)
    state = await made.engine.take("a")
    with pytest.raises(KeyError):
        await made.engine.take("a")
    with pytest.raises(RequestRejected, match="was made by"):
        await Heard().listen(other.engine.put(state))
    with pytest.raises(RequestRejected, match="damaged"):
        await Heard().listen(made.engine.put(msgspec.structs.replace(state, payload=state.payload[:40])))
    foreign = msgspec.structs.replace(state, model="mamba2")
    heard = await Heard().listen(other.engine.put(foreign))
    assert (heard.finish, heard.tokens) == ("error", [])
    assert "saved cache" in heard.last.detail  # type: ignore[union-attr]
    assert (await other.run(work("b", LONG)))[0].finish == "length", "the engine goes on"
    assert (await listening).finish == "abort"


# --- weights -----------------------------------------------------------------------------------------------------


async def test_new_weights_compute_the_rest_from_the_tokens_so_far(bench: Any, library: Library) -> None:
    library.model("llama", seed=1)
    made = await bench("llama", gated=True)
    listening = start(made, work("a", LONG))
    await arrive(made)
    await made.step(8)
    with pytest.raises(NotStanding):
        await made.engine.update_weights(library.path("llama", 1), "v2")
    await made.engine.pause(Mode.KEEP)
    await made.engine.update_weights(library.path("llama", 1), "v2", KeptCache.RECOMPUTE)
    before = made.loop.scheduler.requests[0].output
    await made.engine.unpause()
    await made.step(40)
    tokens = (await listening).tokens
    assert 0 < len(before) < TOKENS
    assert tokens[: len(before)] == before
    rest = library.greedy("llama", [*LONG, *before], TOKENS - len(before), seed=1)
    assert tokens[len(before) :] == rest
    assert tokens != library.greedy("llama", LONG)


async def test_an_update_that_fails_leaves_an_engine_that_computes_nothing_until_one_succeeds(
    bench: Any, library: Library, tmp_path: Path
) -> None:
    library.model("qwen3")
    made = await bench("llama")
    waiting = start(made, work("a", LONG))
    await arrive(made)
    await made.engine.pause(Mode.KEEP)
    for path in (tmp_path / "absent", library.path("qwen3")):
        with pytest.raises(UpdateFailed):
            await made.engine.update_weights(path, "v2")
        with pytest.raises(UpdateFailed):
            await made.engine.unpause()
    await made.engine.update_weights(library.path("llama"), "v3")
    await made.engine.unpause()
    assert (await waiting).tokens == library.greedy("llama", LONG)


async def test_a_suspended_engine_holds_no_weights_and_goes_on_after_it_is_resumed(
    bench: Any, library: Library
) -> None:
    made = await bench("gemma2", gated=True)
    listening = start(made, work("a", LONG))
    await arrive(made)
    await made.step(6)
    with pytest.raises(NotStanding):
        await made.engine.suspend()
    await made.engine.pause(Mode.KEEP)
    await made.engine.suspend()
    assert made.loop.ranks.computer.forward is None
    with pytest.raises(NotStanding):
        await made.engine.unpause()
    await made.engine.resume()
    await made.engine.unpause()
    await made.step(40)
    assert (await listening).tokens == library.greedy("gemma2", LONG)


# --- what is refused, and the end -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "sampling", "word"),
    [
        ([], {}, "empty"),
        ([5, 128], {}, "vocabulary"),
        ([-1], {}, "vocabulary"),
        ([5] * 512, {}, "takes 512"),
        ([5], {"temperature": 2.5}, "temperature"),
        ([5], {"temperature": float("nan")}, "temperature"),
        ([5], {"top_p": 0.0}, "top_p"),
        ([5], {"top_k": -2}, "top_k"),
        ([5], {"min_p": 1.5}, "min_p"),
        ([5], {"max_tokens": 0}, "max_tokens"),
        ([5], {"min_tokens": 21}, "min_tokens"),
        ([5], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([5], {"presence_penalty": 3.0}, "presence_penalty"),
        ([5], {"logit_bias": {999: 1.0}}, "logit_bias"),
        ([5], {"seed": 1 << 64}, "seed"),
    ],
)
async def test_what_is_impossible_is_refused_in_a_sentence(
    prompt: list[int], sampling: dict[str, Any], word: str, bench: Any
) -> None:
    made = await bench("llama")
    with pytest.raises(RequestRejected, match=word):
        await made.run(work("a", prompt, **sampling))
    assert made.loop.scheduler.requests == []


@pytest.mark.parametrize("plain", [True, False], ids=["chosen together", "chosen alone"])
async def test_a_request_that_no_token_can_be_chosen_for_ends_alone(
    plain: bool, bench: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model makes no numbers of it: it ends in an error, with no token of it told, and the one beside it goes on."""
    made = await bench("llama")
    computer = made.loop.ranks.computer
    step = computer.step

    def poisoned(asked: Any) -> Any:
        answers = step(asked)
        if "poisoned" in answers and made.loop.scheduler.running["poisoned"].output:
            answers["poisoned"] = answers["poisoned"] * float("nan")
        return answers

    monkeypatch.setattr(computer, "step", poisoned)
    more = {} if plain else {"logprobs": 1}
    asked = prompts()[1]
    beside, poison = await made.run(work("beside", asked, **more), work("poisoned", asked, **more))
    assert (beside.finish, beside.tokens) == ("length", library.greedy("llama", asked))
    assert (poison.finish, poison.tokens) == ("error", beside.tokens[:1])
    assert "no numbers" in poison.last.detail
    made.loop.scheduler.check_integrity()
    assert made.engine.load().running == 0


async def test_the_queue_is_bounded(bench: Any) -> None:
    made = await bench("llama", gated=True, waiting_max=2)
    waiting = [start(made, work(str(n), [5])) for n in range(2)]
    await arrive(made)
    with pytest.raises(RequestRejected, match="wait already"):
        await made.run(work("one more", [5]))
    await made.step(25)
    assert {(await w).finish for w in waiting} == {"length"}


async def test_a_failing_step_ends_the_engine_and_every_request_with_the_reason(bench: Any) -> None:
    made = await bench("llama", gated=True)
    listening = start(made, work("a", LONG))
    await arrive(made)
    await made.step(2)

    def fail(_: object) -> None:
        raise RuntimeError("out of memory")

    made.loop.ranks.computer.step = fail
    death = asyncio.create_task(made.engine.died())
    with pytest.raises(EngineGone):
        await made.step(3)
    with pytest.raises(EngineGone, match="out of memory"):
        await listening
    assert "out of memory" in await death
    with pytest.raises(EngineGone):
        await made.engine.pause(Mode.KEEP)
    with pytest.raises(EngineGone):
        await made.run(work("b", LONG))


async def test_a_stopped_engine_ends_its_requests_and_is_not_said_to_have_died(bench: Any) -> None:
    made = await bench("llama", gated=True)
    listening = start(made, work("a", LONG))
    await arrive(made)
    await made.step(2)
    death = asyncio.create_task(made.engine.died())
    await made.engine.stop()
    with pytest.raises(EngineGone):
        await listening
    assert made.loop.join(5.0)
    assert not death.done()
    death.cancel()

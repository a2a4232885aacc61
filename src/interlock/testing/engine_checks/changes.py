"""What an engine lives through: new weights, suspension, requests taken out and put back, its death and its stop.

Where an engine cannot do a thing it says so by `Unable`, before anything has changed; that is checked instead.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from interlock.core.sampling import Sampling
from interlock.core.targets import Mode
from interlock.engines.base import TAKEN, EngineGone, NotStanding, RequestState, Unable, UpdateFailed
from interlock.testing.engine_checks.bench import Bench, CheckFailed

# --- weights -----------------------------------------------------------------------------------------------------


async def weights_change_while_paused_and_no_cache_crosses(bench: Bench) -> None:
    """A failed update leaves no version; a good one computes by the new weights alone; kept requests go on."""
    engine, ground = bench.engine, bench.ground
    if not bench.capabilities.updates:
        async with bench.paused():
            await bench.refuses(engine.update_weights(Path("nowhere"), "1"), Unable, "an update")
        return
    if ground.other_weights is None or ground.own_weights is None:
        raise CheckFailed("this engine updates weights: give `other_weights` and `own_weights`")
    prompt = bench.prompt(80, 100)
    old = await bench.answer(prompt, 24)
    await bench.refuses(
        engine.update_weights(ground.other_weights, "1"), NotStanding, "an update of a running engine"
    )
    kept = bench.read(bench.prompt(81), 40)
    await kept.until(4)
    before = kept.completion
    await bench.pause(Mode.KEEP)
    await bench.refuses(engine.update_weights(Path("/nowhere"), "bad"), UpdateFailed, "an update to nothing")
    await bench.refuses(engine.unpause(), UpdateFailed, "unpausing an engine without weights")
    await bench.stands_still([kept])
    await bench.within(engine.update_weights(ground.other_weights, "1"), "an update after one that failed")
    await bench.stands_still([kept])
    await bench.unpause()
    new = await bench.answer(prompt, 24)
    bench.check(new.tokens != old.tokens, "new weights make the old tokens: they were not loaded")
    bench.check(new.steps[-1].cached_tokens == 0, "KV of the old weights was hit by a request of the new")
    bench.check(
        (await kept.end()).finish == "length", f"a request kept over an update ended: {kept.steps[-1]}"
    )
    bench.check(len(kept.tokens) == 40, f"a request kept over an update made {len(kept.tokens)} of 40 tokens")
    bench.check(kept.tokens[: len(before.tokens)] == before.tokens, "delivered tokens changed")
    await bench.pause(Mode.KEEP)
    await bench.within(engine.update_weights(ground.own_weights, "2"), "an update back")
    await bench.unpause()
    bench.same(old, await bench.answer(prompt, 24, salt="back:0"), "the first weights again")


# --- memory ------------------------------------------------------------------------------------------------------


async def a_suspended_engine_keeps_its_requests(bench: Bench) -> None:
    """Memory is given back and taken again; requests wait, can be aborted, and go on with the tokens of before."""
    engine = bench.engine
    if not bench.capabilities.suspends:
        async with bench.paused():
            await bench.refuses(engine.suspend(), Unable, "a suspension")
        return
    undisturbed = await bench.answer(bench.prompt(82), 50)
    await bench.refuses(engine.suspend(), NotStanding, "suspending a running engine")
    kept, unwanted = bench.read(bench.prompt(82), 50), bench.read(bench.prompt(83), 50)
    await kept.until(5)
    await unwanted.until(2)
    await bench.pause(Mode.KEEP)
    await bench.within(engine.suspend(), "suspend")
    await bench.within(engine.suspend(), "suspend, again")
    late = bench.read(bench.prompt(84), 4)
    await bench.stands_still([kept, late])
    await bench.refuses(engine.unpause(), NotStanding, "unpausing a suspended engine")
    await bench.within(engine.abort(unwanted.key), "an abort while suspended")
    bench.check((await unwanted.end()).finish == "abort", "an abort while suspended was not heard")
    await bench.within(engine.resume(), "resume")
    await bench.within(engine.resume(), "resume, again")
    await bench.stands_still([kept, late])
    await bench.unpause()
    await kept.end()
    bench.same(undisturbed, kept, "kept over a suspension")
    bench.check((await late.end()).finish == "length", "a request that came while suspended did not go on")


# --- requests that move ------------------------------------------------------------------------------------------


async def a_request_is_taken_out_and_put_back_as_if_nothing_had_been(bench: Bench) -> None:
    """In mid-stream, greedy and sampled: taken, put, and its tokens are those of an undisturbed run."""
    engine = bench.engine
    if not bench.capabilities.moves_requests:
        async with bench.paused():
            await bench.refuses(engine.take("x"), Unable, "taking a request out")
        return
    sampled = Sampling(
        max_tokens=40, temperature=1.0, seed=3, presence_penalty=0.5, ignore_eos=True, logprobs=2
    )
    for number, sampling in enumerate([bench.greedy(40), sampled]):
        prompt = bench.prompt(85 + number, 60)
        undisturbed = await bench.answer(prompt, sampling)
        reader = bench.read(prompt, sampling)
        await reader.until(6)
        await bench.refuses(engine.take(reader.key), NotStanding, "taking a request out of a running engine")
        await bench.pause(Mode.KEEP)
        await bench.refuses(engine.take("never heard of"), KeyError, "taking out what is not there")
        state = await bench.within(engine.take(reader.key), "take")
        last = await reader.end()
        bench.check((last.finish, last.detail) == ("abort", TAKEN), f"taken out, it ended with {last}")
        bench.check(state.tokens == reader.tokens, f"taken at {state.tokens}, heard {reader.tokens}")
        await bench.unpause()
        put = bench.read_put(_carried(state))
        await put.end()
        whole = reader.tokens + put.tokens
        bench.check(
            whole == undisturbed.tokens,
            f"taken out and put back, it made {whole[len(reader.tokens) :]} after {len(reader.tokens)} tokens; "
            f"undisturbed: {undisturbed.tokens[len(reader.tokens) :]}",
        )


def _carried(state: RequestState) -> RequestState:
    """As it comes out of a file: nothing of it may live by reference."""
    import msgspec

    return msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=RequestState)


# --- ends --------------------------------------------------------------------------------------------------------


async def a_death_is_told_and_every_request_hears_of_it(bench: Bench) -> None:
    """`died` returns with words, iterators raise `EngineGone`, and `stop` still works."""
    reader = bench.read(bench.prompt(87), bench.capabilities.max_model_tokens - 60)
    await reader.until(3)
    death = asyncio.create_task(bench.engine.died())
    await asyncio.sleep(0)
    bench.ground.kill(bench.engine)
    words = await bench.within(death, "noticing the engine's death")
    bench.check(bool(words), "the engine died without a word")
    await bench.refuses(reader.end(), EngineGone, "a request of a dead engine")
    await bench.within(bench.engine.stop(), "stop of a dead engine")


async def a_stop_ends_every_request_and_is_no_death(bench: Bench) -> None:
    """Iterators raise `EngineGone`; a second stop has no effect; `died` stays silent."""
    reader = bench.read(bench.prompt(88), bench.capabilities.max_model_tokens - 60)
    await reader.until(3)
    death = asyncio.create_task(bench.engine.died())
    await bench.within(bench.engine.stop(), "stop")
    await bench.refuses(reader.end(), EngineGone, "a request of a stopped engine")
    await bench.within(bench.engine.stop(), "stop, again")
    await asyncio.sleep(bench.ground.still_s)
    told = death.done()
    death.cancel()
    await asyncio.gather(death, return_exceptions=True)
    bench.check(not told, "a stop was told as a death")


CHANGES = [
    weights_change_while_paused_and_no_cache_crosses,
    a_suspended_engine_keeps_its_requests,
    a_request_is_taken_out_and_put_back_as_if_nothing_had_been,
]
ENDS = [a_death_is_told_and_every_request_hears_of_it, a_stop_ends_every_request_and_is_no_death]

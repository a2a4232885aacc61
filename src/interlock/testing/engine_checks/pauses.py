"""How an engine stands still: between two steps, in every mode, in every phase, and from what it goes on."""

from __future__ import annotations

import asyncio

from interlock.core.targets import Mode
from interlock.testing.engine_checks.bench import Bench, Reader

TRIES = 8


async def keep_freezes_in_mid_decode_and_goes_on_from_there(bench: Bench) -> None:
    """No token comes during the pause, and afterwards those of an undisturbed run."""
    undisturbed = await bench.answer(bench.prompt(40), 60)
    reader = bench.read(bench.prompt(40), 60)
    await reader.until(5)
    async with bench.paused():
        await bench.stands_still([reader])
        bench.check(not reader.finish, "a frozen request ended")
    await reader.end()
    bench.same(undisturbed, reader, "frozen in mid-decode")


async def keep_freezes_in_mid_prefill_and_goes_on_from_there(bench: Bench) -> None:
    """A prompt that takes several steps is stopped between two of them."""
    caught = 0
    for turn in range(TRIES):
        prompt = bench.prompt(60 + turn, bench.ground.prefill_tokens)
        reader = bench.read(prompt, 8)
        await bench.begun(reader)
        async with bench.paused():
            await bench.stands_still([reader])
            caught += not reader.tokens
        await reader.end()
        bench.same(await bench.answer(prompt, 8, salt="undisturbed:0"), reader, "frozen in mid-prefill")
        if caught:
            return
    bench.check(
        False, f"no pause met a prefill of {bench.ground.prefill_tokens} tokens: raise `prefill_tokens`"
    )


async def many_pauses_change_no_token(bench: Bench) -> None:
    """Ten pauses within one stream, some of them one right after the other."""
    prompts = [bench.prompt(70 + n, 20 + 30 * n) for n in range(3)]
    undisturbed = [await bench.answer(prompt, 60) for prompt in prompts]
    readers = [bench.read(prompt, 60) for prompt in prompts]
    for turn in range(10):
        await bench.pause()
        await bench.unpause()
        if turn % 3 == 0:
            await readers[0].until(min(60, len(readers[0].tokens) + 1))
    for reference, reader in zip(undisturbed, readers, strict=True):
        await reader.end()
        bench.same(reference, reader, "paused ten times")


async def wait_lets_what_runs_end_and_what_comes_wait(bench: Bench) -> None:
    """The pause returns when the running requests have ended; a later one begins after `unpause`."""
    reader = bench.read(bench.prompt(41), 30)
    await reader.until(2)
    pausing = asyncio.create_task(bench.pause(Mode.WAIT))
    await asyncio.sleep(0)
    late = bench.read(bench.prompt(42), 3)
    await pausing
    bench.check((await reader.end()).finish == "length", f"a pause that waits ended it by {reader.finish!r}")
    await bench.stands_still([late])
    bench.check(not late.steps, "a request that came during the pause was computed")
    await bench.unpause()
    bench.check((await late.end()).finish == "length", "a request that waited did not go on")


async def abort_ends_what_runs_and_what_comes_waits(bench: Bench) -> None:
    """Every running request ends with "abort", the queue's too; a later one begins after `unpause`."""
    readers = [bench.read(bench.prompt(43 + n, 30), 800) for n in range(3)]
    await readers[0].until(3)
    await bench.pause(Mode.ABORT)
    for reader in readers:
        last = await reader.end()
        bench.check(last.finish == "abort", f"a pause that aborts ended it by {last.finish!r}")
    late = bench.read(bench.prompt(46), 3)
    await bench.stands_still([late])
    bench.check(not late.steps, "a request that came during the pause was computed")
    await bench.unpause()
    bench.check((await late.end()).finish == "length", "a request that waited did not go on")


async def _waiting_pause(bench: Bench) -> tuple[Reader, asyncio.Task[None]]:
    reader = bench.read(bench.prompt(47), bench.capabilities.max_model_tokens - 60)
    await reader.until(3)
    waiting = asyncio.create_task(bench.engine.pause(Mode.WAIT))
    await reader.until(len(reader.tokens) + 2)
    bench.check(not waiting.done(), "a pause that waits returned while its request runs")
    return reader, waiting


async def a_pause_that_waits_is_cut_short_by_one_that_keeps(bench: Bench) -> None:
    """The stricter pause stands within a step; the request is frozen, and goes on afterwards."""
    reader, waiting = await _waiting_pause(bench)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await bench.pause(Mode.KEEP)
    await bench.stands_still([reader])
    bench.check(not reader.finish, f"it was to be kept and ended by {reader.finish!r}")
    await bench.unpause()
    await reader.until(len(reader.tokens) + 2)


async def a_pause_that_waits_is_cut_short_by_one_that_aborts(bench: Bench) -> None:
    """Also when nobody cancelled the first call: both return."""
    reader, waiting = await _waiting_pause(bench)
    await bench.pause(Mode.ABORT)
    bench.check((await reader.end()).finish == "abort", f"it ended by {reader.finish!r}")
    await bench.within(waiting, "the pause that waited")
    await bench.unpause()


async def a_stricter_pause_in_force_takes_its_requests_and_a_laxer_one_changes_nothing(bench: Bench) -> None:
    """KEEP, then WAIT (nothing), then ABORT."""
    reader = bench.read(bench.prompt(48), 800)
    await reader.until(3)
    await bench.pause(Mode.KEEP)
    await bench.pause(Mode.WAIT)
    await bench.pause(Mode.KEEP)
    await bench.stands_still([reader])
    bench.check(not reader.finish, "a laxer pause ended a frozen request")
    await bench.pause(Mode.ABORT)
    bench.check((await reader.end()).finish == "abort", f"it ended by {reader.finish!r}")
    await bench.unpause()


async def an_idle_engine_pauses_at_once_and_unpausing_twice_is_ordinary(bench: Bench) -> None:
    """Every mode, with nothing to do; `unpause` without a pause has no effect."""
    await bench.unpause()
    for mode in Mode:
        await bench.pause(mode)
        await bench.unpause()
        await bench.unpause()
    bench.check((await bench.answer(bench.prompt(49), 3)).finish == "length", "it serves no more")


async def a_paused_engine_says_that_its_requests_wait(bench: Bench) -> None:
    """`load` during a pause counts nothing as running."""
    reader = bench.read(bench.prompt(50), 800)
    await reader.until(2)
    async with bench.paused():
        busy = bench.engine.load()
        bench.check(busy.running == 0 and busy.waiting >= 1, f"paused with one request, its load is {busy}")
    await bench.engine.abort(reader.key)
    await reader.end()


PAUSES = [
    keep_freezes_in_mid_decode_and_goes_on_from_there,
    keep_freezes_in_mid_prefill_and_goes_on_from_there,
    many_pauses_change_no_token,
    wait_lets_what_runs_end_and_what_comes_wait,
    abort_ends_what_runs_and_what_comes_waits,
    a_pause_that_waits_is_cut_short_by_one_that_keeps,
    a_pause_that_waits_is_cut_short_by_one_that_aborts,
    a_stricter_pause_in_force_takes_its_requests_and_a_laxer_one_changes_nothing,
    an_idle_engine_pauses_at_once_and_unpausing_twice_is_ordinary,
    a_paused_engine_says_that_its_requests_wait,
]

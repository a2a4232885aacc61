"""What an engine makes of requests: deltas, ends, logprobs, seeds, caches, limits, many at once, bad ones, aborts."""

from __future__ import annotations

import asyncio

import msgspec

from interlock.core.sampling import Sampling
from interlock.core.targets import Mode
from interlock.engines.base import RequestRejected, Work
from interlock.testing.engine_checks.bench import Bench, Reader

# --- streaming ---------------------------------------------------------------------------------------------------


async def tokens_come_step_by_step_and_the_last_step_has_the_finish(bench: Bench) -> None:
    """A request yields its tokens as they are made; exactly the last progress has a finish."""
    reader = await bench.answer(bench.prompt(1), 12)
    finishes = [step.finish for step in reader.steps]
    bench.check(len(reader.tokens) == 12, f"12 tokens were asked for, {len(reader.tokens)} came")
    bench.check(len(reader.steps) > 2, "all tokens came at once: progress is yielded when a step made it")
    bench.check(finishes[-1] == "length", f"max_tokens ended it, its finish says {finishes[-1]!r}")
    bench.check(not any(finishes[:-1]), f"a finish came before the end: {finishes}")


async def greedy_tokens_are_the_same_again_and_depend_on_the_whole_prompt(bench: Bench) -> None:
    """The same prompt gives the same tokens, from whatever cache; another first token gives others."""
    prompt = bench.prompt(2, 100)
    first = await bench.answer(prompt, 16)
    bench.same(first, await bench.answer(prompt, 16), "the same prompt again")
    other = await bench.answer([*bench.prompt(3, 1), *prompt[1:]], 16)
    bench.check(
        first.tokens != other.tokens,
        "another first token changes nothing: with this model a lost cache could not be seen; choose other weights",
    )


async def logprobs_come_one_a_token_and_only_when_asked_for(bench: Bench) -> None:
    """As many entries as tokens, best first; none where none were asked for."""
    plain = await bench.answer(bench.prompt(4), Sampling(max_tokens=4, temperature=0.0, ignore_eos=True))
    bench.check(not any(step.logprobs for step in plain.steps), "logprobs came unasked")
    asked = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=3)
    reader = await bench.answer(bench.prompt(4), asked)
    entries = [entry for step in reader.steps for entry in step.logprobs]
    bench.check(len(entries) == 4, f"4 tokens have {len(entries)} logprobs")
    for token, entry in zip(reader.tokens, entries, strict=True):
        best = [p for _, p in entry.top]
        bench.check(
            len(entry.top) == 3 and best == sorted(best, reverse=True), f"not the best three: {entry}"
        )
        bench.check(entry.rank == 1 and entry.top[0][0] == token, f"a greedy token is the best: {entry}")


async def a_stop_token_ends_a_request_and_is_named(bench: Bench) -> None:
    """A token of `stop_token_ids` ends it with "stop" and stands in `detail`."""
    plain = await bench.answer(bench.prompt(5), 8)
    wanted = plain.tokens[4]
    sampling = msgspec.structs.replace(bench.greedy(30), stop_token_ids=[wanted])
    stopped = await bench.answer(bench.prompt(5), sampling)
    place = plain.tokens.index(wanted)
    bench.check(stopped.tokens == plain.tokens[: place + 1], f"stopped at {stopped.tokens}, not at {wanted}")
    last = stopped.steps[-1]
    bench.check((last.finish, last.detail) == ("stop", str(wanted)), f"its end says {last}")


async def a_seed_makes_a_sampled_request_repeatable(bench: Bench) -> None:
    """The same seed, the same tokens, whatever runs beside it; another seed, others."""
    sampled = Sampling(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True)
    first = await bench.answer(bench.prompt(6), sampled)
    beside = bench.read(bench.prompt(7), 12)
    again = await bench.answer(bench.prompt(6), sampled)
    await beside.end()
    bench.check(first.tokens == again.tokens, f"seed 7 made {first.tokens}, then {again.tokens}")
    other = await bench.answer(bench.prompt(6), msgspec.structs.replace(sampled, seed=8))
    bench.check(first.tokens != other.tokens, "seeds 7 and 8 make the same tokens: is temperature heard?")


async def a_salt_keeps_caches_apart(bench: Bench) -> None:
    """What one tenant computed is not hit by another; at least one prompt token is always computed."""
    prompt = bench.prompt(8, 100)
    await bench.answer(prompt, 2, salt="tenant a:0")
    other = await bench.answer(prompt, 2, salt="tenant b:0")
    bench.check(other.steps[-1].cached_tokens == 0, f"{other.steps[-1].cached_tokens} tokens of another salt")
    same = await bench.answer(prompt, 2, salt="tenant a:0")
    bench.check(same.steps[-1].cached_tokens < len(prompt), "every prompt token is said to be cached")


async def a_prompt_may_be_as_long_as_the_model_allows(bench: Bench) -> None:
    """A prompt that leaves room for eight tokens yields eight, and ends by length."""
    longest = bench.capabilities.max_model_tokens
    reader = await bench.answer(bench.prompt(9, longest - 8), 50)
    bench.check(
        len(reader.tokens) == 8 and reader.finish == "length",
        f"a prompt of {longest - 8} of {longest} tokens made {len(reader.tokens)}, ended by {reader.finish!r}",
    )


async def many_at_once_each_get_their_own_tokens(bench: Bench) -> None:
    """Requests of many lengths, together, make what each of them makes alone."""
    prompts = [bench.prompt(100 + n, 5 + 17 * n) for n in range(12)]
    alone = [await bench.answer(prompt, 6 + n) for n, prompt in enumerate(prompts)]
    together = [bench.read(prompt, 6 + n, salt="together:0") for n, prompt in enumerate(prompts)]
    for n, reader in enumerate(together):
        await reader.end()
        bench.same(alone[n], reader, f"request {n} of {len(prompts)} at once")


# --- bad requests ------------------------------------------------------------------------------------------------


async def impossible_requests_are_rejected_in_words_and_harm_nobody(bench: Bench) -> None:
    """`RequestRejected` before the first step; the requests beside it go on."""
    beside = bench.read(bench.prompt(10), 40)
    longest = bench.capabilities.max_model_tokens
    good = bench.prompt(11)
    for sampling, prompt, what in [
        (Sampling(max_tokens=0), good, "max_tokens 0"),
        (Sampling(max_tokens=4, top_p=7.0), good, "top_p 7"),
        (Sampling(max_tokens=4, temperature=-1.0), good, "a negative temperature"),
        (Sampling(max_tokens=4), [10**9], "a token that is in no vocabulary"),
        (Sampling(max_tokens=4), [], "an empty prompt"),
        (Sampling(max_tokens=4), bench.prompt(12, longest + 1), "a prompt longer than the model"),
    ]:
        reader = bench.read(prompt, sampling)
        await bench.refuses(reader.end(), RequestRejected, what)
        bench.check(not reader.steps, f"{what} was rejected after it had begun")
    bench.check((await beside.end()).finish == "length", "a bad request harmed the one beside it")


# --- aborts ------------------------------------------------------------------------------------------------------


async def aborted(bench: Bench, reader: Reader, phase: str) -> None:
    await bench.within(bench.engine.abort(reader.key), f"abort of a request in {phase}")
    last = await reader.end()
    bench.check(last.finish == "abort", f"aborted in {phase}, it ended by {last.finish!r}")


async def an_abort_ends_a_request_that_is_queued(bench: Bench) -> None:
    """One that came during a pause ends with "abort" while the pause lasts."""
    async with bench.paused():
        reader = bench.read(bench.prompt(13), 50)
        await asyncio.sleep(bench.ground.still_s / 3)
        await aborted(bench, reader, "the queue")
    bench.check(not reader.tokens, "a request that was aborted before it began made tokens")


async def an_abort_at_once_is_not_lost(bench: Bench) -> None:
    """Aborts cross with the very beginning of their requests."""
    for turns in range(6):
        reader = bench.read(bench.prompt(14, 64), bench.capabilities.max_model_tokens - 80)
        for _ in range(turns + 1):
            await asyncio.sleep(0)
        await aborted(bench, reader, "its first moment")


async def an_abort_ends_a_request_in_prefill(bench: Bench) -> None:
    """Before its first token."""
    reader = bench.read(bench.prompt(15, bench.ground.prefill_tokens), 500)
    await bench.begun(reader)
    await aborted(bench, reader, "prefill")


async def an_abort_ends_a_request_in_decode(bench: Bench) -> None:
    """In mid-stream; the requests beside it do not notice."""
    reference = await bench.answer(bench.prompt(17), 40)
    reader, beside = bench.read(bench.prompt(16), 800), bench.read(bench.prompt(17), 40)
    await reader.until(4)
    await aborted(bench, reader, "decode")
    bench.check(len(reader.tokens) < 800, "it was aborted and made every token")
    await beside.end()
    bench.same(reference, beside, "beside an aborted request")


async def an_abort_ends_a_request_while_paused(bench: Bench) -> None:
    """A frozen one ends with "abort" while the pause lasts."""
    reader = bench.read(bench.prompt(18), 800)
    await reader.until(4)
    async with bench.paused():
        await aborted(bench, reader, "a pause")


async def aborts_of_what_is_not_there_are_ordinary(bench: Bench) -> None:
    """Of a key never heard of, and of one that has ended."""
    await bench.within(bench.engine.abort("never heard of"), "abort of an unknown key")
    reader = await bench.answer(bench.prompt(19), 2)
    await bench.within(bench.engine.abort(reader.key), "abort of an ended request")
    bench.check((await bench.answer(bench.prompt(19), 2)).finish == "length", "the engine serves no more")


async def leaving_the_iterator_aborts_in_the_engine(bench: Bench) -> None:
    """Whoever stops reading leaves nothing behind: the engine is idle afterwards."""
    readers = [bench.read(bench.prompt(20 + n), 800) for n in range(3)]
    for reader in readers:
        await reader.until(2)
        await reader.leave()
    for mode in (Mode.KEEP, Mode.WAIT):  # the second returns only when nothing runs
        await bench.pause(mode)
        busy = bench.engine.load()
        await bench.unpause()
        bench.check(
            not busy.running and not busy.waiting, f"nobody asks for anything, and its load is {busy}"
        )


async def a_key_is_free_again_when_its_request_has_ended(bench: Bench) -> None:
    """Nothing of an ended request is left under its key (a put goes by it)."""
    work = bench.work(bench.prompt(24), 3)
    first = [step async for step in bench.engine.generate(work)]
    again = Work.of(work.key, work.prompt, work.sampling, work.cache_salt)
    second = [step async for step in bench.engine.generate(again)]
    tokens = [[token for step in steps for token in step.tokens] for steps in (first, second)]
    bench.check(tokens[0] == tokens[1], f"a key used again made {tokens[1]}, not {tokens[0]}")


REQUESTS = [
    tokens_come_step_by_step_and_the_last_step_has_the_finish,
    greedy_tokens_are_the_same_again_and_depend_on_the_whole_prompt,
    logprobs_come_one_a_token_and_only_when_asked_for,
    a_stop_token_ends_a_request_and_is_named,
    a_seed_makes_a_sampled_request_repeatable,
    a_salt_keeps_caches_apart,
    a_prompt_may_be_as_long_as_the_model_allows,
    many_at_once_each_get_their_own_tokens,
    impossible_requests_are_rejected_in_words_and_harm_nobody,
    an_abort_ends_a_request_that_is_queued,
    an_abort_at_once_is_not_lost,
    an_abort_ends_a_request_in_prefill,
    an_abort_ends_a_request_in_decode,
    an_abort_ends_a_request_while_paused,
    aborts_of_what_is_not_there_are_ordinary,
    leaving_the_iterator_aborts_in_the_engine,
    a_key_is_free_again_when_its_request_has_ended,
]

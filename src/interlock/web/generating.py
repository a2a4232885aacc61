"""One choice of an answer on its way: token ids from the fleet become text, logprobs and an end, piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from interlock.fleet.generation import Generation, Made, RequestFailed, extended
from interlock.fleet.ledger import GenerationRequest
from interlock.text.stream import TextStream
from interlock.web.front import Front
from interlock.web.kept_jobs import note_of
from interlock.web.requests import Job
from interlock.wire.engine_messages import TokenLogprobs


class Piece(msgspec.Struct, frozen=True):
    """News of one choice. `finish_reason` stands in its last piece: "stop", "length" or "abort"."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None
    skipped: list[int] = []
    """Tokens before these that the client has from an earlier connection."""


class Choice:
    """`index` counts through the whole answer: all choices of the first prompt, then of the second.

    One that is `taken_up` goes through all its tokens again, and tells from token `after` on: text and stop strings are made
    from the whole sequence, so that the cut changes nothing.
    """

    def __init__(
        self,
        front: Front,
        job: Job,
        index: int,
        *,
        taken_up: GenerationRequest | None = None,
        after: int = 0,
    ) -> None:
        self.index = index
        self._after = after
        self.prompt = job.prompts[index // job.best_of]
        sampling = job.sampling[index // job.best_of]
        number = index % job.best_of
        if taken_up is not None:
            sampling = taken_up.sampling
        elif number and sampling.seed is not None:
            # As vLLM: equal seeds would give equal choices.
            seed = (sampling.seed + number + 2**63) % 2**64 - 2**63
            sampling = msgspec.structs.replace(sampling, seed=seed)
        self._stream = TextStream(
            front.text,
            prompt=self.prompt.ids,
            stops=job.stops,
            include_stop=job.include_stop,
            skip_special=job.skip_special,
            end_ids=job.end_ids,
            min_tokens=sampling.min_tokens,
        )
        self.cached_tokens = 0
        self.made: list[Made] = []
        """Which weights made its tokens, in order."""
        self.done = False
        if taken_up is not None:
            self.generation: Generation = front.fleet.take_up(taken_up.id)
            return
        self.generation = front.fleet.submit(
            GenerationRequest(
                id=f"{job.id}-{index}",
                prompt=self.prompt.ids,
                sampling=sampling,
                tenant=job.tenant,
                priority=job.priority,
                engine=job.engine,
                note=note_of(job, index),
            )
        )

    @property
    def tokens(self) -> int:
        """Generated so far, as usage counts them."""
        return self._stream.tokens

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Raises what the fleet raises. After its end nothing of this choice runs anywhere."""
        stream = self._stream
        skipped: list[int] = []
        async for got in self.generation:
            before = stream.tokens
            text, skip = self._push(got.token_ids)
            taken = stream.tokens - before
            self.cached_tokens = got.cached_tokens
            self._note(got.made, taken)
            finish: str | None = got.finish or None
            if stream.stopped is not None:
                finish = "stop"
                await self.generation.abort()
            elif finish is not None:
                text += stream.finish()
            self.done = finish is not None
            ids, logprobs = got.token_ids[skip:taken], got.logprobs[skip:taken]
            skipped += got.token_ids[:skip]
            if self.done or ids or not skip:
                yield Piece(self.index, text, ids, logprobs, finish, skipped)
                skipped = []
            if self.done:
                if stream.tokens < self._after:
                    raise RequestFailed("invalid", self._too_far())
                return
        raise RequestFailed("closed", "the request was ended from within before its end", retryable=True)

    def _push(self, token_ids: list[int]) -> tuple[str, int]:
        """The text to tell, and how many of the tokens the client has already."""
        stream = self._stream
        skip = min(len(token_ids), max(0, self._after - stream.tokens))
        if not skip:
            return stream.push(token_ids), 0
        stream.push(token_ids[:skip])
        return stream.push(token_ids[skip:]), skip

    def _too_far(self) -> str:
        return f"choice {self.index} ended after {self._stream.tokens} tokens; a client cannot have {self._after}"

    def _note(self, made: list[Made], taken: int) -> None:
        """Of a piece that a stop string cuts only the tokens that count."""
        for span in made:
            tokens = min(span.tokens, taken)
            taken -= tokens
            if tokens:
                self.made = extended(self.made, Made(span.version, tokens))

    async def abort(self) -> None:
        if not self.done:
            self.done = True
            await self.generation.abort()


class Choices:
    """All choices of one job. `begin` raises what `submit` raises. `close` when it is left, however."""

    def __init__(
        self, front: Front, job: Job, taken_up: tuple[list[GenerationRequest], list[int]] | None = None
    ) -> None:
        """`taken_up`: the generations that run already, and how many tokens of each the client has."""
        self._choices: list[Choice] = []
        self._job = job
        self._front = front
        self._taken_up = taken_up

    def begin(self) -> None:
        """Submits each of them, or takes it up."""
        if self._taken_up is not None:
            for index, (request, after) in enumerate(zip(*self._taken_up, strict=True)):
                self._choices.append(Choice(self._front, self._job, index, taken_up=request, after=after))
            return
        for index in range(len(self._job.prompts) * self._job.best_of):
            self._choices.append(Choice(self._front, self._job, index))

    async def close(self) -> None:
        for choice in self._choices:
            await choice.abort()

    @property
    def engine(self) -> str:
        """Who runs the first choice; empty while it waits."""
        return self._choices[0].generation.engine if self._choices else ""

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self._job.prompts)

    @property
    def generated_tokens(self) -> int:
        return sum(choice.tokens for choice in self._choices)

    @property
    def cached_tokens(self) -> int:
        """Of each prompt once: by its first choice, for the others find what that one computed."""
        return sum(choice.cached_tokens for choice in self._choices[:: self._job.best_of])

    @property
    def made(self) -> list[list[Made]]:
        """Of each choice, which weights made its tokens."""
        return [choice.made for choice in self._choices]

    def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces of all choices as they come. To be closed (`aclosing`) when it is left early."""
        if len(self._choices) == 1:
            return self._choices[0].pieces()
        return merge(self._choices)


async def merge(choices: Sequence[Choice]) -> AsyncGenerator[Piece, None]:
    """Raises the first failure of any; the others are then left to `Choices.close`."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(maxsize=len(choices))

    async def pump(choice: Choice) -> None:
        try:
            async with aclosing(choice.pieces()) as pieces:
                async for piece in pieces:
                    await queue.put(piece)
            await queue.put(None)
        except Exception as error:  # of ours, too: nobody must wait for a choice that is made no more
            await queue.put(error)

    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        running = len(tasks)
        while running:
            got = await queue.get()
            if isinstance(got, Exception):
                raise got
            if got is None:
                running -= 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

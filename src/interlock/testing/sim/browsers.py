"""Who asks the simulated fleet over HTTP: slow readers, readers who leave, and readers whose front dies and who take the answer up
again at their cursor.

What an answer must be is computed from its prompt and from the weights that it names. Its text is one function of its tokens,
wherever it was cut.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import msgspec

from interlock.testing.sim.checks import Reading
from interlock.testing.sim.host import SimHost
from interlock.testing.sim.http import Answered, ask, events_in
from interlock.testing.sim.tokens import impossible_token
from interlock.testing.sim.vocabulary import text_model
from interlock.text.stream import TextStream

if TYPE_CHECKING:
    from interlock.testing.sim.worlds import World

MODEL_NAME = "made-up"
WORDS = ("signal", "lever", "grüße", "route", "point", "日本", "block")
EXCUSED = {
    429: ("overloaded",),
    500: ("engine_failed", "cannot_continue", "slow_reader"),
    503: ("no_engine", "no_member", "stopped", "closed", "aborted"),
    504: ("deadline",),
}
"""Named ends that a request may have while faults go on."""
GONE = {404: ("not_found",), 409: ("taken_up",), 410: ("gone", "not_taken_up")}
"""What a stream that is taken up may be."""
LEFT_TOKENS, LEAVES_AFTER = 400, 5
"""Who leaves had asked for much: it would still run at the end, if it were not aborted."""
READ_SECONDS_MAX = 12.0
TAKE_UP_TRIES, TRY_SECONDS = 12, 0.5
BROKEN = (OSError, EOFError)


def address_of(front: str) -> str:
    return f"unix:/run/{front}.http"


class Asked(msgspec.Struct):
    """One answer as its client has it."""

    chat: bool
    stream: bool
    reading: Reading
    id: str = ""
    text: str = ""
    finish: str = ""
    whole: bool = False
    """It came to its end, by its own word."""
    over: bool = False
    """It ended by a name, or is not to be had any more."""
    left: bool = False
    taken_up: bool = False


async def _next(parts: AsyncGenerator[Answered | bytes, None]) -> Answered | bytes | None:
    """None at the end. A connection on which nothing comes may be half-open: it is given up."""
    async with asyncio.timeout(READ_SECONDS_MAX):
        return await anext(parts, None)


class Browser:
    """One client of one front."""

    def __init__(self, world: World, host: SimHost, front: str, number: int) -> None:
        self._world, self._host, self._front, self._number = world, host, front, number
        self._rng = host.process.kernel.rng
        self._unheard = any(
            fault.kind == "half-open" and host.process.name in (fault.target, fault.other)
            for fault in world.faults
        )
        """Nobody may tell the front that its client has left."""

    async def run(self) -> None:
        while not self._world.calm:
            await self._host.clock.sleep_s(self._rng.expovariate(1.5))
            await self._ask(leaves=self._rng.random() < 0.15)
            if self._rng.random() < 0.2:
                await self._look()
        if self._number == 0:
            while self._world.left:  # else nobody would see that one of them runs on: it dies with its front
                await self._host.clock.sleep_s(0.3)
            while not await self._drill() or not (await self._ask(leaves=False)).whole:
                await self._host.clock.sleep_s(0.3)
            self._world.probed(self._host.process.name)

    async def _drill(self) -> bool:
        """Nothing fails any more but this front, in the middle of a long answer: whether all of it came."""
        return (await self._ask(leaves=False, kills=True)).whole

    # --- asking ----------------------------------------------------------------------------------------------------

    async def _ask(self, *, leaves: bool, kills: bool = False) -> Asked:
        chat, stream = self._rng.random() < 0.4, kills or self._rng.random() < 0.8
        much = 40 if self._unheard else LEFT_TOKENS
        limit = much if leaves else 60 if kills else 1 + int(self._rng.random() * 40)
        prompt = [300 + int(self._rng.random() * 1000) for _ in range(1 + int(self._rng.random() * 8))]
        front = self._world.kernel.processes.get(self._front)
        if front is None:
            return Asked(chat, stream, Reading(self._host.process, [], 0), over=True)
        asked = Asked(chat, stream, Reading(front, [] if chat else prompt, limit, leaves=leaves))
        body: dict[str, Any] = {
            "model": MODEL_NAME, "max_tokens": limit, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "stream": stream,
        }  # fmt: skip
        if stream:
            body["stream_options"] = {"include_usage": True}
        if chat:
            words = [WORDS[int(self._rng.random() * len(WORDS))] for _ in prompt]
            body["messages"] = [{"role": "user", "content": " ".join(words)}]
        else:
            body["prompt"] = prompt
        path = "/v1/chat/completions" if chat else "/v1/completions"
        await self._hear(asked, "POST", path, msgspec.json.encode(body), kills=kills)
        for _ in range(TAKE_UP_TRIES):
            if asked.whole or asked.over or asked.left or not asked.id or not stream:
                break
            await self._host.clock.sleep_s(self._rng.random() * TRY_SECONDS)
            after = len(asked.reading.tokens)
            self._note(f"takes {asked.id} up after {after} tokens")
            await self._hear(asked, "GET", f"/interlock/streams/{asked.id}?after={after}")
            asked.taken_up = True
        self._judge(asked)
        return asked

    async def _hear(
        self, asked: Asked, method: str, target: str, body: bytes = b"", *, kills: bool = False
    ) -> None:
        """What comes on one connection, until its end or the connection's."""
        front = self._world.kernel.processes.get(self._front)
        buffer, status = bytearray(), 0
        try:
            async with contextlib.aclosing(
                ask(self._host, address_of(self._front), method, target, body=body)
            ) as parts:
                while (part := await _next(parts)) is not None:
                    if isinstance(part, Answered):
                        status, asked.id = part.status, part.headers.get("x-request-id", asked.id)
                        self._opened(asked)
                        continue
                    buffer += part
                    if status == 200 and asked.stream:
                        for event in events_in(buffer):
                            self._event(asked, event)
                    if asked.reading.leaves and (
                        len(asked.reading.tokens) > LEAVES_AFTER or not asked.stream
                    ):
                        self._leaves(asked)
                        return
                    if kills and front is not None and len(asked.reading.tokens) >= 3 and not front.dead:
                        self._note("sees the death of its front, on purpose")
                        front.end(-9)
                    if self._rng.random() < 0.1:
                        await self._host.clock.sleep_s(self._rng.random() * 0.5)
            if status == 200 and not asked.stream:
                self._whole(asked, bytes(buffer))
            elif status != 200:
                self._refused(asked, method, status, bytes(buffer))
        except BROKEN:
            pass  # the connection broke; nothing was said

    def _leaves(self, asked: Asked) -> None:
        asked.left = True
        front = asked.reading.front
        if not self._unheard and not front.dead:
            self._note(f"leaves {asked.id}")
            self._world.left[f"{asked.id}-0"] = front, self._world.kernel.loop.time()

    def _opened(self, asked: Asked) -> None:
        front = self._world.kernel.processes.get(self._front)
        if asked.id and front is not None and not front.dead:
            asked.reading.front = front
            self._world.open[f"{asked.id}-0"] = asked.reading

    def _event(self, asked: Asked, event: bytes) -> None:
        if event == b"[DONE]":
            asked.whole = True
            return
        said = msgspec.json.decode(event)
        if "error" in said:
            self._named(asked, 500, said["error"])
            return
        self._said(asked, said, "delta")

    def _whole(self, asked: Asked, body: bytes) -> None:
        self._said(asked, msgspec.json.decode(body), "message")
        asked.whole = True

    def _said(self, asked: Asked, said: dict[str, Any], part: str) -> None:
        reading = asked.reading
        if asked.chat and "prompt_token_ids" in said:
            reading.prompt = said["prompt_token_ids"]
        for choice in said["choices"]:
            asked.text += (choice[part].get("content") or "") if asked.chat else choice["text"]
            reading.tokens += choice.get("token_ids") or []
            asked.finish = choice["finish_reason"] or asked.finish
        for span in ((said.get("usage") or {}).get("weights") or [[]])[0]:
            reading.versions += [span["version"]] * span["tokens"]

    def _refused(self, asked: Asked, method: str, status: int, body: bytes) -> None:
        error = msgspec.json.decode(body)["error"]
        if method == "GET" and error["code"] in GONE.get(status, ()):
            asked.over = True
            self._note(f"cannot take {asked.id} up: {error['code']}")
            if asked.reading.promised and not self._world.spoilt:
                self._world.violation(
                    f"answer {asked.id} is lost, and the fleet was reported SUSPENDED with it"
                )
        elif method == "POST" or status != 503:  # else it is asked for again
            self._named(asked, status, error)

    def _named(self, asked: Asked, status: int, error: dict[str, Any]) -> None:
        asked.over = True
        self._note(f"was told {status} {error['code']} of {asked.id or 'a request'}")
        known = [code for codes in EXCUSED.values() for code in codes]
        if error["code"] not in known or (status != 500 and error["code"] not in EXCUSED.get(status, ())):
            self._world.violation(f"{self._host.process} was told {status}: {error}")

    def _note(self, words: str) -> None:
        self._world.kernel.note(f"{self._host.process} {words}")

    # --- judging ---------------------------------------------------------------------------------------------------

    def _judge(self, asked: Asked) -> None:
        reading = asked.reading
        self._world.open.pop(f"{asked.id}-0", None)
        if not asked.whole:
            wrong = impossible_token(reading.prompt, reading.tokens, self._world.promises.order)
            if wrong is not None:
                self._world.violation(f"answer {asked.id} began with {reading.tokens}: {wrong}")
            return
        if asked.taken_up:
            self._note(f"has all {len(reading.tokens)} tokens of {asked.id}")
        self._world.delivered(asked.id, reading, asked.finish)
        stream = TextStream(text_model(), prompt=reading.prompt)
        text = stream.push(reading.tokens) + stream.finish()
        if text != asked.text:
            self._world.violation(f"answer {asked.id} is {asked.text!r}, and its tokens are {text!r}")
        self._world.served += asked.finish == "length"

    # --- the other pages -------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Anybody may ask how it is; the answer is one of two, and comes though nobody else is there."""
        status, said = 0, bytearray()
        try:
            async with contextlib.aclosing(
                ask(self._host, address_of(self._front), "GET", "/health")
            ) as parts:
                while (part := await _next(parts)) is not None:
                    if isinstance(part, Answered):
                        status = part.status
                    else:
                        said += part
        except BROKEN:
            return
        word = msgspec.json.decode(bytes(said))["status"]
        if (status == 200) != (word in ("running", "paused")) or status not in (200, 503):
            self._world.violation(f"{self._front} answers /health with {status} and {word}")

"""Transfer engines in real processes, under what real processes suffer: opens that cross, SIGKILL, SIGSTOP, restarts, a thousand at once.

    python -m interlock.testing.transfer_storms                   # the long runs: `make long`
    await two_that_open_at_once(directory, rounds=100)            # the same, shorter, in tests

Each returns what it saw, and raises `AssertionError` when a promise was broken: one connection that both agree on, no hang, no descriptor
left, the right bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

ANSWER_SECONDS_MAX = 60.0
START_SECONDS_MAX = 60.0


class PeerProcess:
    """One `transfer_peer`, and what it is asked."""

    def __init__(self, config: dict[str, Any], *, prefix: Sequence[str] = ()) -> None:
        self._config, self._prefix = config, list(prefix)
        self._process: asyncio.subprocess.Process | None = None
        self.names: list[str] = config["names"]

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._prefix,
            sys.executable,
            "-m",
            "interlock.testing.transfer_peer",
            json.dumps(self._config),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        await self._answer(START_SECONDS_MAX)

    async def ask(self, do: str, hang_s: float = ANSWER_SECONDS_MAX, **order: Any) -> dict[str, Any]:
        """Raises `AssertionError` when it does not answer: that is a hang."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **order}).encode() + b"\n")
        return await self._answer(hang_s)

    async def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise AssertionError(f"{self.names[0]} hangs: no answer within {timeout_s} s") from None
        assert line, f"{self.names[0]} ended with {await self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def leave(self) -> int:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            return await self._process.wait()


@contextlib.asynccontextmanager
async def processes(directory: Path, groups: Sequence[Sequence[str]], lanes: Sequence[str]) -> Any:
    """One process for each group of names; all know each other's addresses."""
    os.chmod(directory, 0o700)
    addresses = {name: f"unix:{directory}/{name}.sock" for group in groups for name in group}
    made = [
        PeerProcess({"names": list(group), "addresses": addresses, "lanes": list(lanes)}) for group in groups
    ]
    try:
        await asyncio.gather(*(each.start() for each in made))
        yield made
    finally:
        await asyncio.gather(*(each.kill() for each in made))


def check_agreement(answers: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> None:
    """Each pair holds one connection, and both sides name it alike."""
    stamps = {key: value for answer in answers for key, value in answer["stamps"].items()}
    for one, two in pairs:
        mine, theirs = stamps.get(f"{one} {two}"), stamps.get(f"{two} {one}")
        assert mine is not None, f"{one} is not connected with {two}"
        assert theirs is not None, f"{two} is not connected with {one}"
        assert mine == theirs[::-1], f"crossed: {one} {mine}, {two} {theirs}"


async def two_that_open_at_once(
    directory: Path, rounds: int, lanes: Sequence[str] = ("tcp",), seed: int = 0
) -> dict[str, Any]:
    """Both retire, by turns or together, then both open at once: `rounds` times."""
    dice = random.Random(seed)
    async with processes(directory, [["a"], ["b"]], lanes) as (a, b):
        await asyncio.gather(a.ask("held"), b.ask("held"))
        seconds, held_first = [], [0, 0]
        for number in range(rounds):
            which = dice.randrange(3)
            if which != 0:
                await a.ask("retire", pairs=[["a", "b"]])
            if which != 1:
                await b.ask("retire", pairs=[["b", "a"]])
            answers = await asyncio.gather(
                a.ask("open", pairs=[["a", "b"]], timeout_s=9.0),
                b.ask("open", pairs=[["b", "a"]], timeout_s=9.0),
            )
            for answer in answers:
                assert not answer["errors"], f"round {number}: {answer['errors']}"
            seconds.append(max(answer["seconds"] for answer in answers))
            if number % 10 == 0 or number == rounds - 1:
                await _agree_soon([a, b], [("a", "b")])
                for each, pair in ((a, ["a", "b"]), (b, ["b", "a"])):
                    read = await each.ask("read", pairs=[pair], timeout_s=5.0)
                    assert not read["errors"], read
                    assert not read["wrong"], read
            if number == min(9, rounds - 1):
                held_first = [(await each.ask("held"))["descriptors"] for each in (a, b)]
        await _settle([a, b], held_first)
        assert [await each.leave() for each in (a, b)] == [0, 0]
    seconds.sort()
    return {
        "rounds": rounds,
        "p50_ms": 1e3 * seconds[len(seconds) // 2],
        "p99_ms": 1e3 * seconds[int(len(seconds) * 0.99)],
    }


async def _agree_soon(all_of_them: Sequence[PeerProcess], pairs: Sequence[tuple[str, str]]) -> None:
    """A side may retire once more in the moment in which the other opened; then they agree on the next."""
    for last in (*[False] * 20, True):
        answers = await asyncio.gather(*(each.ask("stamps") for each in all_of_them))
        try:
            check_agreement(answers, pairs)
            return
        except AssertionError:
            if last:
                raise
        await asyncio.sleep(0.05)
        for each in all_of_them:
            wanted = [[one, two] for one, two in pairs if one in each.names]
            wanted += [[two, one] for one, two in pairs if two in each.names]
            await each.ask("open", pairs=wanted, timeout_s=9.0)


async def _settle(all_of_them: Sequence[PeerProcess], wanted: Sequence[int], spare: int = 6) -> None:
    """No descriptor more than in the beginning, as soon as old lanes and channels are closed."""
    held: list[int] = []
    for _ in range(60):
        held = [(await each.ask("held"))["descriptors"] for each in all_of_them]
        if all(now <= first + spare for now, first in zip(held, wanted, strict=True)):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"descriptors are left: {held}, in the beginning {list(wanted)}")


async def all_to_all(
    directory: Path, peers: int, rounds: int, lanes: Sequence[str] = ("shm", "tcp"), seed: int = 0
) -> dict[str, Any]:
    """Everybody opens to everybody and reads, while one is killed and started anew, or frozen and thawed: `rounds` times."""
    dice = random.Random(seed)
    names = [f"p{number:02}" for number in range(peers)]
    pairs = list(itertools.combinations(names, 2))
    counted = {"kills": 0, "stops": 0, "reads": 0}
    async with processes(directory, [[name] for name in names], lanes) as all_of_them:
        for number in range(rounds):
            victim = dice.choice(all_of_them)
            others = [each for each in all_of_them if each is not victim]
            busy = [
                asyncio.create_task(
                    each.ask(
                        "read",
                        pairs=[[each.names[0], name] for name in names if name != each.names[0]],
                        timeout_s=2.0,
                    )
                )
                for each in others
            ]
            await asyncio.sleep(dice.random() * 0.05)
            if dice.random() < 0.5:
                counted["kills"] += 1
                await victim.kill()
                await victim.start()
            else:
                counted["stops"] += 1
                victim.signal(signal.SIGSTOP)
                await asyncio.sleep(dice.choice([0.05, 0.5, 6.0 if number % 10 == 0 else 0.2]))
                victim.signal(signal.SIGCONT)
            for answer in await asyncio.gather(*busy):  # who failed, failed by its deadline, by name
                assert not answer["wrong"], answer["wrong"]
            await _all_read(all_of_them, names, number)
            counted["reads"] += len(names) * (len(names) - 1)
        for each in all_of_them:
            await each.ask(
                "open", pairs=[[each.names[0], n] for n in names if n != each.names[0]], timeout_s=9.0
            )
        await _agree_soon(all_of_them, pairs)
        held = [(await each.ask("held"))["descriptors"] for each in all_of_them]
        await asyncio.sleep(1.0)
        await _settle(all_of_them, [min(held) + 10] * len(held))
        assert {await each.leave() for each in all_of_them} == {0}
    return {"rounds": rounds, "peers": peers, **counted, "descriptors_max": max(held)}


async def _all_read(all_of_them: Sequence[PeerProcess], names: Sequence[str], number: int) -> None:
    """After healing everybody reads from everybody, the right bytes, without anybody's help: twice at most."""
    errors: list[str] = []
    for _ in range(2):  # a frozen one's first answer may be that its endpoint was retired meanwhile
        answers = await asyncio.gather(
            *(
                each.ask(
                    "read",
                    pairs=[[each.names[0], name] for name in names if name != each.names[0]],
                    timeout_s=15.0,
                )
                for each in all_of_them
            )
        )
        for answer in answers:
            assert not answer["wrong"], answer["wrong"]
        errors = [error for answer in answers for error in answer["errors"]]
        if not errors:
            return
    one, two = errors[0].split(":")[0].split(" -> ")
    words = [
        (await each.ask("explain", who=who, peer=peer))["words"]
        for who, peer in ((one, two), (two, one))
        for each in all_of_them
        if who in each.names
    ]
    raise AssertionError(f"round {number}: {len(errors)} fail after healing: {errors[:3]}; {words}")


async def a_thousand_at_once(
    directory: Path,
    peers: int,
    in_processes: int = 4,
    spread_s: float = 0.05,
    lanes: Sequence[str] = ("tcp",),
) -> dict[str, Any]:
    """`peers` engines ask one hub to open within `spread_s`: all are connected by their deadline, none twice."""
    names = [f"p{number:04}" for number in range(peers)]
    groups = [["hub"], *(names[number::in_processes] for number in range(in_processes))]
    async with processes(directory, groups, lanes) as (hub, *others):
        answers = await asyncio.gather(
            *(
                each.ask(
                    "open", pairs=[[name, "hub"] for name in each.names], timeout_s=10.0, spread_s=spread_s
                )
                for each in others
            )
        )
        errors = [error for answer in answers for error in answer["errors"]]
        assert not errors, f"{len(errors)} were not connected by their deadline: {errors[:3]}"
        for _ in range(100):
            stamps = [await each.ask("stamps") for each in (hub, *others)]
            if len(stamps[0]["stamps"]) == peers:
                break
            await asyncio.sleep(0.1)
        check_agreement(stamps, [("hub", name) for name in names])
        for value in stamps[0]["stamps"].values():
            attempts = [int(stamp.split("/")[1]) % 1_000_000 for stamp in value]
            assert attempts == [0, 0], f"somebody was connected twice: {value}"
        each_s = sorted(seconds for answer in answers for seconds in answer["each_s"])
        held = await hub.ask("held")
    return {
        "peers": peers,
        "p50_ms": 1e3 * each_s[len(each_s) // 2],
        "p99_ms": 1e3 * each_s[int(len(each_s) * 0.99)],
        "last_ms": 1e3 * each_s[-1],
        **held,
    }


async def _run(arguments: argparse.Namespace) -> None:
    storms: dict[str, Callable[[Path], Awaitable[dict[str, Any]]]] = {
        "opens": lambda d: two_that_open_at_once(d, arguments.opens),
        "all-to-all": lambda d: all_to_all(d, 16, arguments.rounds, seed=arguments.seed),
        "at-once": lambda d: a_thousand_at_once(d, arguments.peers),
    }
    for name, storm in storms.items():
        if arguments.only not in ("", name):
            continue
        with tempfile.TemporaryDirectory(prefix="itl") as directory:
            begun_s = time.monotonic()
            seen = await storm(Path(directory))
            print(
                json.dumps({"storm": name, **seen, "took_s": round(time.monotonic() - begun_s, 1)}),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="transfer_storms", description=__doc__)
    parser.add_argument("--opens", type=int, default=10_000, help="simultaneous opens between two peers")
    parser.add_argument("--rounds", type=int, default=200, help="all-to-all of 16, with a fault each")
    parser.add_argument("--peers", type=int, default=1000, help="peers that open within 50 ms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", choices=["", "opens", "all-to-all", "at-once"])
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()

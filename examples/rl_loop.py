"""A trainer's loop over a fleet: pause, train, update, unpause, again and again, with an engine killed on the way.

    python examples/rl_loop.py                     20 rounds over two Transformers engines that it starts itself
    python examples/rl_loop.py --port 8000         over a fleet that runs already (`interlock serve --engine transformers`)

Rollouts are asked for all the time, by threads that know nothing of training: pauses freeze their streams, and the engine that is
killed in round 7 takes some of them along, which go on elsewhere. Each answer says which weights made which of its tokens
(`usage.weights`). That is checked twice: by order (never older than what was in force when it was asked), and by value: the trainer
computes every token again with the weights that are named, and with the ones before, which must not do as well.

Exit status 0: all of it held. The "policy gradient" here is plain next-token loss on documentation strings: the loop is the example.
"""

from __future__ import annotations

import argparse
import http.client
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import interlock

OWNER = "trainer"
PROMPT_TOKENS, ANSWER_TOKENS = 48, 48
ASKERS = 4
CHECKED_PER_ROUND = 4
TIE = 1e-3
"""Logits closer than this are a tie in float32: either token is right."""
START_SECONDS, COMMAND_SECONDS, ANSWER_SECONDS = 300.0, 180.0, 240.0


@dataclass
class Answer:
    """One rollout. `floor` and `ceiling`: the versions that were in force when it was asked and when it came."""

    prompt: list[int]
    tokens: list[int]
    spans: list[tuple[int, int]]
    """(version, tokens in a row made by it)"""
    floor: int
    ceiling: int


@dataclass
class Faults:
    """What did not hold, in sentences."""

    found: list[str] = field(default_factory=list)

    def expect(self, holds: bool, words: str) -> None:
        if not holds:
            self.found.append(words)


# --- rollouts: threads that ask, and know nothing of training ----------------------------------------------------


class Rollouts:
    """`floor`: the last version whose update had ended, `ceiling`: the last that had begun; the trainer moves them."""

    def __init__(self, port: int, model: str, prompts: list[list[int]], faults: Faults) -> None:
        self._port, self._model, self._prompts, self._faults = port, model, prompts, faults
        self.floor = self.ceiling = 0
        self._answers: list[Answer] = []
        self._came = threading.Condition()
        self._over = False
        self._threads = [threading.Thread(target=self._ask_on, args=(n,), daemon=True) for n in range(ASKERS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def take(self, at_least: int) -> list[Answer]:
        """Waits for so many answers, and returns all that came since the last call."""
        with self._came:
            enough = self._came.wait_for(lambda: len(self._answers) >= at_least, ANSWER_SECONDS)
            self._faults.expect(enough, f"no {at_least} answers came within {ANSWER_SECONDS:.0f} s")
            taken, self._answers = self._answers, []
            return taken

    def end(self) -> list[Answer]:
        self._over = True
        for thread in self._threads:
            thread.join(ANSWER_SECONDS)
        return self._answers

    def _ask_on(self, number: int) -> None:
        turn = number
        while not self._over:
            prompt = self._prompts[turn % len(self._prompts)]
            turn += ASKERS
            floor = self.floor
            try:
                answer = self._ask(prompt, floor)
            except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
                self._faults.expect(False, f"a rollout failed: {type(error).__name__}: {error}")
                time.sleep(1.0)
                continue
            with self._came:
                self._answers.append(answer)
                self._came.notify_all()

    def _ask(self, prompt: list[int], floor: int) -> Answer:
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0.0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_SECONDS)
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
            )
            response = connection.getresponse()
            said: dict[str, Any] = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}: {said['error']['message']}")
        spans = [(int(span["version"].lstrip("v")), span["tokens"]) for span in said["usage"]["weights"][0]]
        return Answer(prompt, said["choices"][0]["token_ids"], spans, floor, self.ceiling)


# --- the trainer -------------------------------------------------------------------------------------------------


class Trainer:
    """A few steps of next-token loss at a time; keeps the last four versions to check answers with."""

    def __init__(self, model: Path, texts: list[list[int]], folder: Path) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(7)
        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._source, self._folder, self._texts = model, folder, texts
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.05)
        self._kept = {0: self._weights()}
        self._step = 0

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}

    def train(self, steps: int, version: int) -> float:
        """The last loss."""
        loss = torch.zeros(())
        for _ in range(steps):
            batch = torch.tensor([self._texts[(self._step + i) % len(self._texts)] for i in range(2)])
            self._step += 2
            loss = self._model(input_ids=batch, labels=batch).loss
            self._optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
        self._kept[version] = self._weights()
        for old in [known for known in self._kept if known < version - 3]:
            del self._kept[old]
        return float(loss.detach())

    def save(self, version: int) -> Path:
        """A checkpoint directory, whole before it has its name; those that no engine needs any more are removed."""
        made, target = self._folder / f".v{version}", self._folder / f"v{version}"
        shutil.copytree(self._source, made, ignore=shutil.ignore_patterns("*.safetensors"))
        tensors = {name: tensor.contiguous() for name, tensor in self._kept[version].items()}
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        made.rename(target)
        shutil.rmtree(self._folder / f"v{version - 2}", ignore_errors=True)
        return target

    def knows(self, answer: Answer) -> bool:
        return all(version in self._kept for version, _ in answer.spans)

    @torch.no_grad()
    def wrong_tokens(self, answer: Answer, shift: int = 0) -> int | None:
        """How many of its tokens are not what greedy decoding by the named weights gives; `shift` -1: by those before them.
        None: those are not known any more."""
        wrong, at = 0, 0
        for version, count in answer.spans:
            weights = self._kept.get(version + shift)
            if weights is None:
                return None
            ids = torch.tensor([answer.prompt + answer.tokens[: at + count]])
            logits = torch.func.functional_call(self._model, weights, (), {"input_ids": ids}).logits[0]
            first = len(answer.prompt) + at
            for place, token in enumerate(answer.tokens[at : at + count], start=first - 1):
                wrong += bool(logits[place, token] < logits[place].max() - TIE)
            at += count
        return wrong


# --- checking ----------------------------------------------------------------------------------------------------


def check_order(answer: Answer, faults: Faults) -> None:
    versions = [version for version, _ in answer.spans]
    said = f"an answer was made by {answer.spans}, asked at v{answer.floor}, come at v{answer.ceiling}"
    faults.expect(sum(count for _, count in answer.spans) == len(answer.tokens), f"spans miss tokens: {said}")
    faults.expect(len(answer.tokens) == ANSWER_TOKENS, f"{len(answer.tokens)} tokens: {said}")
    faults.expect(versions == sorted(set(versions)), f"versions do not rise: {said}")
    faults.expect(answer.floor <= min(versions), f"older weights than were in force: {said}")
    faults.expect(max(versions) <= answer.ceiling, f"weights that did not exist yet: {said}")


def check_values(answers: list[Answer], trainer: Trainer, faults: Faults) -> tuple[int, int]:
    """(answers computed again, those among them that other weights would have made otherwise). Crossing ones first."""
    known = [answer for answer in answers if trainer.knows(answer)]
    known.sort(key=lambda answer: -len(answer.spans))
    told_apart = 0
    for answer in known[:CHECKED_PER_ROUND]:
        wrong = trainer.wrong_tokens(answer)
        faults.expect(
            wrong == 0, f"{wrong} of {len(answer.tokens)} tokens are not by the weights named: {answer.spans}"
        )
        told_apart += bool(trainer.wrong_tokens(answer, shift=-1))
    return len(known[:CHECKED_PER_ROUND]), told_apart


# --- the loop ----------------------------------------------------------------------------------------------------


def loop(
    asked: argparse.Namespace, port: int, model: Path, served: str, folder: Path, faults: Faults
) -> None:
    fleet = interlock.connect_blocking(port)
    texts = documents(model)
    trainer = Trainer(model, texts, folder)
    rollouts = Rollouts(port, served, [text[:PROMPT_TOKENS] for text in texts], faults)
    rollouts.start()
    print(
        f"\n{'round':>5} {'loss':>7} {'pause':>8} {'update':>8} {'answers':>8} {'crossed':>8} {'checked':>8}"
    )
    told_apart = crossed = 0
    for number in range(1, asked.rounds + 1):
        answers = rollouts.take(ASKERS)
        note = kill_one(fleet) if number == asked.kill_in else ""
        begun = time.monotonic()
        with fleet.paused(owner=OWNER, timeout_s=COMMAND_SECONDS) as pause:
            paused_s = time.monotonic() - begun
            loss = trainer.train(asked.steps, number)
            rollouts.ceiling = number
            begun = time.monotonic()
            pause.update_weights(f"v{number}", trainer.save(number), timeout_s=COMMAND_SECONDS)
            updated_s = time.monotonic() - begun
        rollouts.floor = number
        crossing = [answer for answer in answers if len(answer.spans) > 1]
        for answer in answers:
            check_order(answer, faults)
        checked, differing = check_values(answers, trainer, faults)
        crossed, told_apart = crossed + len(crossing), told_apart + differing
        print(
            f"{number:>5} {loss:>7.3f} {paused_s:>6.2f} s {updated_s:>6.2f} s {len(answers):>8} {len(crossing):>8} "
            f"{checked:>8}  {note}".rstrip(),
            flush=True,
        )
    for answer in rollouts.end():
        check_order(answer, faults)
    faults.expect(crossed > 0, "no answer lived through an update, so none was shown to")
    faults.expect(told_apart > 0, "older weights would have made the same tokens, so nothing was shown")
    wait_for_all(fleet, asked, faults)
    print(f"\n{crossed} answers lived through an update; {told_apart} that were checked tell weights apart")


def kill_one(fleet: interlock.BlockingFleetClient) -> str:
    """SIGKILL to the last engine, in the middle of its streams."""
    victim = fleet.status().members[-1]
    os.kill(victim.facts.pid, signal.SIGKILL)
    return f"{victim.name} killed (process {victim.facts.pid})"


def wait_for_all(fleet: interlock.BlockingFleetClient, asked: argparse.Namespace, faults: Faults) -> None:
    """Every engine runs again in the end, with the last weights."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        status = fleet.status()
        there = [m for m in status.members if m.state == "RUNNING" and m.version == f"v{asked.rounds}"]
        if len(there) >= asked.engines or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    faults.expect(len(there) >= asked.engines, f"only {len(there)} of {asked.engines} engines run in the end")


def documents(model: Path) -> list[list[int]]:
    """What standard modules say of themselves, cut to one length."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    modules = (argparse, http.client, inspect, json, shutil, socket, subprocess, tempfile, threading)
    members = [member for module in modules for _, member in inspect.getmembers(module, inspect.isclass)]
    texts = sorted({inspect.getdoc(member) or "" for member in members}, key=len, reverse=True)
    encoded = [tokenizer.encode(text)[: 2 * PROMPT_TOKENS] for text in texts]
    return [ids for ids in encoded if len(ids) == 2 * PROMPT_TOKENS][:16]


# --- a fleet of one's own ----------------------------------------------------------------------------------------


@contextmanager
def own_fleet(model: Path, engines: int) -> Iterator[int]:
    """`interlock serve` in a child process, on a free port; gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "interlock"]
    shape = ["--engine", f"transformers:{engines}", "--served-model-name", "policy", "--port", str(port)]
    child = subprocess.Popen([*command, "serve", str(model), *shape])
    try:
        wait_until_ready(child, port, engines)
        yield port
    finally:
        child.terminate()
        child.wait(30)


def wait_until_ready(child: subprocess.Popen[bytes], port: int, engines: int) -> None:
    fleet, deadline = interlock.connect_blocking(port), time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise SystemExit(f"the fleet did not start (exit status {child.returncode})")
        try:
            members = fleet.status().members
            if [member.state for member in members].count("RUNNING") >= engines and answers(port):
                return
        except (OSError, TimeoutError, interlock.InterlockError):
            pass
        time.sleep(0.25)
    raise SystemExit(f"the fleet was not ready after {START_SECONDS:.0f} s")


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    finally:
        connection.close()


def demo_model() -> Path:
    from interlock.engines.demo_model import build_demo_model

    return build_demo_model()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kill-in", type=int, default=7, metavar="ROUND", help="0: nobody is killed")
    parser.add_argument("--steps", type=int, default=3, help="of training, each round")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--model", type=Path, help="checkpoint directory (default: the demo model)")
    parser.add_argument("--port", type=int, help="of a fleet that runs already (default: one is started)")
    parser.add_argument("--served-model-name", default="demo", help="what that fleet calls the model")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the fleet does not outlive us
    model, faults = asked.model or demo_model(), Faults()
    with tempfile.TemporaryDirectory(prefix="rl-loop-") as folder:
        try:
            if asked.port is not None:
                loop(asked, asked.port, model, asked.served_model_name, Path(folder), faults)
            else:
                with own_fleet(model, asked.engines) as port:
                    loop(asked, port, model, "policy", Path(folder), faults)
        except (interlock.InterlockError, OSError) as error:  # a command failed, or nobody answered in time
            faults.expect(False, f"the loop ended early: {error}")
    for fault in faults.found[:20]:
        print(f"FAULT: {fault}")
    print("all held" if not faults.found else f"{len(faults.found)} faults")
    return 1 if faults.found else 0


if __name__ == "__main__":
    sys.exit(main())

"""The simulator finds bugs of the kinds that systems like this one have had: a checker that finds none proves nothing."""

from __future__ import annotations

import msgspec
import pytest
from planting import Plant, plant

from interlock.testing.sim.faults import Fault, Shape

THERE_AND_BACK = (
    Fault(2.0, "cut", "engine-0", "coordinator", 5.5),
    Fault(4.0, "cut", "engine-1", "coordinator", 7.0),
    Fault(6.0, "one-way-cut", "engine-0", "front-0", 3.7),
)
"""A request leaves a suspected engine, comes back to it, and what its first attempt said arrives late, on the same connection."""
TWO_ENGINES = Shape(
    engines=2,
    fronts=1,
    kv_engines=1,
    ranks=1,
    spread=False,
    shuffle=True,
    run_s=14.0,
    step_s=0.1,
    stop=False,
    quiet=True,
)
COMMANDED = msgspec.structs.replace(TWO_ENGINES, quiet=False, weights=True, run_s=20.0, step_s=0.03)
"""Two people who update, suspend and resume it."""
PLANTS = [
    Plant(
        story="an old attempt is heard: its words are taken for those of the new one",
        where="interlock.fleet.ledger:Ledger.accept",
        old="if delta.attempt != entry.attempt or entry.life is None:",
        new="if entry.life is None:",
        kinds=(),
        found_at=4,
        seeds_max=40,
        plan=THERE_AND_BACK,
        shape=TWO_ENGINES,
    ),
    Plant(
        story="a lost wake-up in a channel: what comes while its reader looks away waits for the next message",
        where="interlock.wire.duplex:Channel.messages",
        old="self._inbox_filled.clear()",
        new="await asyncio.sleep(0.001)\n        self._inbox_filled.clear()",
        kinds=(),
        found_at=0,
        seeds_max=40,
    ),
    Plant(
        story="a report for a node that the rank is not attached to yet is dropped (this one was ours, found by seed 0)",
        where="interlock.store.keeper:Keeper.promise",
        old="and node <= self._last_node",
        new="",
        kinds=(),
        found_at=28,
        seeds_max=60,
        shape=msgspec.structs.replace(TWO_ENGINES, clients=True, ranks=2, kv_engines=2),
    ),
    Plant(
        story="a flipped bit is acted upon: state files are believed whatever their checksum says",
        where="interlock.host.sealed:_checksum",
        old="hashlib.blake2b(body, digest_size=16).hexdigest().encode()",
        new='b"0" * 32',
        kinds=(),
        found_at=20,
        seeds_max=60,
        plan=[
            Fault(float(at), what, "coordinator")
            for at in (3, 5, 7, 9, 11, 13)
            for what in ("bit-flip", "crash")
        ],
        shape=msgspec.structs.replace(TWO_ENGINES, quiet=False),
    ),
    Plant(
        story="fronts are not asked what they remember: a coordinator leads below their epoch for a day",
        where="interlock.core.commands:remembered",
        old="return _compare(fleet, target)",
        new="return fleet, ()",
        kinds=(),
        found_at=2,
        seeds_max=20,
        plan=(
            Fault(2.0, "clock-back", "host-a", detail="86400"),
            Fault(4.0, "crash", "engine-0"),
            Fault(4.0, "crash", "engine-1"),
            Fault(4.0, "state-lost", "coordinator"),
        ),
        shape=TWO_ENGINES,
    ),
    Plant(
        story="acknowledged before it is kept: a coordinator's decisions are not written down",
        where="interlock.fleet.coordinator:Coordinator._save",
        old="self._file.save(fleet, self._book.records(), members)",
        new="pass",
        kinds=("power",),
        found_at=0,
        seeds_max=40,
    ),
    Plant(
        story="a missing fsync: after a power cut a state file is empty or torn",
        where="interlock.host.files:RealFiles.write_durably",
        old="os.fsync(file.fileno())",
        new="pass",
        kinds=("power",),
        found_at=0,
        seeds_max=20,
    ),
    Plant(
        story="an end of a connection taken for an end of its process: its slots are given to others",
        where="interlock.store.node:Node._serve",
        old="member.connections -= 1",
        new="member.connections -= 1\n            self.store.process_gone(member)",
        kinds=("net",),
        found_at=19,
        seeds_max=60,
    ),
    Plant(
        story="a slot freed while its holders may still write: every abort is taken for a promise",
        where="interlock.store.blocks:BlockStore.abort",
        old="if never_given:",
        new="if True:",
        kinds=("freeze",),
        found_at=3,
        seeds_max=40,
    ),
    Plant(
        story="a leaked descriptor: one more for each rank that attaches",
        where="interlock.store.node:Node._attach",
        old="fds=(self._memory.fd,)",
        new="fds=(self._memory.open_read_only(),)",
        kinds=(),
        found_at=0,
        seeds_max=3,
    ),
    Plant(
        story="a block published before all its shards are written: the first report completes the join",
        where="interlock.store.blocks:BlockStore.start_write",
        old="shards,\n        life.layout.layers,\n        life.layout.heads,",
        new="shards[:1],\n        life.layout.layers,\n        shards[0].head_stop,",
        kinds=(),
        found_at=0,
        seeds_max=10,
    ),
    Plant(
        story="PAUSED is reported when the engine was told to pause, not when it stands",
        where="interlock.engines.member:Member._perform",
        old="await engine.pause(begin.mode)",
        new="asyncio.ensure_future(engine.pause(begin.mode))",
        kinds=(),
        found_at=1,
        seeds_max=20,
    ),
    Plant(
        story="a lost wake-up: an end that brings no token wakes nobody",
        where="interlock.fleet.generation:Generation.push",
        old="if tokens or finish:",
        new="if tokens:",
        kinds=(),
        found_at=1,
        seeds_max=10,
    ),
    Plant(
        story="a stream goes on where the engine was, not where the front is",
        where="interlock.engines.desk:Desk._resume",
        old="stream.sent = min(cursor.start, len(stream.tokens))",
        new="pass",
        kinds=("net",),
        found_at=7,
        seeds_max=60,
    ),
    Plant(
        story="an old connection's end is taken for the new one's: reconnects may overtake",
        where="interlock.engines.desk:Desk.serve",
        old="if front.channel is channel:",
        new="if True:",
        kinds=("net",),
        found_at=64,
        seeds_max=160,
    ),
    Plant(
        story="a half-open connection is believed for ever (this one was ours, found by seeds 33, 46 and 176)",
        where="interlock.wire.duplex:Channel._beat",
        old="if self._leased and",
        new="if False and",
        kinds=("net",),
        found_at=20,
        seeds_max=120,
    ),
    Plant(
        story="a forgotten epoch check: who stands where an older command wanted it counts as standing",
        where="interlock.core.roster:outcome",
        old="if record.standing == epoch:",
        new="if record.standing is not None:",
        kinds=(),
        found_at=0,
        seeds_max=10,
    ),
    Plant(
        story="a coordinator that lost its state forgets what its members remember",
        where="interlock.core.recovery:_gather",
        old="state=_most_restrictive(fleet.state, target.state),",
        new="state=fleet.state,",
        kinds=("wipe",),
        found_at=2,
        seeds_max=40,
    ),
    Plant(
        story="an engine's exit is seen and its requests are not taken elsewhere",
        where="interlock.fleet.requests:Requests.lost",
        old='self._failed(entry, f"{life} ended: {why}")',
        new="pass",
        kinds=("crash",),
        found_at=0,
        seeds_max=10,
    ),
    Plant(
        story="a continuation that repeats the last token: the prompt is cut one short",
        where="interlock.fleet.requests:Requests.dispatch_next",
        old="prompt, sampling = decision.prompt, decision.sampling",
        new="prompt, sampling = decision.prompt[:-1], decision.sampling",
        kinds=("crash",),
        found_at=0,
        seeds_max=10,
    ),
    Plant(
        story="a member serves before its update is done: the step is begun and not awaited",
        where="interlock.engines.member:Member._perform",
        old="await engine.update_weights(self._checkpoint(begin), begin.version, begin.kv)",
        new="asyncio.ensure_future(engine.update_weights(self._checkpoint(begin), begin.version, begin.kv))",
        kinds=(),
        found_at=0,
        seeds_max=10,
        shape=COMMANDED,
    ),
    Plant(
        story="a late joiner is served with old weights: it takes the fleet's version for its own",
        where="interlock.core.lifecycle:_hear",
        old="heard=target, failed=None",
        new="heard=target, failed=None, version=member.version if heard else target.version",
        kinds=(),
        found_at=0,
        seeds_max=20,
        plan=[Fault(float(at), "crash", "engine-0") for at in (5, 8, 11, 14)],
        shape=COMMANDED,
    ),
    Plant(
        story="a hold is released by another owner: any UNPAUSE lets the fleet run",
        where="interlock.core.commands:_unpause",
        old="_release(fleet, frozenset({owner}))",
        new="_release(fleet, frozenset(hold.owner for hold in fleet.holds))",
        kinds=(),
        found_at=0,
        seeds_max=10,
        shape=COMMANDED,
    ),
    Plant(
        story="a cached block crosses versions: salts name the tenant alone",
        where="interlock.fleet.requests:cache_salt",
        old=":{tenant}:{version}",
        new=":{tenant}:",
        kinds=(),
        found_at=0,
        seeds_max=20,
        shape=COMMANDED,
    ),
    Plant(
        story="an update that another overtook is reported as done (this one was ours)",
        where="interlock.fleet.command_book:_overtaken",
        old="if record.version is not None and record.version != fleet.version:",
        new="if False:",
        kinds=(),
        found_at=1,
        seeds_max=40,
        plan=[Fault(float(at), "cut", "engine-0", "coordinator", 2.5) for at in (2, 5, 8, 11, 14)],
        shape=COMMANDED,
    ),
    Plant(
        story="SUSPENDED is reported before fronts have their requests on disk",
        where="interlock.fleet.keeping:RequestsKeeper._turn",
        old="await self._save()",
        new="pass",
        kinds=(),
        found_at=20,
        seeds_max=40,
        shape=COMMANDED,
    ),
    Plant(
        story="memory is given up and never taken again: RESUME is reported when it was begun",
        where="interlock.engines.member:Member._perform",
        old="await engine.resume()",
        new="asyncio.ensure_future(engine.resume())",
        kinds=(),
        found_at=2,
        seeds_max=20,
        shape=COMMANDED,
    ),
]


@pytest.mark.simulator
@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", PLANTS, ids=[bug.story.split(":")[0].replace(" ", "-") for bug in PLANTS])
def test_a_planted_bug_is_found_within_its_number_of_seeds(
    bug: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(bug, monkeypatch)
    for seed in range(max(0, bug.found_at - 2), bug.seeds_max):
        if not bug.run(seed).ok:
            return
    pytest.fail(f"{bug.seeds_max} seeds did not find it: {bug.story}")

"""A rank (or a scheduler) in a process of its own, for tests: obeys one JSON line at a time on stdin and answers one on stdout."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import msgspec

from interlock.host.blocking import BlockingHost
from interlock.store.checksums import block_checksums, verify_block
from interlock.store.client import MatchResult, StoreClient, WriteGrant
from interlock.wire.identity import passing_identity
from interlock.wire.store_messages import Attach, Pin


class Rank:
    def __init__(self, address: str, attach: Attach) -> None:
        self.attach = attach
        self.client = StoreClient(address, passing_identity(BlockingHost(), "rank"), attach)
        shard = attach.shard
        self.heads = (shard.head_start, shard.head_stop) if shard is not None else (0, 0)

    def ready(self, timeout_s: float) -> bool:
        return self.client.wait_ready(timeout_s)

    def write(self, grant: WriteGrant, keys: list[bytes], fill: int) -> list[list[int]]:
        """Fills this rank's heads of every granted slot with bytes that tell block and head."""
        slab = self.client.slab_of(grant.slab)
        assert slab is not None, "not attached to that slab"
        sums = []
        for item in grant.grants:
            view = slab.heads(item.slot, *self.heads)
            for head in range(self.heads[1] - self.heads[0]):
                size = self.attach.layout.head_bytes
                value = (fill + item.index + 16 * (head + self.heads[0])) % 256
                view[head * size : (head + 1) * size] = bytes([value]) * size
            binding = slab.binding(keys[item.index], item.slot)
            sums.append(
                block_checksums(
                    binding, self.attach.layout, view, head_start=self.heads[0], head_stop=self.heads[1]
                )
            )
        return sums

    def report(self, grant: WriteGrant, good: list[bool], sums: list[list[int]]) -> bool:
        assert self.attach.rank is not None
        return self.client.report(grant, self.attach.rank, good, sums)

    def delivered(self, timeout_s: float) -> bool:
        return self.client.wait_delivered(timeout_s)

    def read(self, match: MatchResult, keys: list[bytes]) -> list[int | None]:
        """The first byte of each block in this rank's heads, None where the check failed."""
        slab = self.client.slab_of(match.slab)
        found: list[int | None] = []
        for key, location in zip(keys, match.locations, strict=False):
            if slab is None:
                found.append(None)
                continue
            staging = bytes(slab.heads(location.slot, *self.heads))
            binding = slab.binding(key, location.slot)
            good = verify_block(
                binding,
                self.attach.layout,
                staging,
                location.checksums,
                head_start=self.heads[0],
                head_stop=self.heads[1],
            )
            found.append(staging[0] if good else None)
        return found

    def scribble(self, slab: int, slot: int, value: int) -> None:
        memory = self.client.slab_of(slab)
        assert memory is not None
        memory.view[memory.offset(slot)] = value

    def start_write(self, session: str, attempt: int, keys: list[bytes], parents: list[bytes]) -> Any:
        return msgspec.to_builtins(self.client.start_write(session, attempt, keys, parents))

    def truncate(self, slab: int) -> str:
        memory = self.client.slab_of(slab)
        assert memory is not None
        for name in os.listdir("/proc/self/fd"):
            try:
                if "test-slab" in os.readlink(f"/proc/self/fd/{name}"):
                    os.ftruncate(int(name), 0)
                    return "truncated"
            except PermissionError:
                return "refused"
        return "not found"

    def writable(self, slab: int) -> bool:
        memory = self.client.slab_of(slab)
        assert memory is not None
        return not memory.view.readonly

    def withdraw(self, slab: int, keys: list[bytes], slots: list[int]) -> None:
        self.client.withdraw(slab, keys, slots)

    def pin(self, keys: list[bytes], seconds: float) -> int:
        link = self.client._keeper.link
        assert link is not None
        return link.deliveries.request(Pin("pin", keys, seconds), 5.0).count

    def fork_and_scribble(self, slab: int, slot: int) -> str:
        """What becomes of a forked child that writes into the slab: "wrote" or "died"."""
        memory = self.client.slab_of(slab)
        assert memory is not None
        child = os.fork()
        if child == 0:
            memory.view[memory.offset(slot)] = 255
            os._exit(0)
        _, status = os.waitpid(child, 0)
        return "wrote" if status == 0 else "died"

    def counts(self) -> dict[str, int]:
        return self.client.counts()

    def pid(self) -> int:
        return os.getpid()


ARGUMENTS: dict[str, Any] = {
    "ready": tuple[float], "write": tuple[WriteGrant, list[bytes], int],
    "report": tuple[WriteGrant, list[bool], list[list[int]]], "delivered": tuple[float],
    "read": tuple[MatchResult, list[bytes]], "scribble": tuple[int, int, int],
    "withdraw": tuple[int, list[bytes], list[int]], "fork_and_scribble": tuple[int, int],
    "pin": tuple[list[bytes], float],
    "start_write": tuple[str, int, list[bytes], list[bytes]], "truncate": tuple[int], "writable": tuple[int],
    "counts": tuple[()], "pid": tuple[()],
}  # fmt: skip


def main(kind: type[Rank] = Rank) -> None:
    address, attach = sys.argv[1], msgspec.json.decode(sys.argv[2], type=Attach)
    rank = kind(address, attach)
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        answer = getattr(rank, verb)(*msgspec.convert(arguments, ARGUMENTS[verb]))
        print(json.dumps(answer), flush=True)
    rank.client.close()


if __name__ == "__main__":
    main()

"""Resident bytes are those of a whole tree of processes, and fall when one gives its memory back."""

from __future__ import annotations

import subprocess
import sys

from interlock.host.resident import resident_bytes

MIB = 1 << 20
GRANDCHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
for line in sys.stdin:
    child.stdin.write(line.encode()); child.stdin.flush()
    print(child.stdout.readline().decode(), end="", flush=True)
child.kill(); child.wait()
"""
HOLDER = """
import mmap, sys
held = None
for line in sys.stdin:
    if line.strip() == "take":
        held = mmap.mmap(-1, 64 << 20); held.write(bytes(64 << 20))
    else:
        held.close()
    print("done", flush=True)
"""


def test_memory_of_a_grandchild_counts_until_it_is_given_back() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", GRANDCHILD, HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def say(word: str) -> int:
            print(word, file=child.stdin, flush=True)
            assert child.stdout is not None
            assert child.stdout.readline() == "done\n"
            return resident_bytes(child.pid)

        taken = say("take")
        given = say("give")
        child.stdin.close()
    assert taken > 64 * MIB
    assert 60 * MIB < taken - given < 70 * MIB
    assert resident_bytes(child.pid) == 0, "a tree that is gone holds nothing"

"""Names, lives and attempts: the rule behind everything (DESIGN §4.2).

A *name* says which part of the system speaks ("engine-0"). An *incarnation* says in which of its lives: it only grows,
and it is on disk before the first message of that life. An *attempt* numbers the tries within one life. Receivers keep
the highest incarnation they know of each name and drop what is older, telling the sender what they know: late messages
are ordinary and harmless.

An *epoch* orders the commands of a fleet. It is a pair: the term comes from the election of a coordinator (embedded:
its incarnation), the number counts the targets allotted in that term.

Why max(stored + 1, wall clock, refused + 1)? A counter alone starts again at 1 when its directory is lost; the wall
clock alone steps back; each public rule that used one of them was broken by the other (hazards E3). A process that was
accepted anywhere never raises its incarnation: if it is refused later, a newer life of it exists and it stops.
"""

from __future__ import annotations

import msgspec


class Epoch(msgspec.Struct, frozen=True, order=True, array_like=True):
    """When a target was allotted. Ordered as the pair (term, number)."""

    term: int = 0
    number: int = 0

    def __str__(self) -> str:
        return f"{self.term}.{self.number}"


def next_incarnation(*, stored: int, wall_ns: int, refused: int = 0) -> int:
    """The incarnation of a life that begins now; to be stored durably before its first message.

    `stored` is that of the last life known here (0: none), `refused` the highest that a refusing peer reported.
    """
    return max(stored + 1, wall_ns, refused + 1)

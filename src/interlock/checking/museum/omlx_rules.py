"""How oMLX's boundary snapshot store went about erasure, before #1423, as merged, and after; three exhibits look at it.

Requests are keys: what is pending and what is on disk is told apart by request id (and position, one here), and cancellation is
a count per id. One writer takes items from a queue; a lock says that it is busy, and who erases waits for it, for a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from interlock.checking.explorer import World

NONE = -1


class State(NamedTuple):
    """`pending`, `disk`: for each id the life of the id whose bytes are there. `hand`: the writer's item: id, life, whether it
    was found wanted (and, with the lock, the lock is held)."""

    queue: tuple[tuple[int, int], ...]
    pending: tuple[int, ...]
    hand: tuple[int, int, bool] | None
    cancelled: tuple[int, ...]
    disk: tuple[int, ...]
    lives: tuple[int, ...]
    accepted: tuple[bool, ...]
    """For each id whether its save of this life returned True."""
    left: tuple[int, int]
    """Waits for the lock that may time out; calls of cleanup_all."""


class BoundaryStore(World[State]):
    """`has_lock`: erasing counts cancellations and waits for the writer (#1423). `by_identity`: an item is told from its
    successor of the same key (later). `looks_for`: "back" (erased bytes on disk) or "vanished" (accepted and nowhere)."""

    protocol = "snapshots"

    def __init__(
        self,
        *,
        ids: int = 1,
        lives: int = 2,
        has_lock: bool = True,
        by_identity: bool = False,
        time_outs: int = 0,
        erase_alls: int = 0,
        looks_for: str = "back",
    ) -> None:
        self.ids, self.max_lives = ids, lives
        self.has_lock, self.by_identity, self.looks_for = has_lock, by_identity, looks_for
        self.name = f"{ids} request ids, {lives} lives each, as it was"
        self.budget = {"time-outs": time_outs, "erase_alls": erase_alls}
        nothing = (NONE,) * ids
        self.start = State(
            (),
            nothing,
            None,
            (0,) * ids,
            nothing,
            (0,) * ids,
            (False,) * ids,
            (time_outs, erase_alls),
        )

    def initial(self) -> Iterable[State]:
        return [self.start]

    def steps(self, state: State) -> Iterable[tuple[Any, State]]:
        for rid in range(self.ids):
            life = state.lives[rid]
            if life < self.max_lives and not state.accepted[rid]:
                yield (
                    ("save", rid),
                    state._replace(
                        queue=(*state.queue, (rid, life)),
                        pending=_with(state.pending, rid, life),
                        accepted=_with(state.accepted, rid, True),
                    ),
                )
            if life < self.max_lives:
                yield from self._cleanup_request(state, rid)
        if state.left[1]:
            yield from self._cleanup_all(state)
        if state.hand is None and state.queue:
            yield (
                ("take", state.queue[0][0]),
                state._replace(queue=state.queue[1:], hand=(*state.queue[0], False)),
            )
        elif state.hand is not None:
            what = "write" if state.hand[2] else "check"
            yield (what, state.hand[0]), self._written(state) if state.hand[2] else self._checked(state)

    def _is_busy(self, state: State) -> bool:
        return self.has_lock and state.hand is not None and state.hand[2]

    def _cleanup_request(self, state: State, rid: int) -> Iterable[tuple[Any, State]]:
        dropped = int(state.pending[rid] != NONE and self.has_lock)
        after = state._replace(
            pending=_with(state.pending, rid, NONE),
            disk=_with(state.disk, rid, NONE),
            lives=_with(state.lives, rid, state.lives[rid] + 1),
            accepted=_with(state.accepted, rid, False),
        )
        if not self._is_busy(state):
            yield ("erase", rid), after._replace(cancelled=_with(state.cancelled, rid, 0))
        elif state.left[0]:
            counted = _with(state.cancelled, rid, state.cancelled[rid] + dropped)
            yield (
                ("erase late", rid),
                after._replace(cancelled=counted, left=(state.left[0] - 1, state.left[1])),
            )

    def _cleanup_all(self, state: State) -> Iterable[tuple[Any, State]]:
        nothing = (NONE,) * self.ids
        after = state._replace(
            queue=(),
            pending=nothing,
            disk=nothing,
            lives=tuple(min(life + 1, self.max_lives) for life in state.lives),
            accepted=(False,) * self.ids,
            left=(state.left[0], state.left[1] - 1),
        )
        if not self._is_busy(state):
            yield ("erase all",), after._replace(cancelled=(0,) * self.ids)
        elif state.left[0]:
            yield ("erase all late",), after._replace(left=(state.left[0] - 1, after.left[1]))

    def _checked(self, state: State) -> State:
        """Is it still wanted? The bytes in hand are not compared with the entry, or (`by_identity`) they are."""
        assert state.hand is not None
        rid, life, _ = state.hand
        counted = _with(state.cancelled, rid, max(0, state.cancelled[rid] - 1))
        is_mine = state.pending[rid] == life if self.by_identity else state.pending[rid] != NONE
        if not is_mine:
            return state._replace(hand=None, cancelled=counted)
        if state.cancelled[rid]:
            return state._replace(
                hand=None,
                cancelled=counted,
                pending=_with(state.pending, rid, NONE),
                disk=_with(state.disk, rid, NONE),
            )
        return state._replace(hand=(rid, life, True))

    def _written(self, state: State) -> State:
        """mkdir and rename, by name; with the counter, a rename that came too late is taken back."""
        assert state.hand is not None
        rid, life, _ = state.hand
        is_mine = not self.by_identity or state.pending[rid] == life
        after = state._replace(
            hand=None, pending=_with(state.pending, rid, NONE) if is_mine else state.pending
        )
        if state.cancelled[rid]:
            return after._replace(
                cancelled=_with(state.cancelled, rid, state.cancelled[rid] - 1),
                disk=_with(state.disk, rid, NONE),
            )
        return after._replace(disk=_with(state.disk, rid, life))

    def wrong(self, state: State) -> str | None:
        for rid in range(self.ids):
            if self.looks_for == "back" and NONE < state.disk[rid] < state.lives[rid]:
                return f"the file of {_name(rid)}'s life {state.disk[rid]} is on disk after it was erased"
            is_anywhere = state.pending[rid] != NONE or state.disk[rid] != NONE
            if self.looks_for == "vanished" and state.accepted[rid] and not is_anywhere:
                return f"the save of {_name(rid)} returned True, and it is neither in memory nor on disk"
        return None

    def good(self, state: State) -> bool:
        return state.hand is None and not state.queue

    def tell(self, state: State, action: tuple[Any, ...], after: object) -> str:  # noqa: ARG002
        name = _name(action[1]) if len(action) > 1 else ""
        return {
            "save": f"{name} is saved: True",
            "take": f"the writer takes {name}'s item from the queue",
            "check": f"the writer looks whether {name} is still wanted",
            "write": f"the writer makes {name}'s directory and renames its file into it",
            "erase": f"{name} is erased",
            "erase late": f"{name} is erased; the wait for the writer times out, so it is counted",
            "erase all": "all are erased",
            "erase all late": "all are erased; the queue is emptied, the wait for the writer times out",
        }[action[0]]


def _name(rid: int) -> str:
    return "AB"[rid]


def _with(row: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*row[:at], value, *row[at + 1 :])

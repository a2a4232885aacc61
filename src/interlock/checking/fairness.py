"""Can a world go round for ever without reaching a good end, although no action that stays possible is starved?

Weak fairness: an action that could be taken in every state of a circle must be taken at last. So a circle (a strongly
connected component of the states that are not good) can hold a run only if each action is impossible in one of its states,
or taken inside it. Larger circles satisfy this more easily than those inside them, so looking at the largest is exact.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence

Actions = Callable[[int], list[tuple[Hashable, int]]]
"""The actions of a state, with the states they lead to."""


def unfair_component(
    good: Sequence[int], sources: array[int], targets: array[int], actions: Actions
) -> list[int] | None:
    """A circle (or a dead end) of states that are not good and that a fair run need not leave; None when there is none."""
    following: list[list[int]] = [[] for _ in good]
    moves = [False] * len(good)
    for source, target in zip(sources, targets, strict=True):
        moves[source] = True
        if not good[source] and not good[target]:
            following[source].append(target)
    for component in _components(following, good):
        if len(component) == 1 and moves[component[0]]:
            continue  # It has no step to itself that changes anything, so something else happens next.
        if len(component) == 1 or not _must_leave(component, actions):
            return component
    return None


def _must_leave(component: list[int], actions: Actions) -> bool:
    """Whether some action is possible in all of these states and always leads out of them."""
    inside = set(component)
    leaving: set[Hashable] | None = None
    staying: set[Hashable] = set()
    for state in component:
        steps = actions(state)
        # A step that changes nothing is not *taking* the action: it stays possible, and starved.
        staying.update(action for action, after in steps if after in inside and after != state)
        possible = {action for action, after in steps if after != state}
        leaving = possible if leaving is None else leaving & possible
    return bool(leaving and leaving - staying)


def _components(following: list[list[int]], good: Sequence[int]) -> list[list[int]]:
    """Strongly connected components of the states that are not good (Tarjan 1972, without recursion)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for root in range(len(following)):
        if good[root] or root in order:
            continue
        work = [(root, 0)]
        while work:
            at, child = work.pop()
            if child == 0:
                order[at] = low[at] = len(order)
                stack.append(at)
                on_stack.add(at)
            elif following[at][child - 1] in on_stack:
                low[at] = min(low[at], low[following[at][child - 1]])
            for number in range(child, len(following[at])):
                after = following[at][number]
                if after not in order:
                    work.append((at, number + 1))
                    work.append((after, 0))
                    break
                if after in on_stack:
                    low[at] = min(low[at], order[after])
            else:
                if low[at] == order[at]:
                    component: list[int] = []
                    while not component or component[-1] != at:
                        component.append(stack.pop())
                        on_stack.discard(component[-1])
                    found.append(component)
    return found

"""Walks one path through a world, chosen by `Choices`: by seed in worlds too big to exhaust, or under Hypothesis.

A path proves nothing about the others. It looks further than a budget that must be exhausted can: more ranks, more faults.
"""

from __future__ import annotations

from typing import Any

from interlock.checking.choices import Choices
from interlock.checking.explorer import Broken, Violation, World


def wander(world: World[Any], choices: Choices, *, steps_max: int) -> Violation | None:
    """Takes up to `steps_max` steps that change something; what was wrong on the way, with its story (not the shortest)."""
    state = choices.pick(list(world.initial()))
    story: list[str] = []
    wrong = world.wrong(state)
    while wrong is None and len(story) < steps_max:
        steps = [(action, after) for action, after in world.steps(state) if after != state]
        if not steps:
            return None
        action, after = choices.pick(steps)
        story.append(world.tell(state, action, after))
        if isinstance(after, Broken):
            wrong = after.why
        else:
            wrong = world.wrong(after)
            state = after
    return None if wrong is None else Violation("safety", wrong, tuple(story))

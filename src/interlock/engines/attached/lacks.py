"""What cannot be guaranteed for an engine that others run, by name: shown by `interlock ctl status`, and by the attachment.

An attached engine is paused, updated, suspended and watched like any member. But it is neither started nor ended by us, its requests
do not come from our front, and whoever can reach it can also go past us. Each name is a row of the contract that does not hold.
"""

from __future__ import annotations

PREFIX = "without_"
"""How a capability begins that names something missing."""

LACKS: dict[str, str] = {
    "dispatch": "our fronts send it nothing: its requests come from whoever runs it, and are routed by them",
    "exit_proof": "nobody sees all its processes end: when it falls silent it is SUSPECT, never LOST, until its owner detaches it or "
    "`interlock ctl forget` vouches for its end; a pause that must be sure of it fails meanwhile",
    "stop": "STOP leaves it paused and detached: ending its processes is its owner's",
    "token_ledger": "its requests are in no ledger: they die with it, and no answer says which weights made it but vLLM's own label",
    "epoch_fence": "whoever reaches it can resume or ask it past us; a pause that was undone is taken again within a second, and counted "
    "as a drift, but steps in between have happened",
    "weights_proof": "whether an update gave it the whole of the new weights is its own word: nothing is compared",
    "kept_kv": "an update always drops its KV: kv=keep is refused",
}


def capabilities(*, updates: bool, suspends: bool) -> list[str]:
    """As `EngineFacts` carries them: what it can do, and what is missing."""
    able = [name for name, can in (("updates", updates), ("suspends", suspends)) if can]
    return ["attached", *able, *(PREFIX + name for name in LACKS)]

"""In sentences: how a peer is reached, over which lanes, and why not over others."""

from __future__ import annotations

from collections.abc import Iterable

from interlock.core.endpoint_state import Phase
from interlock.transfer.lanes.kinds import LaneOptions
from interlock.transfer.peer import Peer


def explain_peer(peer: Peer, kinds: Iterable[str], options: LaneOptions) -> list[str]:
    """`kinds`: of lanes, those that this engine has."""
    driver = peer.driver
    state = driver.state
    words = [
        f"endpoint to {peer.name}: {state.phase} as {state.stamp}"
        + (f" with {state.theirs}" if state.theirs else "")
    ]
    if driver.ended and state.phase is not Phase.CONNECTED:
        words.append(f"the endpoint before it was retired: {driver.ended}")
    if peer.link.trouble:
        words.append(f"its control channel: {peer.link.trouble}")
    for lane in driver.usable:
        words += lane.explain()
    ours = set(kinds)
    theirs = {offer.kind for offer in state.their_offers}
    for kind in sorted(ours | theirs):
        if kind in driver.refused:
            words.append(f"{kind} is not used: {driver.refused[kind]}")
        elif kind not in ours:
            words.append(f"{kind} is not used: this side has it not ({options.why_not(kind)})")
        elif theirs and kind not in theirs:
            words.append(f"{kind} is not used: {peer.name} does not offer it")
    return words

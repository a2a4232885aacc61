"""Lockstep groups: data-parallel ranks that share a model's experts, and so meet in collectives at every step.

    runner's process                                   rank processes, one tree with the runner
    ┌──────────────────────────────┐   words, calls   ┌─────────────────────────────────────┐
    │ LockstepEngine               │ ───────────────► │ RankService ─ Seat ─► LockstepLoop   │ ◄─┐ all-to-all over
    │   Leader  (core/…_leader)    │ ◄─────────────── │   one TransformersEngine of its own  │   │ gloo in every layer
    └──────────────────────────────┘  reports, tokens └─────────────────────────────────────┘ ◄─┘ with experts

    engine      `LockstepEngine`: the runner's `Engine`; spreads requests over the ranks, and is one member of the fleet
    streams     its requests: each on one rank, or waiting while there is none
    group       the processes and links of one life of the ranks; ended whole, with proof of each exit
    starting    how ranks say that they have started, or why not
    leader      `Leader`: drives `core/lockstep_leader`: grants steps while somebody has work, and notices who is late
    link        one rank as the runner sees it: its channel, what it said last
    words       what they say to each other
    rank        the process of one rank: serves leaders and the requests of its runner
    rank_engine the Transformers engine of one rank, asked by messages instead of iterators
    seat        `Seat`: drives `core/lockstep` for one rank, between the thread that hears and the one that computes
    stepping    `LockstepLoop`: the engine's thread, which steps when granted, with an empty forward if it has no work
    experts     each rank keeps its part of the experts (the library's own token dispatch)

A step is one forward of each rank, whatever it is of: a chunk of a prompt, its decoding requests, or one token of nobody's. So
every rank takes part in the same collectives in the same order, and no rank asks another what it is about to do.
"""

"""Any causal model of the Hugging Face library as an engine: a plain scheduler whose state is ours to save.

    engine        `TransformersEngine`: the runner's `Engine`; the asyncio half, and the other ranks' processes
    loop          `Loop`: the engine's thread; one step at a time, and between two steps whatever was asked for
    asking        the part of a thread that others ask for things
    building      all of an engine from its configuration
    setup         `TransformersConfig`, and how the model is loaded from it (local directory, no remote code)
    scheduler     `Scheduler`: who waits, who runs, what the next step computes; decides, computes nothing
    plans         `Step` and the other commands that every rank understands (msgpack)
    computer      `Computer`: one rank's model and caches; obeys commands. The same on every rank
    batch         `BatchCache`: the caches of all decoding requests as one, right-aligned, rows come and go
    forward       `Forward`: one forward of a model, whatever its family calls its arguments
    probe         does this model batch, does it continue a prompt? Asked of the model itself at start
    sampling      `Sampler`: vLLM's parameters in vLLM's order, one generator a request, logprobs
    moving        a request's cache as bytes and back, without pickle
    ranks         tensor parallelism: rank 0 drives by pipe, collectives run over gloo, a dead rank ends the engine
    rank_processes  the other ranks' processes: started, watched, ended
    hooks         what a KV store and a snapshot store have to do to be used: `BlockScheduler`, `BlockWorker`, `BoundaryHook`
    blocks        the KV store behind those hooks, with `sharing` and `block_worker`

A request's life: *waiting* -> (its cache or a stored prefix is taken over) -> *prefill* in chunks that end on block
boundaries -> *decode* in the batch -> ended. A step is: `Scheduler.plan`; every rank executes it (saves, drops, chunks,
decode, in this order); rank 0 chooses tokens; `Scheduler.advance`. Pause, abort, take, put, weights: between two steps.

Why not the library's own continuous batching: docs/decisions/007-a-scheduler-of-our-own-over-the-librarys-models.md.
"""

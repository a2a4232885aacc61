"""The seam to the machine: whatever a driver needs of time, sockets, files, memory and processes goes through a `Host`.

Drivers use asyncio's own primitives (tasks, events, queues, `asyncio.timeout`) and take everything else from here, so
that the same driver runs on a simulated machine. `base` says what a host can do, `real` does it on Linux, `blocking`
is the synchronous twin for code that vLLM calls on its own threads.
"""

"""The snapshot store: states of requests that cannot be cut, written behind to disk, and erased without a race.

store     `SnapshotStore`: what engines call
saving    a copy into memory, offered
loading   from memory, or from the file
desk      scopes, their locks, and the effects of core/snapshots as I/O
writers   the queue, the threads that write, and those given up as hung
reaper    empties the trash
start     one owner a root; what an earlier life left is adopted or trash
kept      promoted snapshots, which outlive their requests
buffers   staging memory, page-aligned and used again
format    the file; tensors (torch, NumPy) and caches (of the Transformers library) into it and out of it
"""

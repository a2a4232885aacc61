"""One machine's KV blocks: the slab they lie in, the node that owns it, and the clients that use it."""
